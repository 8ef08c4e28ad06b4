"""What finished runs really took, kept for the next plans: by card, base model and training stack."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from registry.geometry import Geometry
from registry.plan import Wish
from registry.plan_calibration import Measured
from registry.store import Store, dump
from registry.train_memory import Training, training_of
from registry.train_time import padded_length

NEWEST = 200


def note_measured(store: Store, run_id: str, row: Measured) -> None:
    """Once for each run: what is said the second time (after a crash) replaces the first."""
    body = {name: value for name, value in row.as_dict().items() if name not in ("card", "model", "stack")}
    with store.writing() as connection:
        connection.execute(
            "INSERT INTO measured (run_id, card, model, stack, created, body) VALUES (?,?,?,?,?,?) "
            "ON CONFLICT (run_id) DO UPDATE SET card = excluded.card, model = excluded.model, stack = excluded.stack, "
            "created = excluded.created, body = excluded.body",
            (run_id, row.card, row.model, row.stack, time.time(), dump(body)),
        )


def measured(store: Store, *, card: str = "", model: str = "", stack: str = "") -> list[Measured]:
    """The newest first, of that card, base and stack where they are given. Rows of another ft that a plan cannot use
    are left out."""
    given = {name: value for name, value in (("card", card), ("model", model), ("stack", stack)) if value}
    where = "".join(f"{'AND' if at else 'WHERE'} {name} = ? " for at, name in enumerate(given))
    rows = store.read(
        f"SELECT card, model, stack, body FROM measured {where}ORDER BY created DESC LIMIT ?",
        (*given.values(), NEWEST),
    )
    return [found for row in rows if (found := _measured(**row))]


def of_result(wish: Wish, card: str, memory: int, result: Mapping[str, Any]) -> Measured | None:
    """What a finished training's result.json says for the next plan; None if it says nothing.

    `card` is the card's title ('cpu', or RunPod's id of it), `memory` its bytes. `train_seconds` and `tokens` (padding
    not counted) are both of the last attempt alone, so steps are counted in tokens and not by their numbers.
    """
    batch, tokens, seconds = int(result.get("batch") or 0), result.get("tokens"), result.get("train_seconds")
    peak = result.get("peak_memory")
    if not batch or not wish.rows or not (peak or (tokens and seconds)):
        return None
    batches = tokens / (batch * wish.tokens / wish.count) if tokens else 0.0
    return Measured(
        card=card, model=wish.model, stack=wish.stack, geometry=wish.geometry,
        training=training_of(wish.train, batch=batch, longest=wish.longest, stack=wish.stack),
        peak=int(peak) if peak else None, step_seconds=seconds / batches if seconds and batches else None,
        usual_length=padded_length(wish.sequences, 1 if wish.train.packing else batch), memory=memory,
    )  # fmt: skip


def _measured(card: str, model: str, stack: str, body: str) -> Measured | None:
    found = json.loads(body)
    try:
        training = Training(**found.pop("training"))
        targets = training.targets if isinstance(training.targets, str) else tuple(training.targets)
        shape = Geometry(**found.pop("geometry"))
        return Measured(card, model, stack, shape, replace(training, targets=targets), **found)
    except (KeyError, TypeError):
        return None
