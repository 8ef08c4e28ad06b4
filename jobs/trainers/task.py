"""What a backend is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from registry.job_folder import JobFolder
from registry.recipe import Finetune


@dataclass(frozen=True)
class Task:
    """One attempt at a job. `report` takes a progress line, `ship` puts on disk what was reported; `stop` says why to
    stop, None to go on."""

    job: JobFolder
    recipe: Finetune
    base: Path
    base_digest: str
    epoch: int
    report: Callable[[dict[str, Any]], None]
    ship: Callable[[], None]
    stop: Callable[[], str | None]


@dataclass(frozen=True)
class Smoked:
    """What the smoke took: `seconds`, bytes of memory at most, and its batch, `rows` padded to `longest` tokens."""

    seconds: float
    peak_memory: int
    rows: int
    longest: int


@dataclass(frozen=True)
class Trained:
    """How far it came: the adapter lies in `job.work/adapter` when `stopped` is None.

    `tokens` (without padding) and `seconds` are of this attempt's training alone, without loading and evaluating;
    `longest` is the tokens of the longest row or pack, `card` the device's own name, `smoke` None where there was none.
    """

    steps: int
    tokens: int
    loss: float | None
    eval_loss: float | None
    peak_memory: int
    stopped: str | None = None
    seconds: float = 0.0
    longest: int = 0
    card: str = ""
    smoke: Smoked | None = None


class BadData(Exception):
    """The data cannot be trained on as it is; trying again would not help."""


class Backend(Protocol):
    """A module of this package with these two verbs."""

    def train(self, task: Task) -> Trained:
        """Train, from the last complete checkpoint on if there is one; without one the smoke comes first.

        Reports `{"stage": "smoke", ...}` when the smoke begins, and no `step` before it is over.
        """
        ...

    def fingerprint(self, task: Task) -> dict[str, Any]:
        """Prompts, continuations and logprobs of the trained adapter, for the parity probe."""
        ...
