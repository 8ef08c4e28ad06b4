"""`ft gate`, `eval`, `models`, `promote` and `rollback` as a person or a CI job meets them."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.main import main
from registry import adapters
from registry.events import append, new_event
from registry.project import Project
from registry.recipe import Finetune, Gate
from tests.conftest import ROOT
from tests.fakes.answering_engine import AnsweringEngine
from tests.judged_project import LABELS, TEST_ROWS, Judged, make_judged, question_of

# Which questions each model answers rightly.
RIGHT = {"base": range(6), "m@1": range(12), "m@2": range(24), "m@3": range(2, 14), "m@4": range(2)}


def answer(model: str, messages: list[dict[str, str]], _: int) -> str:
    number, label = question_of(messages)
    return label if number in RIGHT[model] else LABELS[(LABELS.index(label) + 1) % len(LABELS)]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """Version 1 is champion; 2 is better, 3 about as good, 4 worse. All have been asked already."""
    here = make_judged(tmp_path_factory.mktemp("gate") / "project")
    strict = here.recipe()
    for number in (1, 2, 3, 4):
        here.add(number, recipe=strict)
    verdict = adapters.add_verdict(here.store, "m", 1, "pass", {"champion": None, "checks": []}, None)
    adapters.promote(here.store, verdict, by_whom="test")
    with AnsweringEngine(answer) as engine, here.server(engine.url):
        done = ft(here, "eval", "m@1", "m@2", "m@3", "m@4", "--base", "--json")
        assert done.code == 0, done.err
    return here


@pytest.fixture
def here(judged: Judged, tmp_path: Path) -> Judged:
    """A copy of the project, so that each test may move aliases."""
    import shutil

    from registry.store import open_store

    root = tmp_path / "project"
    shutil.copytree(judged.project.root, root)
    project = Project(root=root, home=root / ".ft", cache=tmp_path / "cache")
    return Judged(project, open_store(project), judged.pinned)


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def ft(here: Judged, *arguments: str) -> Done:
    """The whole command, in this process; the recipes name a tracker that is away."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("FT_PROJECT", str(here.project.root))
        patch.setenv("FT_CACHE", str(here.project.cache))
        patch.setattr(sys, "argv", ["ft", *arguments])
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Done(code, out.getvalue(), err.getvalue())


def champion(here: Judged) -> int | None:
    return adapters.aliases(here.store, "m").get("champion")


def test_a_better_candidate_passes_and_nothing_is_promoted(here: Judged, tmp_path: Path) -> None:
    out = tmp_path / "gate.xml"
    done = ft(here, "gate", "m@2", "--report", "junit", "--out", str(out), "--report", "markdown")
    assert done.code == 0, done.err
    assert "## m@2 passes" in done.out
    assert "| candidate | 1.000 | 1.000 | 0 |" in done.out
    assert ET.parse(out).getroot().get("failures") == "0"
    verdict = adapters.last_verdict(here.store, "m", 2)
    assert verdict is not None
    assert (verdict.outcome, verdict.body["champion"], verdict.run_id) == ("pass", 1, None)
    assert champion(here) == 1
    assert "MLflow was not told" in done.err


@pytest.mark.parametrize(("number", "outcome"), [(4, "fail"), (3, "undecided")])
def test_what_does_not_pass_holds_a_ci_job_back(here: Judged, number: int, outcome: str) -> None:
    done = ft(here, "gate", f"m@{number}", "--json")
    assert done.code == 3
    said = json.loads(done.out)
    assert (said["outcome"], said["version"]) == (outcome, number)
    assert said["body"]["rows"] == TEST_ROWS
    plain = ft(here, "gate", f"m@{number}")
    assert plain.code == 3
    assert f"m@{number}: {outcome}" in plain.out
    assert "the gate stays closed" in plain.err
    assert "Traceback" not in plain.err


def test_the_candidate_is_judged_where_nothing_is_said(here: Judged) -> None:
    assert json.loads(ft(here, "gate", "m", "--json").out)["version"] == 4


def test_a_version_that_cannot_be_judged_is_exit_1(here: Judged) -> None:
    (here.project.adapter_folder("m", 2) / "MANIFEST.json").write_text("{}", encoding="utf-8")
    with AnsweringEngine(answer) as engine, here.server(engine.url):
        done = ft(here, "gate", "m@2")
        assert engine.calls == []
    assert done.code == 1
    assert "MANIFEST.json" in done.err
    assert adapters.last_verdict(here.store, "m", 2) is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gate", "m@9"], "no version m@9"),
        (["gate", "nobody"], "nobody has no 'candidate'"),
        (["gate", "m@2", "--report", "html"], "no report 'html'"),
        (["gate", "m@2", "--out", "x.xml"], "--out needs a form"),
        (["gate", "m@2", "--report", "json", "--out", "/nowhere/x"], "no such folder"),
        (["gate", "m@2", "--report", "json", "--json"], "only one report can be printed"),
        (["eval", "m@9"], "no version m@9"),
        (["eval", "m@2", "--dataset", "datasets/none"], "no such dataset"),
        (["models", "nobody"], "no model 'nobody'"),
        (["promote", "m@9"], "no version m@9"),
        (["rollback", "m", "--to", "9"], "no version m@9"),
        (["rollback", "m"], "no previous version"),
        (["promote", "m@1"], "champion already"),
    ],
)
def test_wrong_input_is_exit_2_and_changes_nothing(judged: Judged, arguments: list[str], says: str) -> None:
    before = judged.store.read("SELECT * FROM verdicts"), adapters.aliases(judged.store, "m")
    done = ft(judged, *arguments)
    assert done.code == 2, done.err
    assert says in done.err
    assert "Traceback" not in done.err
    assert (judged.store.read("SELECT * FROM verdicts"), adapters.aliases(judged.store, "m")) == before


