"""Cards: one accelerator with its memory, on this host; `cpu` is a card too.

A card is held by an flock on its file in the shared cache. The lock's descriptor is inherited by the program
that uses the card (a trainer, vLLM), so it is free when that program is really gone, whoever else was killed.
To look is to try the lock as well: a second lock, the guard, is held for that moment, so that who looks is never
taken for a holder, and nobody sees a lock or a marker that is only half made.

Training and serving on one card take turns: who wants it puts a marker beside the lock. A server gives way to a
live `train` marker, except while there is a live `eval` marker: an evaluation needs the engine.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from registry.errors import Trouble, WrongInput
from registry.file_locks import alone, is_held, open_lock, try_exclusive
from registry.project import Project

Purpose = Literal["train", "eval"]


@dataclass(frozen=True)
class Card:
    """`name` as recipes and queues write it ('cpu', 'cuda-0'); memory in bytes (the host's, for the CPU)."""

    name: str
    title: str
    memory: int
    index: int | None = None

    @property
    def is_cpu(self) -> bool:
        return self.index is None


def list_cards() -> list[Card]:
    """The NVIDIA cards that the driver shows, or the CPU where there is none."""
    return _nvidia_cards() or [_cpu()]


def pick_card(wanted: str) -> Card:
    """The card that a recipe's `card:` means. Raises WrongInput if it is not on this host."""
    cards = list_cards()
    if wanted == "cpu":
        return _cpu()
    for card in cards:
        if wanted in ("auto", card.name, card.name.replace("-", ":")):
            return card
    raise WrongInput(
        f"no card '{wanted}' on this host",
        place="card",
        fix=f"there is: {', '.join(each.name for each in cards)}",
    )


class CardLock:
    """The right to use a card, as an open file descriptor that a child process can inherit (`pass_fds`)."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def release(self) -> None:
        """Let go here; the card stays taken while a child that inherited the descriptor lives."""
        os.close(self.fd)


def try_lock(project: Project, card: Card, holder: str) -> CardLock | None:
    """The card's lock, or None while somebody else holds it. `holder` is written into the file for people."""
    with _guarded(project, card) as folder:
        fd = try_exclusive(folder / "lock")
        if fd is None:
            return None
        os.ftruncate(fd, 0)
        os.pwrite(fd, holder.encode(), 0)
        os.set_inheritable(fd, True)
        return CardLock(fd)


def holder(project: Project, card: Card) -> str:
    """Who holds the card, '' if nobody does."""
    with _guarded(project, card) as folder:
        lock = folder / "lock"
        return lock.read_text(encoding="utf-8") if is_held(lock) else ""


@contextmanager
def marker(project: Project, card: Card, purpose: Purpose) -> Iterator[None]:
    """Make it known, while the block runs, that this process wants the card (or its engine)."""
    with _guarded(project, card) as folder:
        path = folder / f"{purpose}-{uuid.uuid4().hex}"
        fd = open_lock(path)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def wanted(project: Project, card: Card, purpose: Purpose) -> bool:
    """Is there a live marker of that purpose? Markers of dead processes are removed on the way."""
    found = False
    with _guarded(project, card) as folder:
        for path in folder.glob(f"{purpose}-*"):
            if is_held(path):
                found = True
            else:
                path.unlink(missing_ok=True)
    return found


@contextmanager
def _guarded(project: Project, card: Card) -> Iterator[Path]:
    """The card's folder, with this process alone at work in it for a moment."""
    folder = project.cards / card.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "see to its rights, or name another folder with FT_CACHE"
        raise Trouble(f"the cards' locks cannot be there: {error.strerror}", place=str(folder), fix=fix) from error
    with alone(folder / "guard"):
        yield folder


def _cpu() -> Card:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Card("cpu", f"CPU, {os.cpu_count()} cores", memory)


def _nvidia_cards() -> list[Card]:
    import pynvml  # loads the driver's library, and is wanted only here

    try:
        pynvml.nvmlInit()
        found = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            Card(
                f"cuda-{index}",
                str(pynvml.nvmlDeviceGetName(handle)),
                int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                index,
            )
            for index, handle in enumerate(found)
        ]
    except pynvml.NVMLError:
        return []
