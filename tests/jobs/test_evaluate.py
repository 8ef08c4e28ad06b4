"""Evaluation against a canned engine: who is asked what, what is kept, and what an engine's trouble does."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.evaluation.ask_rows import Patience
from jobs.evaluation.evaluate import EvalRequest, evaluate, kept_scores
from jobs.evaluation.judge_version import judge_version, score_versions
from jobs.evaluation.prompts import spell_out
from registry import adapters
from registry.errors import AdmissionError, DoesNotFit, EngineError, RecipeError
from registry.recipe import Evaluate, Finetune
from registry.scores import Scored
from registry.settings import Settings
from registry.store import dump
from serving.engine import Engine
from tests.fakes.answering_engine import KEY, Answerer, AnsweringEngine, Fault
from tests.judged_project import BASE, LABELS, OTHER_BASE, TEST_ROWS, Judged, make_judged, question_of

QUICK = Patience(seconds=20, attempts=3, pause=0.01)
HASTY = Patience(seconds=0.4, attempts=3, pause=0.01)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return make_judged(tmp_path_factory.mktemp("judged") / "project")


@pytest.fixture
def here(template: Judged, tmp_path: Path) -> Judged:
    """A copy of the project, with version 1 as champion and 2 as candidate."""
    root = tmp_path / "project"
    shutil.copytree(template.project.root, root)
    from registry.project import Project
    from registry.store import open_store

    project = Project(root=root, home=root / ".ft", cache=tmp_path / "cache")
    copied = Judged(project, open_store(project), template.pinned)
    copied.add(1)
    verdict = adapters.add_verdict(copied.store, "m", 1, "pass", {"champion": None, "checks": []}, None)
    adapters.promote(copied.store, verdict, by_whom="test")
    copied.add(2)
    return copied


def right_from(share: dict[str, float]) -> Answerer:
    """Each model answers the first `share` of the questions rightly, and the next label to the others."""

    def answer(model: str, messages: list[dict[str, str]], _: int) -> str:
        number, label = question_of(messages)
        wrong = LABELS[(LABELS.index(label) + 1) % len(LABELS)]
        return label if number < share[model] * TEST_ROWS else wrong

    return answer


SHARES = right_from({"base": 0.25, "m@1": 0.5, "m@2": 1.0})


def request(here: Judged, recipe: Finetune | None = None, champion: int | None = 1) -> EvalRequest:
    dataset = {"hash": here.pinned.hash}
    return EvalRequest.for_version(
        here.project,
        here.store,
        recipe or here.recipe(),
        BASE,
        dataset,
        here.unpacked(),
        candidate=2,
        champion=champion,
    )


def run(
    here: Judged,
    canned: AnsweringEngine,
    asked: EvalRequest,
    progress: Any = lambda *_: None,
    patience: Patience = QUICK,
) -> dict[str, Scored]:
    async def go() -> dict[str, Scored]:
        async with Engine(canned.url, KEY) as engine:
            return await evaluate(here.project, here.store, engine, asked, progress, patience)

    return asyncio.run(go())


def test_three_subjects_answer_the_same_rows(here: Judged) -> None:
    seen: list[tuple[int, int]] = []
    with AnsweringEngine(SHARES) as canned:
        scored = run(here, canned, request(here), lambda done, total: seen.append((done, total)))
    exact = {role: each.metrics["exact_match"] for role, each in scored.items()}
    assert exact == {"candidate": 1.0, "champion": 0.5, "base": 0.25}
    assert [(each.subject, each.version, each.count) for each in scored.values()] == [
        ("m@2", 2, TEST_ROWS), ("m@1", 1, TEST_ROWS), ("base", None, TEST_ROWS),
    ]  # fmt: skip
    assert len({each.rows for each in scored.values()}) == 1
    assert seen == [(done, 3 * TEST_ROWS) for done in range(1, 3 * TEST_ROWS + 1)]
    assert 1 < canned.most_at_once <= 4
    # The champion stays: a server on this engine wants it.
    assert canned.calls == [("load", "m@2"), ("unload", "m@2"), ("load", "m@1")]
    assert all(body["temperature"] == 0 and body["max_tokens"] == 32 for body in canned.asked)


def test_only_the_base_is_told_the_task(here: Judged) -> None:
    with AnsweringEngine(SHARES) as canned:
        run(here, canned, request(here))
    for body in canned.asked:
        text = body["messages"][-1]["content"]
        assert ("Answer with exactly one of these labels" in text) == (body["model"] == "base")
        assert all(f"\n{label}" in text for label in LABELS) == (body["model"] == "base")


def test_a_repeat_asks_nothing(here: Judged) -> None:
    with AnsweringEngine(SHARES) as canned:
        first = run(here, canned, request(here))
        asked = len(canned.asked)
        calls = len(canned.calls)
        assert run(here, canned, request(here)) == first
        assert (len(canned.asked), len(canned.calls)) == (asked, calls)
    assert kept_scores(here.store, request(here)) == first


def test_after_a_crash_only_the_rest_is_asked(here: Judged) -> None:
    def dies(model: str, messages: list[dict[str, str]], attempt: int) -> str | Fault:
        return Fault(drop=True) if model == "base" else SHARES(model, messages, attempt)

    with AnsweringEngine(dies) as canned, pytest.raises(EngineError, match="base gave no answer"):
        run(here, canned, request(here))
    with AnsweringEngine(SHARES) as canned:
        run(here, canned, request(here))
        assert {body["model"] for body in canned.asked} == {"base"}


@pytest.mark.parametrize(
    ("changed", "asked_again"),
    [
        ({"concurrency": 8}, set()),
        ({"max_new_tokens": 16}, {"base", "m@1", "m@2"}),
        ({"labels": [*LABELS, "new"]}, {"base", "m@1", "m@2"}),
    ],
)
def test_what_changes_the_question_is_asked_again(here: Judged, changed: dict[str, Any], asked_again: set[str]) -> None:
    with AnsweringEngine(SHARES) as canned:
        run(here, canned, request(here))
        before = len(canned.asked)
        run(here, canned, request(here, here.recipe(**changed)))
        assert {body["model"] for body in canned.asked[before:]} == asked_again


def test_equal_adapters_share_a_score_but_not_a_name(here: Judged) -> None:
    with AnsweringEngine(SHARES) as canned:
        run(here, canned, request(here))
        source = here.project.adapter_folder("m", 2)
        shutil.copytree(source, here.project.adapter_folder("m", 3))
        body = adapters.get_version(here.store, "m", 2).body
        adapters.add_version(here.store, "m", 3, "run-3", "adapters/m/3", body)
        asked = EvalRequest.for_version(
            here.project, here.store, here.recipe(), BASE, {"hash": here.pinned.hash}, here.unpacked(), candidate=3
        )
        before = len(canned.asked)
        scored = run(here, canned, asked)
        assert len(canned.asked) == before
    assert (scored["candidate"].subject, scored["candidate"].version) == ("m@3", 3)


def test_max_test_bounds_the_rows_and_spreads_them(here: Judged) -> None:
    recipe = here.recipe()
    bounded = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_test": 8})})
    with AnsweringEngine(SHARES) as canned:
        scored = run(here, canned, request(here, bounded))
    assert {each.count for each in scored.values()} == {8}
    assert sorted(right for right, _ in scored["candidate"].pairs) == sorted(LABELS * 2)


def test_what_the_server_had_loaded_stays(here: Judged) -> None:
    with AnsweringEngine(SHARES, loaded={"m@1": str(here.project.adapter_folder("m", 1))}) as canned:
        run(here, canned, request(here))
        assert canned.calls == [("load", "m@2"), ("unload", "m@2")]
        assert list(canned.loaded) == ["m@1"]


def test_a_candidate_that_became_champion_meanwhile_is_not_taken_away(here: Judged) -> None:
    def promotes(model: str, messages: list[dict[str, str]], attempt: int) -> str:
        if model == "m@2" and adapters.aliases(here.store, "m")["champion"] == 1:
            verdict = adapters.add_verdict(here.store, "m", 2, "pass", {"champion": 1, "checks": []}, None)
            adapters.promote(here.store, verdict, by_whom="a person", person=True)
        return str(SHARES(model, messages, attempt))

    with AnsweringEngine(promotes) as canned:
        run(here, canned, request(here))
        assert "m@2" in canned.loaded


def flaky(fault: Fault, times: int) -> Answerer:
    """Every question fails in the same way at its first `times` attempts."""

    def answer(model: str, messages: list[dict[str, str]], attempt: int) -> str | Fault:
        return fault if attempt <= times else SHARES(model, messages, attempt)

    return answer


FAULTS = [
    Fault(status=500), Fault(status=503), Fault(status=400), Fault(hang=5.0), Fault(drop=True),
    Fault(garbage="not json"), Fault(garbage="[]"), Fault(garbage="{}"), Fault(garbage='{"choices": []}'),
    Fault(garbage='{"choices": [{"message": null}], "usage": {}}'),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_that_passes_is_waited_out(here: Judged, fault: Fault) -> None:
    times = 1 if fault.hang else 2
    with AnsweringEngine(flaky(fault, times)) as canned:
        scored = run(here, canned, request(here), patience=HASTY if fault.hang else QUICK)
    assert scored["candidate"].metrics["exact_match"] == 1.0
    assert scored["candidate"].failed == []


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_an_engine_that_fails_is_no_verdict_on_the_model(here: Judged, fault: Fault) -> None:
    with AnsweringEngine(flaky(fault, 99)) as canned:
        with pytest.raises(EngineError, match=r"m@2 gave no answer to \d+ questions, so no score"):
            run(here, canned, request(here), patience=HASTY if fault.hang else QUICK)
        # It gives up soon: not three attempts at each of all rows.
        assert len(canned.asked) <= 3 * (TEST_ROWS // 10 + 1 + 4)
        assert "m@2" not in canned.loaded
    assert kept_scores(here.store, request(here)) == {}


def test_single_failures_count_as_wrong_and_are_not_kept(here: Judged) -> None:
    def answer(model: str, messages: list[dict[str, str]], attempt: int) -> str | Fault:
        broken = model == "m@2" and question_of(messages)[0] in (3, 7)
        return Fault(status=400) if broken else SHARES(model, messages, attempt)

    with AnsweringEngine(answer) as canned:
        scored = run(here, canned, request(here))
    assert scored["candidate"].failed == [3, 7]
    assert scored["candidate"].metrics["exact_match"] == pytest.approx(22 / 24)
    assert set(kept_scores(here.store, request(here))) == {"champion", "base"}


def test_an_adapter_that_must_not_be_loaded_is_not(here: Judged) -> None:
    (here.project.adapter_folder("m", 2) / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with AnsweringEngine(SHARES) as canned:
        with pytest.raises(AdmissionError, match="a pickle"):
            run(here, canned, request(here))
        assert canned.calls == []


def test_what_the_engine_refuses_to_load_is_an_error(here: Judged) -> None:
    with AnsweringEngine(SHARES, refuse_load=True) as canned, pytest.raises(AdmissionError, match="max_lora_rank"):
        run(here, canned, request(here))


def test_a_champion_on_another_base_counts_only_with_a_kept_score(here: Judged) -> None:
    here.add(3, OTHER_BASE)
    with AnsweringEngine(right_from({"base": 0.25, "m@2": 1.0, "m@3": 0.5})) as canned:
        scored = run(here, canned, request(here, champion=3))
        assert "another base model" in scored["champion"].missing
        asked = EvalRequest.for_version(
            here.project,
            here.store,
            here.recipe(),
            OTHER_BASE,
            {"hash": here.pinned.hash},
            here.unpacked(),
            candidate=3,
        )
        run(here, canned, asked)
        assert run(here, canned, request(here, champion=3))["champion"].metrics["exact_match"] == 0.5


def test_the_champion_itself_is_compared_with_the_base(here: Judged) -> None:
    asked = request(here, champion=2)
    assert [subject.role for subject in asked.asked] == ["candidate", "base"]


def test_probes_are_asked_of_all_in_the_same_words(here: Judged) -> None:
    def answer(model: str, messages: list[dict[str, str]], attempt: int) -> str | Fault:
        content = messages[-1]["content"]
        return f"{model} says hi" if content == "안녕?" else SHARES(model, messages, attempt)

    with AnsweringEngine(answer) as canned:
        scored = run(here, canned, request(here, here.recipe(probes=["안녕?"])))
    assert {role: each.probes for role, each in scored.items()} == {
        "candidate": {"안녕?": "m@2 says hi"}, "champion": {"안녕?": "m@1 says hi"}, "base": {"안녕?": "base says hi"},
    }  # fmt: skip


def test_scores_travel_as_json(here: Judged) -> None:

    with AnsweringEngine(SHARES) as canned:
        scored = run(here, canned, request(here))
    state = json.loads(dump({"champion": 1, "scores": {role: each.as_dict() for role, each in scored.items()}}))
    assert EvalRequest.subjects(state) == (scored["candidate"], scored["champion"], scored["base"])


def test_what_could_not_be_scored_is_refused_before_asking(here: Judged) -> None:
    recipe = here.recipe()
    wrong_metric = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"metric": "token_f1"})})
    wrong_schema = here.recipe(task="json", json_schema={"type": "strnig"})
    for wrong in (wrong_metric, wrong_schema):
        with pytest.raises(RecipeError):
            request(here, wrong)


def test_the_task_is_spelt_out_in_the_last_user_turn() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q1"},
                {"role": "assistant", "content": "a"}, {"role": "user", "content": "q2"}]  # fmt: skip
    told = spell_out(messages, Evaluate(task="json", json_schema={"type": "object"}), [])
    assert told[:-1] == messages[:-1]
    assert told[-1]["content"].startswith("q2\n\n")
    assert '{"type": "object"}' in told[-1]["content"]
    assert spell_out(messages, Evaluate(task="text"), []) == messages
    assert messages[-1]["content"] == "q2"


def judge(here: Judged, number: int) -> Any:
    version = adapters.get_version(here.store, "m", number)
    return asyncio.run(judge_version(here.project, here.store, Settings(), version, lambda *_: None))


def test_a_version_is_judged_again_from_its_row_alone(here: Judged) -> None:
    shutil.rmtree(here.unpacked())  # the working copy is gone; DVC's cache has the version
    with AnsweringEngine(SHARES) as canned, here.server(canned.url):
        judged = judge(here, 2)
        assert (judged.outcome, judged.body["champion"]) == ("pass", 1)
        assert judged.body["scores"]["candidate"]["exact_match"] == 1.0
        asked = len(canned.asked)
        assert judge(here, 2) == judged
        assert len(canned.asked) == asked
    assert list((here.project.home / "tmp").iterdir()) == []


def test_judging_again_needs_no_engine_where_all_scores_are_kept(here: Judged) -> None:
    with AnsweringEngine(SHARES) as canned, here.server(canned.url):
        judged = judge(here, 2)
    assert judge(here, 2) == judged


def test_versions_are_scored_by_name(here: Judged) -> None:
    versions: Callable[[], list[adapters.Version]] = lambda: adapters.versions(here.store, "m")  # noqa: E731
    with AnsweringEngine(SHARES) as canned, here.server(canned.url):
        scored = asyncio.run(
            score_versions(
                here.project, here.store, Settings(), versions(), here.pinned, lambda *_: None, with_base=True
            )
        )
    assert {name: each.metrics["exact_match"] for name, each in scored.items()} == {
        "m@1": 0.5, "m@2": 1.0, "base org/base": 0.25,
    }  # fmt: skip


def test_what_no_card_here_can_serve_is_refused_at_once_with_the_card_that_it_needs(here: Judged) -> None:
    folder = here.project.models / BASE.folder
    folder.mkdir(parents=True)
    shape = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
             "intermediate_size": 28672, "vocab_size": 128256, "max_position_embeddings": 8192,
             "model_type": "llama", "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    small = Settings(cards={"cpu": {"memory_gb": 8}, "cuda-0": {"memory_gb": 8}})
    version = adapters.get_version(here.store, "m", 2)
    with pytest.raises(DoesNotFit, match=r"cannot serve org/base: memory: .* GiB needed") as refused:
        asyncio.run(judge_version(here.project, here.store, small, version, lambda *_: None))
    assert "a host with a card of 135 GiB" in refused.value.fix
