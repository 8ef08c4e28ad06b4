"""What is changed when a job is tried again by itself, and when it is not. Pure.

Bad data and a full disk stay as they are however often one tries, so they are never tried again.
"""

from __future__ import annotations

from typing import Any

from registry.run_control import Retries

# Classes of failure that a recipe's `retries` knows; `lost` leaves no result, and is counted by who watches.
CLASSES = ("out_of_memory", "crash", "diverged")


def next_attempt(
    retries: Retries, train: dict[str, Any], result: dict[str, Any], after: int, before: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """What is different in the attempt after the failed `result` of trainer `after`; None if there is none.

    `train` is the recipe's section as it was used, `before` are the attempts up to now. Of what is returned, `train`
    holds the changed keys; `anew` says that checkpoints of earlier trainers do not help.
    """
    kind = str(result.get("class"))
    if kind not in CLASSES or sum(each["class"] == kind for each in before) >= getattr(retries, kind):
        return None
    found = {"after": after, "class": kind, "train": {}, "anew": False}
    if kind == "out_of_memory":
        smaller = smaller_batch(train["batch"], train["accumulate"])
        return {**found, "train": smaller} if smaller else None
    if kind == "diverged":
        return {**found, "train": {"learning_rate": train["learning_rate"] / 2}, "anew": True}
    return found


def smaller_batch(batch: int, accumulate: int) -> dict[str, int] | None:
    """Half of the batch or less, with as many rows in a step as before, so that checkpoints fit; None at batch 1."""
    rows = batch * accumulate
    found = next((each for each in range(batch // 2, 0, -1) if rows % each == 0), None)
    return {"batch": found, "accumulate": rows // found} if found else None


def advice(kind: str, train: dict[str, Any]) -> str:
    """The next step for a person, where a job failed for good."""
    if kind == "out_of_memory" and train["batch"] == 1:
        return f"train.batch is 1 already: {', '.join(_less_memory(train))}, or take a smaller base or a larger card"
    return {
        "bad_data": "change the dataset or the recipe, then `ft run` again",
        "bad_input": "change the dataset or the recipe, then `ft run` again",
        "disk_full": "free disk space, then `ft resume`: the last checkpoint was kept",
        "out_of_memory": "lower train.batch (and raise train.accumulate by as much)",
        "diverged": "lower train.learning_rate",
        "stopped": "`ft resume` goes on from the checkpoint; of a pod whose money was used up raise the budget before",
    }.get(kind, "read the log with `ft logs`, then `ft resume`")


def _less_memory(train: dict[str, Any]) -> list[str]:
    """What of the recipe takes memory that it need not take, the largest part first."""
    knobs = {
        "set train.quantize to nf4": train.get("quantize") == "none",
        "set train.checkpointing to true": train.get("checkpointing") is False,
        "set train.packing to false": train.get("packing") is True,
        "shorten the longest rows and lower train.max_length": True,
        "on a GPU set train.optimizer to paged_adamw_8bit": train.get("optimizer", "adamw") == "adamw",
        "lower train.lora.rank": True,
    }
    return [knob for knob, helps in knobs.items() if helps]
