"""A reference that is asked at a provider's: each question once, patiently, and never a wrong score out of trouble."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.escalation import _compared, _undecided
from jobs.evaluation.ask_provider import Terms, score_reference
from jobs.evaluation.evaluate import EvalRequest
from jobs.steps import Bench
from registry import runs
from registry.charges import Payer
from registry.cloud_terms import Budgets, ReferenceModel
from registry.errors import BudgetError, EngineError, FtError, RecipeError, Trouble
from registry.escalation import told
from registry.project import Project
from registry.scores import Scored
from registry.settings import Settings
from registry.spending import charge_costs, reservations
from registry.store import open_store
from tests.fakes.provider import KEY, Answerer, Choice, Provider, Refusal
from tests.judged_project import BASE, LABELS, TEST_ROWS, Judged, make_judged, question_of

MODEL = "gpt-canned"
QUICK = Terms(attempts=3, seconds=20, pause=0.01)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return make_judged(tmp_path_factory.mktemp("judged") / "project")


@pytest.fixture
def here(template: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judged:
    root = tmp_path / "project"
    shutil.copytree(template.project.root, root)
    monkeypatch.setenv("PROVIDER_KEY", KEY)
    project = Project(root=root, home=root / ".ft", cache=tmp_path / "cache")
    return Judged(project, open_store(project), template.pinned)


def right(body: dict[str, Any], _: int = 0) -> str:
    return question_of(body["messages"])[1]


def half_right(body: dict[str, Any], _: int) -> str:
    number, label = question_of(body["messages"])
    return label if number < TEST_ROWS / 2 else LABELS[(LABELS.index(label) + 1) % len(LABELS)]


def number_of(body: dict[str, Any]) -> int:
    return question_of(body["messages"])[0]


def reference(provider: Provider, **keys: Any) -> ReferenceModel:
    return ReferenceModel.model_validate({"model": MODEL, "url": provider.url, "key": "${PROVIDER_KEY}", **keys})


def ask(
    here: Judged, asked: ReferenceModel, terms: Terms = QUICK, progress: Any = lambda *_: None,
    budgets: Budgets = Budgets(),  # noqa: B008  # frozen
) -> Scored:  # fmt: skip
    request = EvalRequest.made(here.recipe(), BASE, here.pinned.hash, here.unpacked(), [])
    return asyncio.run(score_reference(Payer(here.store, "m-1", "m", budgets), asked, request, progress, terms))


def test_a_reference_answers_the_test_rows_as_the_bare_base_does(here: Judged) -> None:
    seen: list[tuple[int, int]] = []
    with Provider(half_right) as provider:
        scored = ask(here, reference(provider), progress=lambda done, total: seen.append((done, total)))
        assert (scored.subject, scored.metrics["exact_match"], scored.failed) == (MODEL, 0.5, [])
    assert sorted(map(number_of, provider.asked)) == list(range(TEST_ROWS))
    for body in provider.asked:
        assert (body["model"], body["temperature"], body["max_tokens"]) == (MODEL, 0, 32)
        text = body["messages"][-1]["content"]
        assert "Answer with exactly one of these labels" in text
        assert all(f"\n{label}" in text for label in LABELS)
    assert seen[-1] == (TEST_ROWS, TEST_ROWS)
    assert 1 < provider.most_at_once <= 4  # evaluate.concurrency


def test_what_was_answered_is_kept_and_needs_neither_the_provider_nor_a_key(
    here: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Provider(right) as provider:
        first = ask(here, reference(provider))
        asked = reference(provider)
    monkeypatch.delenv("PROVIDER_KEY")
    assert ask(here, asked) == first
    with Provider(right) as provider, pytest.raises(RecipeError):
        ask(here, reference(provider, model="another"))


def test_a_crash_in_the_middle_asks_only_the_rest(here: Judged) -> None:
    def until_a_few(done: int, total: int) -> None:
        if done >= 10:
            raise Trouble("the worker was killed")

    with Provider(right) as provider:
        with pytest.raises(Trouble, match="killed"):
            ask(here, reference(provider), progress=until_a_few)
        answered = len(provider.asked)
        assert 10 <= answered < TEST_ROWS
        assert ask(here, reference(provider)).metrics["exact_match"] == 1.0
        assert len(provider.asked) <= TEST_ROWS + 4  # those under way when it was killed


def test_who_is_told_to_slow_down_waits_as_long_as_asked_and_asks_less_at_once(here: Judged) -> None:
    refused: list[float] = []
    after: list[tuple[float, int]] = []

    def answer(body: dict[str, Any], _: int) -> str | Refusal:
        if len(refused) < 4:  # all that are asked at once
            refused.append(time.monotonic())
            return Refusal(429, "Rate limit reached", code="rate_limit_exceeded", wait="2")
        after.append((time.monotonic(), provider.at_once))
        return right(body)

    with Provider(answer) as provider:
        assert ask(here, reference(provider)).metrics["exact_match"] == 1.0
    assert after[0][0] - refused[-1] >= 1.9
    assert {at_once for _, at_once in after} == {1}


def test_what_passes_is_tried_again(here: Judged) -> None:
    trouble = [Refusal(500), Refusal(drop=True), Refusal(503), Refusal(408)]

    def answer(body: dict[str, Any], before: int) -> str | Refusal:
        return right(body) if before else trouble[number_of(body) % 4]

    with Provider(answer) as provider:
        assert ask(here, reference(provider)).metrics["exact_match"] == 1.0
        assert len(provider.asked) == 2 * TEST_ROWS


def test_options_that_a_model_does_not_take_are_named_otherwise_or_left_out(here: Judged) -> None:
    def answer(body: dict[str, Any], _: int) -> str | Refusal:
        if "max_tokens" in body:
            what = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            return Refusal(400, what, param="max_tokens", code="unsupported_parameter")
        if "temperature" in body:
            return Refusal(400, "Unsupported value: 'temperature' does not support 0.", param="temperature")
        return right(body)

    with Provider(answer) as provider:
        assert ask(here, reference(provider)).metrics["exact_match"] == 1.0
        assert provider.asked[-1]["max_completion_tokens"] == 32
        assert len(provider.asked) <= TEST_ROWS + 8


@pytest.mark.parametrize(
    ("answer", "kind", "what"),
    [
        (lambda body, _: Refusal(404, "no such model"), RecipeError, "knows no model 'gpt-canned'"),
        (lambda body, _: Refusal(402, "pay"), Trouble, "no money left"),
        (lambda body, _: Refusal(429, "You exceeded", code="insufficient_quota"), Trouble, "no money left"),
        (lambda body, _: Refusal(429, "slow", wait="9999"), Trouble, "left alone for 9999 s"),
        (lambda body, _: Refusal(drop=True), Trouble, "does not answer"),
    ],
)
def test_what_no_other_row_would_change_ends_the_asking_at_once(
    here: Judged, answer: Answerer, kind: type[FtError], what: str
) -> None:
    with Provider(answer) as provider:
        with pytest.raises(kind, match=what) as caught:
            ask(here, reference(provider))
        assert len(provider.asked) <= 4 * QUICK.attempts
    assert caught.value.place
    assert caught.value.fix


def test_a_key_that_is_missing_or_wrong_is_named_and_never_shown(here: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    with Provider(right) as provider:
        asked = reference(provider)
        monkeypatch.setenv("PROVIDER_KEY", " sk-wrong\n")
        with pytest.raises(RecipeError, match="does not take the key") as wrong:
            ask(here, asked)
        monkeypatch.delenv("PROVIDER_KEY")
        with pytest.raises(RecipeError, match="not set: PROVIDER_KEY") as missing:
            ask(here, asked)
        assert provider.asked == []
    assert "sk-wrong" not in str(wrong.value)
    assert wrong.value.place == missing.value.place == "escalate.reference.key"


def test_an_address_that_is_none_is_told(here: Judged) -> None:
    asked = ReferenceModel(model=MODEL, url="api.example.com/v1")
    with pytest.raises(RecipeError, match="no address"):
        ask(here, asked)


def test_a_few_rows_without_an_answer_count_as_wrong_and_many_are_no_score(here: Judged) -> None:
    def refuse(below: int) -> Answerer:
        return lambda body, _: Refusal(400, "filtered") if number_of(body) < below else right(body)

    with Provider(refuse(2)) as provider:
        scored = ask(here, reference(provider))
        assert len(scored.failed) == 2
        assert scored.metrics["exact_match"] == pytest.approx(22 / 24)
    with Provider(refuse(12)) as provider, pytest.raises(EngineError, match=r"no answer to \d+ questions") as caught:
        ask(here, reference(provider))
    assert "filtered" in caught.value.what
    assert "is kept" in caught.value.fix


def test_a_model_that_spends_its_tokens_before_it_answers_gets_no_score_of_zero(here: Judged) -> None:
    with Provider(lambda body, _: Choice("", "length")) as provider, pytest.raises(EngineError, match="max_new_tokens"):
        ask(here, reference(provider))
    with Provider(lambda body, _: Choice(None)) as provider:  # a refusal in words is an answer, and a wrong one
        assert ask(here, reference(provider)).metrics["exact_match"] == 0.0


PRICES = {"usd_per_million_input": 1000, "usd_per_million_output": 10_000}
# A question has some 50 tokens by its letters, and its answer 32 at most.
MOST = (0.2, 0.6)


def spent(here: Judged) -> float:
    return sum(each.usd(time.time()) for each in charge_costs(here.store.read))


def submitted(here: Judged) -> None:
    with here.store.writing() as connection:
        runs.submit_within(connection, "m-1", here.recipe().model_dump(mode="json"), "recipes/m.yaml", "d")


def test_what_a_reference_charges_is_reserved_before_and_booked_as_it_was(here: Judged) -> None:
    """Questions 0 to 5 tell no usage, and so count as the most that they can have used."""
    seen: list[float] = []

    def answer(body: dict[str, Any], _: int) -> Choice:
        seen.append(sum(each.usd for each in reservations(here.store, time.time())) + spent(here))
        return Choice(right(body), usage=None if number_of(body) < 6 else (40, 2))

    submitted(here)
    with Provider(answer) as provider:
        asked = reference(provider, **PRICES)
        ask(here, asked, budgets=Budgets(run_usd=100))
        assert len(provider.asked) == TEST_ROWS
        first = spent(here)
        a_row = seen[0] / TEST_ROWS
        assert MOST[0] < a_row < MOST[1]
        assert seen == pytest.approx([seen[0]] * TEST_ROWS, rel=0.6), "what is reserved and what is spent overlap not"
        assert first == pytest.approx(18 * (40 * 1000 + 2 * 10_000) / 1e6 + 6 * a_row, rel=0.05)
        assert reservations(here.store, time.time()) == []
        ask(here, asked, budgets=Budgets(run_usd=first / 2))  # all is kept: nothing is paid for, so nothing is needed
    assert spent(here) == first
    [row] = charge_costs(here.store.read)
    assert (row.job, row.recipe, row.kind, row.final) == ("m-1", "m", "reference", False)


@pytest.mark.parametrize(
    ("budgets", "says", "place"),
    [
        (Budgets(), "nothing says what this run may cost", "m"),
        (Budgets(run_usd=1), "asking gpt-canned may cost .* of the run's budget of [$]1.00", "escalate.reference"),
        (Budgets(run_usd=99, day_usd=2), "of the day's budget of [$]2.00 are [$]2.0000 left", "escalate.reference"),
        (Budgets(run_usd=99, month_usd=3), "of the month's budget of [$]3.00", "escalate.reference"),
    ],
)
def test_a_budget_that_is_too_small_asks_nothing(here: Judged, budgets: Budgets, says: str, place: str) -> None:
    with Provider(right) as provider:
        with pytest.raises(BudgetError, match=says) as refused:
            ask(here, reference(provider, **PRICES), budgets=budgets)
        assert provider.asked == []
    assert refused.value.place == place
    assert refused.value.fix
    assert spent(here) == 0
    assert ask_free(here)


def ask_free(here: Judged) -> bool:
    """Without prices nothing is reserved, as before."""
    with Provider(right) as provider:
        return ask(here, reference(provider)).metrics["exact_match"] == 1.0


def test_what_was_paid_before_trouble_is_booked_and_the_rest_given_back(here: Judged) -> None:
    submitted(here)

    answered: list[str] = []  # not `provider.asked`: on a busy machine four are asked before the first is answered

    def answer(body: dict[str, Any], _: int) -> Choice | Refusal:
        if len(answered) == 8:
            return Refusal(402, "pay")
        answered.append(right(body))
        return Choice(answered[-1], usage=(100, 10))

    with Provider(answer) as provider, pytest.raises(Trouble, match="no money left"):
        ask(here, reference(provider, **PRICES), budgets=Budgets(run_usd=100))
    # Questions under way when it ended, three at most, may have been answered: they count as the most.
    assert 8 * 0.2 - 1e-6 <= spent(here) <= 8 * 0.2 + 3 * MOST[1]
    assert reservations(here.store, time.time()) == []


def test_an_answer_that_cannot_be_used_costs_as_much(here: Judged) -> None:
    with Provider(lambda body, _: Choice("", "length", (50, 32))) as provider, pytest.raises(EngineError):
        ask(here, reference(provider, **PRICES), budgets=Budgets(run_usd=100))
    assert spent(here) == pytest.approx(len(provider.asked) * (50 * 1000 + 32 * 10_000) / 1e6)


def test_without_the_money_the_escalation_is_undecided_and_says_why(here: Judged) -> None:
    with Provider(right) as provider:
        bench, plan = prepared(here, 0.3, reference(provider, **PRICES))
        bench = replace(bench, settings=Settings(budgets=Budgets(run_usd=99, day_usd=0.5)))
        with pytest.raises(BudgetError) as refused:
            asyncio.run(_compared(bench, "m-1", plan, VERDICT))
        assert provider.asked == []
    said = told(_undecided(bench, "m-1", refused.value))
    assert said.startswith(
        "no escalation, because it could not be decided: escalate.reference: asking gpt-canned may cost"
    )


def prepared(here: Judged, score: float, asked: ReferenceModel | float, **keys: Any) -> tuple[Bench, dict[str, Any]]:
    """A run that has judged its version; what `plan` gave it."""
    terms = {"to": "recipes/a100.yaml", "max_usd": 50, "reference": asked, **keys}
    body = {**here.recipe().model_dump(mode="json"), "escalate": terms}
    if isinstance(asked, ReferenceModel):
        terms["reference"] = asked.model_dump()
    other = here.project.root / "recipes" / "a100.yaml"
    other.parent.mkdir(exist_ok=True)
    other.write_text("kind: finetune\nmodel: m\nbase: org/base\ndata: {path: datasets/tickets}\n"
                     "evaluate: {task: label}\nbudget: {max_usd: 20}\n", encoding="utf-8")  # fmt: skip
    with here.store.writing() as connection:
        runs.submit_within(connection, "m-1", body, "recipes/m.yaml", "d")
    runs.note_result(here.store, "m-1", scores={"candidate": {"exact_match": score, "macro_f1": 0.9}})
    shutil.copytree(here.unpacked(), here.project.job_folder("m-1") / "data")
    plan = {"base": BASE.as_dict(), "dataset": {"hash": here.pinned.hash}}
    return Bench(here.project, here.store, Settings()), plan


VERDICT = {"id": 7, "model": "m", "version": 1, "outcome": "fail"}


@pytest.mark.parametrize(("score", "outcome"), [(0.3, "wanted"), (0.36, "not needed")])
def test_the_gates_metric_is_compared_with_what_the_reference_got(here: Judged, score: float, outcome: str) -> None:
    with Provider(half_right) as provider:
        bench, plan = prepared(here, score, reference(provider))
        found = asyncio.run(_compared(bench, "m-1", plan, VERDICT))
    assert (found["outcome"], found["metric"], found["score"]) == (outcome, "exact_match", score)
    assert (found["reference"], found["reference_model"], found["limit"]) == (0.5, MODEL, 0.35)
    assert found["max_usd"] == 20, "the other recipe's own budget is the smaller one"
    assert bench.run("m-1").stage.startswith(f"asking {MODEL} ")


def test_a_number_is_a_reference_too_and_a_recipe_that_is_gone_is_told_before_anybody_is_asked(here: Judged) -> None:
    bench, plan = prepared(here, 0.3, 0.5, when="score < 0.5 * reference")
    assert asyncio.run(_compared(bench, "m-1", plan, VERDICT))["outcome"] == "not needed"
    with Provider(right) as provider:
        bench, plan = prepared(replace_home(here), 0.3, reference(provider))
        (here.project.root / "recipes" / "a100.yaml").unlink()
        with pytest.raises(RecipeError, match="no such recipe"):
            asyncio.run(_compared(bench, "m-1", plan, VERDICT))
        assert provider.asked == []


def replace_home(here: Judged) -> Judged:
    project = replace(here.project, home=here.project.root / "another-home")
    return replace(here, project=project, store=open_store(project))
