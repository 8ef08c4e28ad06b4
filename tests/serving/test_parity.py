"""The parity judgement, by numbers as they were measured with real adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from registry.errors import AdmissionError
from serving.parity import Fingerprint, Measured, judge_parity, read_fingerprint

PROMPT = [1, 2, 3]


def fingerprint(*, train: float, base: float, bf16: float | None = None, bf16_base: float | None = None) -> Fingerprint:
    """One sample of four tokens whose adapter says `train` (and `bf16`) and whose base says the others."""

    def logprobs(of_train: float, of_bf16: float | None) -> dict[str, Any]:
        return {"train": [of_train] * 4, "bf16": None if of_bf16 is None else [of_bf16] * 4}

    sample = {
        "messages": [{"role": "user", "content": "hi"}],
        "prompt_ids": PROMPT,
        "continuation_ids": [4, 5, 6, 7],
        "logprobs": logprobs(train, bf16),
        "base_logprobs": logprobs(base, bf16_base),
    }
    return Fingerprint.model_validate({"template_sha256": "0" * 64, "precision": "nf4", "samples": [sample]})


def served(value: float) -> list[Measured]:
    return [Measured(PROMPT, [value] * 4)]


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (-0.10, "pass"),  # bf16 as seen: 0.006 to 0.04
        (-0.19, "pass"),
        (-0.21, "fail"),  # more than 0.10 off the bf16 reference
        (-5.0, "fail"),  # the bare base
        (math.nan, "fail"),
    ],
)
def test_against_bf16(said: float, outcome: str) -> None:
    print_of = fingerprint(train=-0.15, base=-5.0, bf16=-0.10, bf16_base=-5.0)
    assert judge_parity(print_of, served(said)).outcome == outcome


@pytest.mark.parametrize(
    ("said", "base", "outcome"),
    [
        (-0.6, -5.0, "pass"),  # NF4 against bf16 as seen: 0.07 to 0.5
        (-1.05, -5.0, "pass"),
        (-1.2, -5.0, "fail"),  # more than 1.0
        (-1.0, -3.0, "fail"),  # more than a quarter of the base's distance
        (-0.5, -1.0, "undecided"),  # the adapter hardly differs from its base
        (-0.1, -0.1, "undecided"),  # it does not differ at all
        (-1.5, -0.2, "fail"),  # hardly differs, and far off all the same
    ],
)
def test_against_training_precision(said: float, base: float, outcome: str) -> None:
    found = judge_parity(fingerprint(train=-0.1, base=base), served(said))
    assert found.outcome == outcome
    assert found.numbers["train_distance"] == pytest.approx(abs(said + 0.1))


def test_an_adapter_like_its_base_is_undecided_also_in_bf16() -> None:
    print_of = fingerprint(train=-0.1, base=-0.12, bf16=-0.1, bf16_base=-0.12)
    assert judge_parity(print_of, served(-0.1)).outcome == "undecided"


def test_bf16_decides_though_training_in_nf4_said_something_else() -> None:
    print_of = fingerprint(train=-1.3, base=-5.0, bf16=-0.1, bf16_base=-5.0)
    found = judge_parity(print_of, served(-0.12))
    assert found.outcome == "pass"
    assert found.numbers["train_distance"] == pytest.approx(1.18)


def test_a_base_in_4_bits_is_held_to_what_training_in_nf4_said() -> None:
    print_of = fingerprint(train=-1.3, base=-9.0, bf16=-0.1, bf16_base=-5.0)
    assert judge_parity(print_of, served(-1.4), in_4_bits=True).outcome == "pass"
    assert judge_parity(print_of, served(-1.4)).outcome == "fail", "a base in 16 bits must be near to bf16"
    assert judge_parity(print_of, served(-9.0), in_4_bits=True).outcome == "fail", "the bare base"


def test_other_prompt_tokens_fail() -> None:
    found = judge_parity(fingerprint(train=-0.1, base=-5.0), [Measured([1, 2], [])])
    assert found.outcome == "fail"
    assert found.numbers["prompts_differing"] == 1


def test_a_token_without_a_score_fails() -> None:
    assert judge_parity(fingerprint(train=-0.1, base=-5.0), [Measured(PROMPT, [-0.1])]).outcome == "fail"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"samples": []}', "\x80"])
def test_a_broken_fingerprint_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "fingerprint.json").write_text(text, encoding="latin-1")
    with pytest.raises(AdmissionError, match="fingerprint"):
        read_fingerprint(tmp_path)


def test_a_missing_or_lopsided_fingerprint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdmissionError, match="no fingerprint"):
        read_fingerprint(tmp_path)
    content = fingerprint(train=-0.1, base=-5.0).model_dump()
    content["samples"][0]["logprobs"]["train"] = [-0.1]
    (tmp_path / "fingerprint.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(AdmissionError, match="one per continuation token"):
        read_fingerprint(tmp_path)
