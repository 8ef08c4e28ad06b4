"""What the server made of a promotion: it serves the version, or refuses it and the champion goes back."""

from __future__ import annotations

from typing import Any

from jobs.steps import Bench, State
from registry import adapters
from registry.errors import EngineError
from registry.events import by_run, newest


def what_server_said(bench: Bench, subject: str) -> dict[str, Any] | None:
    """The last `adapter.served` or `adapter.refused` of MODEL@N since it was promoted, as type and data."""
    since = bench.promoted_at(subject)
    answers = [newest(bench.store, 1, type_=each, subject=subject) for each in ("adapter.served", "adapter.refused")]
    said = sorted((event for each in answers for event in each if event.time >= since), key=lambda event: event.seq)
    return {"type": said[-1].type, "data": said[-1].data} if said else None


def take_back(bench: Bench, run_id: str, moved: State, reason: dict[str, Any]) -> None:
    """Make the champion before it answer again. Raises EngineError, always: the run has failed."""
    subject = f"{moved['model']}@{moved['version']}"
    if moved["from"] is not None:
        adapters.roll_back(
            bench.store, moved["model"], by_whom="ft", reason="the server refused it", cause=by_run(run_id)
        )
    raise EngineError(f"the server refused {subject}: {reason.get('reason', reason)}",
                      fix="`ft serve status` has the numbers; the version before it goes on answering")  # fmt: skip
