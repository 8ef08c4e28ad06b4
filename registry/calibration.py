"""What finished runs really took: the planner's own measurements, by card, base model and training stack."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from registry.store import Store, dump

SHOWN = 200
_COLUMNS = ("run_id", "card", "model", "stack", "created")


@dataclass(frozen=True)
class Measured:
    """One training. `card` is the card's title, `model` the base's source, `stack` as registry/train_memory.py has it.

    `peak_memory` in bytes (of the process, on a CPU); `longest` is the longest row in tokens, and `tokens` what was
    trained on in `seconds`, padding not counted.
    """

    run_id: str
    card: str
    model: str
    stack: str
    peak_memory: int
    tokens: int
    seconds: float
    batch: int
    longest: int
    max_length: int
    rank: int
    quantize: str
    checkpointing: bool = True
    created: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def note_measured(store: Store, row: Measured) -> None:
    """Once for each run: what it says the second time (after a crash) replaces what it said."""
    body = {name: value for name, value in asdict(row).items() if name not in _COLUMNS}
    with store.writing() as connection:
        connection.execute(
            "INSERT INTO measured (run_id, card, model, stack, created, body) VALUES (?,?,?,?,?,?) "
            "ON CONFLICT (run_id) DO UPDATE SET card = excluded.card, model = excluded.model, stack = excluded.stack, "
            "created = excluded.created, body = excluded.body",
            (row.run_id, row.card, row.model, row.stack, row.created or time.time(), dump(body)),
        )


def measured(store: Store, *, card: str = "", model: str = "", stack: str = "") -> list[Measured]:
    """The newest first, of that card, base and stack where they are given. A row of an older ft that lacks something
    that a plan needs is left out."""
    given = {name: value for name, value in (("card", card), ("model", model), ("stack", stack)) if value}
    where = "".join(f"{'AND' if at else 'WHERE'} {name} = ? " for at, name in enumerate(given))
    rows = store.read(
        f"SELECT run_id, card, model, stack, created, body FROM measured {where}ORDER BY created DESC LIMIT ?",
        (*given.values(), SHOWN),
    )
    return [found for row in rows if (found := _measured(row))]


def _measured(row: dict[str, Any]) -> Measured | None:
    body = json.loads(row.pop("body"))
    known = {name: value for name, value in body.items() if name in Measured.__dataclass_fields__}
    try:
        return Measured(**known, **row)
    except TypeError:
        return None
