"""What is paid for by use and not by the hour: the questions to a reference (docs/escalation.md).

As with a rental, the money is reserved in one transaction before the first question, and what was really used is
written down answer by answer. A reservation counts while its run is on; what was spent counts for ever.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from registry import budgets as decide
from registry.budgets import Refused
from registry.cloud_terms import Budgets
from registry.errors import BudgetError
from registry.spending import book, tell_refusal, warn_within
from registry.store import Store


@dataclass(frozen=True)
class Payer:
    """The run that pays, its recipe, and what they may spend; `max_usd` is the recipe's own budget."""

    store: Store
    run_id: str
    recipe: str
    budgets: Budgets
    max_usd: float | None = None


@dataclass(frozen=True)
class Charge:
    """An open reservation, from which is spent."""

    store: Store
    key: str

    def spend(self, usd: float) -> None:
        """More than was reserved is written down all the same: it is paid already."""
        with self.store.writing() as connection:
            connection.execute("UPDATE charges SET usd = usd + ? WHERE key = ?", (usd, self.key))


@contextmanager
def reserved(payer: Payer, what: str, usd: float) -> Iterator[Charge]:
    """So much, kept until the block ends, whatever ends it. `what` is named in errors.

    Raises BudgetError where the run, the day or the month has not so much left, or where nothing says what a run may
    cost.
    """
    charge = _reserve(payer, what, usd)
    try:
        yield charge
    finally:
        with payer.store.writing() as connection:
            connection.execute("UPDATE charges SET ended = ? WHERE key = ?", (time.time(), charge.key))


def _reserve(payer: Payer, what: str, usd: float) -> Charge:
    now, key = time.time(), f"{payer.run_id}/{secrets.token_hex(4)}"
    cap_usd = decide.run_cap(payer.max_usd, payer.budgets, payer.recipe)
    with payer.store.writing() as connection:
        # Of a worker that was killed meanwhile: this is the same questions again.
        connection.execute("UPDATE charges SET ended = ? WHERE run_id = ? AND ended IS NULL", (now, payer.run_id))
        rows = book(connection.execute, now, payer.run_id)
        over = decide.beyond(usd, decide.caps(payer.run_id, cap_usd, payer.budgets, *rows, now))
        if over is None:
            connection.execute(
                "INSERT INTO charges (key, run_id, recipe, what, reserved_usd, created) VALUES (?,?,?,?,?,?)",
                (key, payer.run_id, payer.recipe, what, usd, now),
            )
            warn_within(connection, decide.period_caps(payer.budgets, *book(connection.execute, now), now))
    if over:
        tell_refusal(payer.store, payer.run_id, over, now)
        raise _refusal(what, over)
    return Charge(payer.store, key)


def _refusal(what: str, over: Refused) -> BudgetError:
    cap = over.cap
    raised = "`budget.max_usd` in the recipe" if cap.scope == "run" else f"`budgets.{cap.scope}_usd` in ft.yaml"
    return BudgetError(
        f"{what} may cost ${over.wanted_usd:.4f}, and of the {cap.scope}'s budget of ${cap.cap_usd:.2f} are "
        f"${cap.left_usd:.4f} left", place="escalate.reference",
        fix=f"raise {raised}, or ask about fewer rows (`data.max_test`); `ft cost` shows what was spent",
    )  # fmt: skip