def test_models_lists_versions_aliases_and_verdicts(here: Judged) -> None:
    assert ft(here, "gate", "m@2").code == 0
    rows = {row["version"]: row for row in json.loads(ft(here, "models", "m", "--json").out)}
    assert rows[1]["aliases"] == ["champion"]
    assert rows[4]["aliases"] == ["candidate"]
    assert (rows[2]["outcome"], rows[3]["outcome"]) == ("pass", "not judged")
    assert rows[2]["scores"]["candidate"]["exact_match"] == 1.0
    text = ft(here, "models").out
    assert "1.000 exact_match" in text
    assert "run-2" in text


def test_promote_asks_for_a_verdict_or_force(here: Judged) -> None:
    done = ft(here, "promote", "m@4")
    assert (done.code, champion(here)) == (3, 1)
    assert "was never judged" in done.err
    assert ft(here, "gate", "m@4").code == 3
    done = ft(here, "promote", "m@4")
    assert (done.code, champion(here)) == (3, 1)
    assert "has no passing verdict (fail)" in done.err
    done = ft(here, "promote", "m@4", "--force", "--reason", "I know better", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert (said["version"], said["from_version"], said["reason"], said["served_after"]) == (
        4,
        1,
        "I know better",
        None,
    )
    assert champion(here) == 4


def test_promote_by_force_without_a_verdict_writes_down_that_nobody_judged(here: Judged) -> None:
    assert ft(here, "promote", "m@3", "--force").code == 0
    verdict = adapters.last_verdict(here.store, "m", 3)
    assert verdict is not None
    assert (verdict.outcome, verdict.body["checks"][0]["name"]) == ("undecided", "forced")


def test_promote_and_rollback_say_what_moved_and_how_long_the_swap_took(here: Judged) -> None:
    assert ft(here, "gate", "m@2").code == 0
    done = ft(here, "promote", "m@2")
    assert "champion of m: version 1 -> version 2" in done.out
    assert "no server is up" in done.out
    with AnsweringEngine(answer) as engine, here.server(engine.url):
        served = _serve_when_moved(here, "m@1")
        done = ft(here, "rollback", "m", "--reason", "rude")
        served.join()
    assert done.code == 0, done.err
    assert "champion of m: version 2 -> version 1" in done.out
    assert "served after " in done.out
    assert adapters.get_version(here.store, "m", 2).rolled_back
    assert adapters.promotions(here.store, "m")[-1].reason == "rude"
    with here.server("http://127.0.0.1:9", state="card given to training"):
        done = ft(here, "promote", "m@3", "--force")
    assert done.code == 0
    assert "as soon as it is back" in done.out
    # A person may bring back what was rolled back.
    assert ft(here, "promote", "m@2").code == 0


def test_eval_prints_scores_of_kept_answers(here: Judged) -> None:
    done = ft(here, "eval", "m@2", "m", "--base")
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert ["m@2", "1.000", "1.000", "24", "0"] in lines
    assert any(line[:2] == ["m@1", "0.500"] for line in lines)
    assert any(line[:3] == ["base", "org/base", "0.250"] for line in lines)


def test_the_workflow_only_writes_verdicts() -> None:
    """.github/workflows/gate.yml: on a runner of one's own, no input in a script, nothing is promoted."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/gate.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["judge"]
    assert "self-hosted" in job["runs-on"]
    assert workflow["permissions"] == {"contents": "read"}
    scripts = [step["run"] for step in job["steps"] if "run" in step]
    assert any(script.startswith("ft gate ") for script in scripts)
    assert not any("promote" in script or "${{" in script for script in scripts)


def test_a_recipes_gate_takes_what_the_gate_knows() -> None:
    assert set(Gate.model_fields) == {"metric", "min", "beat_base_by", "may_lose", "confidence"}
    assert Finetune.model_fields["gate"].default == Gate()


def _serve_when_moved(here: Judged, subject: str) -> Any:
    """What the server's reconciler does: see the move, swap, append the event."""
    import threading
    import time

    def serve() -> None:
        model, _, number = subject.partition("@")
        while champion(here) != int(number):
            time.sleep(0.02)
        append(here.store, new_event("ft/serving", "adapter.served", subject, {"model": model}))

    thread = threading.Thread(target=serve)
    thread.start()
    return thread
