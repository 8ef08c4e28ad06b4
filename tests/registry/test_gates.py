"""The gate's outcomes and numbers, from scores made by hand."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.adapters import Verdict
from registry.errors import RecipeError, Trouble
from registry.gate_report import report
from registry.gates import Judgement, judge
from registry.recipe import Gate
from registry.resampling import label_table, paired_difference, score
from registry.scores import Scored


def labelled(subject: str, right: list[int], version: int | None = None, failed: list[int] | None = None) -> Scored:
    """A score over 4 labels; where `right` is 0 the answer is the next label."""
    labels = [str(at % 4) for at in range(len(right))]
    said = [label if ok else str((int(label) + 1) % 4) for label, ok in zip(labels, right, strict=True)]
    values = [float(each) for each in right]
    metrics = {"exact_match": sum(values) / len(values)}
    pairs = [list(pair) for pair in zip(labels, said, strict=True)]
    return Scored(subject, version, "rows", metrics, {"exact_match": values}, pairs, failed or [])


def outcomes(judged: Judgement) -> dict[str, str]:
    return {check.name: check.outcome for check in judged.checks}


GOOD, BAD = labelled("m@2", [1] * 36 + [0] * 4, 2), labelled("base", [0] * 36 + [1] * 4)


def test_a_version_far_above_the_base_passes() -> None:
    judged = judge(Gate(min=0.7, beat_base_by=0.4), "label", GOOD, None, BAD)
    assert judged.outcome == "pass"
    assert outcomes(judged) == {"min": "pass", "beat_base_by": "pass", "not_worse": "pass"}
    body = judged.body
    assert body["champion"] is None
    assert (body["metric"], body["rows"], body["resamples"], body["reference"]) == ("exact_match", 40, 2000, "base")
    assert body["difference"] == pytest.approx(0.8)
    assert body["interval"][0] < 0.8 < body["interval"][1]
    assert body["failures"] == {"candidate": 0, "base": 0}
    assert body["scores"]["candidate"] == {"exact_match": 0.9}
    assert json.loads(json.dumps(body)) == body


def test_each_check_can_fail_alone() -> None:
    assert outcomes(judge(Gate(min=0.95), "label", GOOD, None, BAD))["min"] == "fail"
    assert outcomes(judge(Gate(beat_base_by=0.85), "label", GOOD, None, BAD))["beat_base_by"] == "fail"
    champion = labelled("m@1", [1] * 40, 1)
    worse = labelled("m@2", [1] * 20 + [0] * 20, 2)
    judged = judge(Gate(min=0.4), "label", worse, champion, BAD)
    assert outcomes(judged) == {"min": "pass", "not_worse": "fail"}
    assert (judged.outcome, judged.body["champion"], judged.body["reference"]) == ("fail", 1, "champion")


def test_a_threshold_is_met_exactly() -> None:
    assert judge(Gate(min=0.9, beat_base_by=0.8), "label", GOOD, None, BAD).outcome == "pass"


def test_too_few_rows_are_undecided_and_say_how_many_would_do() -> None:
    champion = labelled("m@1", [1] * 30 + [0] * 10, 1)
    candidate = labelled("m@2", [0] * 2 + [1] * 29 + [0] * 9, 2)
    judged = judge(Gate(may_lose=0.02), "label", candidate, champion, BAD)
    assert judged.outcome == "undecided"
    low, high = judged.body["interval"]
    assert low < -0.02 < high
    assert "cannot be told from luck" in judged.checks[-1].text
    assert judge(Gate(may_lose=0.2), "label", candidate, champion, BAD).outcome == "pass"


def test_it_is_the_interval_that_must_clear_the_margin_not_the_score() -> None:
    champion = labelled("m@1", [1] * 30 + [0] * 10, 1)
    equal = labelled("m@2", [0] * 5 + [1] * 30 + [0] * 5, 2)
    judged = judge(Gate(may_lose=0.05), "label", equal, champion, BAD)
    assert (judged.body["difference"], judged.outcome) == (0.0, "undecided")


def test_rows_are_drawn_for_both_alike() -> None:
    """The same answers differ by nothing on any draw, however many of them are wrong."""
    half = labelled("m@1", [1, 1, 1, 0, 0, 0, 1, 0], 1)
    for metric in ("exact_match", "macro_f1"):
        found = paired_difference(metric, half, half, confidence=0.99, seed=1)
        assert (found.low, found.high, found.detectable) == (0.0, 0.0, 0.0)


def test_fail_beats_undecided() -> None:
    champion = labelled("m@1", [1] * 30 + [0] * 10, 1)
    candidate = labelled("m@2", [0] * 2 + [1] * 29 + [0] * 9, 2)
    assert judge(Gate(may_lose=0.02, min=0.99), "label", candidate, champion, BAD).outcome == "fail"


def test_a_champion_that_could_not_be_asked_leaves_it_undecided() -> None:
    champion = Scored("m@1", 1, missing="it stands on another base model")
    judged = judge(Gate(min=0.5), "label", GOOD, champion, BAD)
    assert (judged.outcome, judged.body["champion"], judged.body["interval"]) == ("undecided", 1, None)
    assert "another base model" in judged.checks[-1].text


def test_failures_of_the_reference_do_not_help_the_candidate() -> None:
    candidate = labelled("m@2", [1] * 30 + [0] * 10, 2)
    down = labelled("m@1", [0] * 35 + [1] * 5, 1, failed=list(range(35)))
    assert judge(Gate(), "label", candidate, down, BAD).outcome == "fail"
    for metric in ("exact_match", "macro_f1"):
        assert score(metric, down.with_failures_forgiven()) == 1.0
    base_down = labelled("base", [0] * 40, failed=list(range(40)))
    assert outcomes(judge(Gate(beat_base_by=0.1), "label", candidate, None, base_down))["beat_base_by"] == "fail"


def test_failures_of_the_candidate_count_as_wrong() -> None:
    failing = labelled("m@2", [0] * 20 + [1] * 20, 2, failed=list(range(20)))
    judged = judge(Gate(min=0.9), "label", failing, None, BAD)
    assert (judged.outcome, judged.body["failures"]["candidate"]) == ("fail", 20)


def test_what_cannot_be_judged_is_an_error() -> None:
    with pytest.raises(RecipeError, match="token_f1 does not belong to task label"):
        judge(Gate(metric="token_f1"), "label", GOOD, None, BAD)
    with pytest.raises(Trouble, match="different rows"):
        judge(Gate(), "label", GOOD, None, labelled("base", [1] * 39))
    with pytest.raises(Trouble, match="nothing to judge"):
        judge(Gate(), "label", Scored("m@2", 2), None, BAD)


def test_the_same_scores_give_the_same_verdict() -> None:
    gate = Gate(metric="macro_f1", may_lose=0.01)
    assert judge(gate, "label", GOOD, None, BAD) == judge(gate, "label", GOOD, None, BAD)


def _plain_macro_f1(pairs: list[list[str]]) -> float:
    """As in any textbook, over the labels that are expected."""
    scores = []
    for label in {right for right, _ in pairs}:
        hit = sum(right == said == label for right, said in pairs)
        missed = sum(right == label != said for right, said in pairs)
        false = sum(said == label != right for right, said in pairs)
        scores.append(2 * hit / (2 * hit + missed + false))
    return sum(scores) / len(scores)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcx")), min_size=1, max_size=60))
def test_macro_f1_is_the_textbooks(pairs: list[tuple[str, str]]) -> None:
    given_pairs = [list(pair) for pair in pairs]
    mine = float(label_table(given_pairs).macro_f1(np.ones((1, len(pairs))))[0])
    assert mine == pytest.approx(_plain_macro_f1(given_pairs))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab")), min_size=2, max_size=30), st.data())
def test_macro_f1_of_a_draw_is_that_of_the_drawn_rows(pairs: list[tuple[str, str]], data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=30))
    weights = np.bincount(drawn, minlength=len(pairs)).astype(float)[None]
    mine = float(label_table([list(pair) for pair in pairs]).macro_f1(weights)[0])
    assert mine == pytest.approx(_plain_macro_f1([list(pairs[at]) for at in drawn]))


def test_the_interval_is_the_normal_one_where_that_is_known() -> None:
    chance = random.Random(3)
    ours = Scored("a", 1, values={"token_f1": [chance.gauss(0.6, 0.2) for _ in range(2000)]})
    theirs = Scored("b", 2, values={"token_f1": [chance.gauss(0.5, 0.2) for _ in range(2000)]})
    found = paired_difference("token_f1", ours, theirs, confidence=0.9, seed=1)
    differences = [a - b for a, b in zip(ours.values["token_f1"], theirs.values["token_f1"], strict=True)]
    mean = sum(differences) / 2000
    error = math.sqrt(sum((each - mean) ** 2 for each in differences) / 2000 / 2000)
    assert found.measured == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.645 * error, abs=error / 5)
    assert found.high == pytest.approx(mean + 1.645 * error, abs=error / 5)
    assert found.detectable == pytest.approx((1.645 + 0.842) * error, rel=0.05)


def test_equal_versions_pass_about_as_often_as_the_interval_promises() -> None:
    """False alarms: of two equally good models, hardly any is called worse, and a much worse one hardly passes."""
    chance, called_worse, let_through = random.Random(7), 0, 0
    for _ in range(120):
        champion = labelled("m@1", [int(chance.random() < 0.8) for _ in range(60)], 1)
        equal = labelled("m@2", [int(chance.random() < 0.8) for _ in range(60)], 2)
        much_worse = labelled("m@3", [int(chance.random() < 0.55) for _ in range(60)], 3)
        called_worse += judge(Gate(may_lose=0.0), "label", equal, champion, champion).outcome == "fail"
        let_through += judge(Gate(may_lose=0.02), "label", much_worse, champion, champion).outcome == "pass"
    assert called_worse <= 0.12 * 120
    assert let_through <= 2


def verdict(judged: Judgement) -> Verdict:
    return Verdict(1, "m", 2, judged.outcome, judged.body, None, 0.0)


def test_reports_carry_the_whole_verdict() -> None:
    import xml.etree.ElementTree as ET

    champion = labelled("m@1", [1] * 40, 1)
    judged = judge(Gate(min=0.5), "label", labelled("m@2", [1] * 20 + [0] * 20, 2), champion, BAD)
    text = report(verdict(judged), "markdown")
    assert "## m@2 fails" in text
    assert "| champion | 1.000 | 0 |" in text
    suite = ET.fromstring(report(verdict(judged), "junit"))
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert suite.find("testcase[@name='min']/failure") is None
    assert suite.find("testcase[@name='not_worse']/failure") is not None
    assert json.loads(report(verdict(judged), "json"))["body"] == judged.body


def test_a_report_survives_what_a_model_may_say() -> None:
    import xml.etree.ElementTree as ET

    body = {"checks": [{"name": "min", "outcome": "undecided", "text": "a|b <&> \x00\ufffe 한글\n]]>"}]}
    said = Verdict(1, "m", 2, "undecided", body, None, 0.0)
    suite = ET.fromstring(report(said, "junit"))
    assert suite.get("failures") == "1"
    assert "a\\|b <&>" in report(said, "markdown")
