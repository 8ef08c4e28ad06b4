"""What is changed when a job is tried again by itself."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.retries import advice, next_attempt, smaller_batch
from registry.run_control import Retries

TRAIN = {"batch": 8, "accumulate": 2, "learning_rate": 2e-4}


def change(kind: str, before: int = 0, **retries: int) -> dict[str, Any] | None:
    past = [{"class": kind}] * before + [{"class": "another"}]
    return next_attempt(Retries(**retries), TRAIN, {"status": "failed", "class": kind}, 4, past)


@pytest.mark.parametrize(
    ("batch", "accumulate", "then"),
    [
        (8, 1, {"batch": 4, "accumulate": 2}),
        (4, 2, {"batch": 2, "accumulate": 4}),
        (6, 1, {"batch": 3, "accumulate": 2}),
        (5, 1, {"batch": 1, "accumulate": 5}),
        (9, 1, {"batch": 3, "accumulate": 3}),
        (5, 2, {"batch": 2, "accumulate": 5}),
        (2, 3, {"batch": 1, "accumulate": 6}),
        (1, 8, None),
    ],
)
def test_a_step_has_as_many_rows_as_before(batch: int, accumulate: int, then: dict[str, int] | None) -> None:
    assert smaller_batch(batch, accumulate) == then
    assert then is None or then["batch"] * then["accumulate"] == batch * accumulate


def test_out_of_memory_takes_a_smaller_batch_so_many_times() -> None:
    found = {"after": 4, "class": "out_of_memory", "train": {"batch": 4, "accumulate": 4}, "anew": False}
    assert change("out_of_memory") == found
    assert change("out_of_memory", before=2) == found
    assert change("out_of_memory", before=3) is None
    assert change("out_of_memory", out_of_memory=0) is None
    assert next_attempt(Retries(), {**TRAIN, "batch": 1}, {"class": "out_of_memory"}, 4, []) is None
    assert "train.batch is 1 already" in advice("out_of_memory", {"batch": 1})
    assert "lower train.batch" in advice("out_of_memory", {"batch": 2})


def test_an_unknown_error_is_tried_once_more_from_the_checkpoint() -> None:
    assert change("crash") == {"after": 4, "class": "crash", "train": {}, "anew": False}
    assert change("crash", before=1) is None


def test_what_diverged_starts_anew_more_slowly_where_the_recipe_says_so() -> None:
    assert change("diverged") is None
    found = change("diverged", diverged=1)
    assert found is not None
    assert (found["train"], found["anew"]) == ({"learning_rate": 1e-4}, True)


def test_where_one_row_is_too_much_the_advice_names_what_is_not_yet_done() -> None:
    saving = {"quantize": "nf4", "checkpointing": True, "optimizer": "paged_adamw_8bit"}
    lavish = {"quantize": "none", "checkpointing": False, "optimizer": "adamw"}
    said = advice("out_of_memory", {"batch": 1, **lavish})
    for knob in ("train.quantize to nf4", "train.checkpointing to true", "train.optimizer to paged_adamw_8bit"):
        assert knob in said
        assert knob not in advice("out_of_memory", {"batch": 1, **saving})
    assert "lower train.max_length" in advice("out_of_memory", {"batch": 1, **saving})
    assert "train.packing to false" in advice("out_of_memory", {"batch": 1, "packing": True})
    assert "train.packing" not in said


@pytest.mark.parametrize("kind", ["bad_data", "bad_input", "disk_full", "None", "lost", "unheard-of"])
def test_what_does_not_help_is_not_tried(kind: str) -> None:
    assert change(kind, out_of_memory=9, crash=9, diverged=9, lost=9) is None
