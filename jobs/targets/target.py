"""What every target can do. A target only starts a trainer, watches its folder and can stop it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

State = Literal["waiting", "running", "done", "lost"]


@dataclass(frozen=True)
class Poll:
    """How a job is: `result` when done; `note` says what it waits for, or how it was lost."""

    state: State
    result: dict[str, Any] | None = None
    note: str = ""


class Target(Protocol):
    """Each verb is idempotent by job folder, so a step that is repeated after a crash does no harm."""

    def launch(self, folder: Path) -> bool:
        """See to it that a trainer works on the job, unless one does or it is done. True if one was started."""
        ...

    def poll(self, folder: Path) -> Poll: ...

    def waits_for(self, folder: Path) -> str:
        """For people: what keeps a trainer from starting, or that it starts."""
        ...

    def fetch(self, folder: Path, target: Path) -> None:
        """Put the accepted adapter into `target`."""
        ...

    def cancel(self, folder: Path, reason: str) -> None:
        """Ask for checkpoint-then-stop, and return when the trainer is really gone."""
        ...
