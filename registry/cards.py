"""Cards: one accelerator with its memory, on this host; `cpu` is a card too.

A card is held by an flock on its file in the shared cache. The lock's descriptor is inherited by the program
that uses the card (a trainer, vLLM), so it is free when that program is really gone, whoever else was killed.
To look is to try the lock as well: a second lock, the guard, is held for that moment, so that who looks is never
taken for a holder, and nobody sees a lock or a marker that is only half made.

Training and serving on one card take turns: who wants it puts a marker beside the lock. A server gives way to a
live `train` marker, except while there is a live `eval` marker: an evaluation needs the engine. Where ft.yaml says
`serve: share` the server takes a lock of its own and stays, and what it holds of the memory counts as taken.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from registry.errors import Trouble, WrongInput
from registry.file_locks import alone, is_held, open_lock, try_exclusive
from registry.host_name import host_name
from registry.project import Project, cache_folder

if TYPE_CHECKING:
    from registry.cloud_terms import CardSetting

GIB = 1 << 30
LOCK, BESIDE = "lock", "beside"
Purpose = Literal["train", "eval"]
ServeMode = Literal["evict", "share", "never"]
Whose = Literal["ours", "another's", "unseen"]


@dataclass(frozen=True)
class Card:
    """`name` as recipes and queues write it ('cpu', 'cuda-0'); memory in bytes (the host's, for the CPU).

    `used`: held by programs that do not give way to a trainer (known of an NVIDIA card only, but for a server of ours
    that shares). `profile`, `limit`, `keep_free` (bytes) and `serve` are what ft.yaml says of the card.
    """

    name: str
    title: str
    memory: int
    index: int | None = None
    used: int = field(default=0, compare=False)
    capability: str = ""
    profile: str = ""
    limit: int | None = None
    keep_free: int = 0
    serve: ServeMode = "evict"

    @property
    def is_cpu(self) -> bool:
        return self.index is None

    @property
    def known_as(self) -> str:
        """The title to look its abilities up by."""
        return self.profile or self.title

    @property
    def free(self) -> int:
        """What a trainer may have."""
        left = max(0, self.memory - self.used - self.keep_free)
        return left if self.limit is None else min(left, self.limit)


@dataclass(frozen=True)
class Seen:
    """What the driver says of one card. `processes`: pid and bytes, None where it does not tell how many."""

    index: int
    title: str
    memory: int
    used: int
    capability: str
    processes: tuple[tuple[int, int | None], ...]


def list_cards() -> list[Card]:
    """The NVIDIA cards that the driver shows, or the CPU where there is none."""
    return _nvidia_cards() or [_cpu()]


def as_set(cards: Sequence[Card], settings: Mapping[str, CardSetting]) -> list[Card]:
    """This host's cards with what ft.yaml says of them."""
    return [_with(card, _setting(card, settings)) for card in cards]


def refuse_serving(card: Card, settings: Mapping[str, CardSetting]) -> None:
    """Raises WrongInput where ft.yaml keeps the card free of servers."""
    [card] = as_set([card], settings)
    if card.serve == "never":
        raise WrongInput(
            f"card {card.name} is not for serving (`serve: never`)",
            place=f"ft.yaml: cards.{card.name}",
            fix="name another card in the recipe (`card:`), or write `serve: evict` or `serve: share` there",
        )


def card_seen(seen: Seen, *, held: bool, whose: Callable[[int], Whose]) -> Card:
    """The card, with what others than the holder of its lock have of its memory. Pure.

    While a holder's own part cannot be told (in a container pids are foreign; WSL names none), only what is surely
    another's counts as taken.
    """
    owners = [(whose(pid), size) for pid, size in seen.processes]
    ours = [size for owner, size in owners if owner == "ours" or (held and owner == "unseen")]
    if held and (not ours or None in ours):
        used = sum(size or 0 for owner, size in owners if owner == "another's")
    else:
        used = max(0, seen.used - sum(size or 0 for size in ours))
    return Card(f"cuda-{seen.index}", seen.title, seen.memory, seen.index, used, seen.capability)


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
    return _try_lock(project, card, LOCK, holder)


def try_lock_beside(project: Project, card: Card, holder: str, memory: int) -> CardLock | None:
    """The lock of a server that stays on the card beside whoever holds it; `memory` (bytes) is what it was given."""
    return _try_lock(project, card, BESIDE, f"{holder}\n{memory}")


def holder(project: Project, card: Card) -> str:
    """Who holds the card, '' if nobody does."""
    return _written(project.cards, card.name, LOCK)


def holder_beside(project: Project, card: Card) -> str:
    """The server that shares the card, '' if none does."""
    return _written(project.cards, card.name, BESIDE).partition("\n")[0]


@contextmanager
def marker(project: Project, card: Card, purpose: Purpose) -> Iterator[None]:
    """Make it known, while the block runs, that this process wants the card (or its engine)."""
    with _guarded(project.cards, card.name) as folder:
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
    with _guarded(project.cards, card.name) as folder:
        for path in folder.glob(f"{purpose}-*"):
            if is_held(path):
                found = True
            else:
                path.unlink(missing_ok=True)
    return found


def _with(card: Card, setting: CardSetting | None) -> Card:
    if setting is None:
        return card
    return replace(
        card,
        profile=setting.profile or "",
        limit=round(setting.memory_gb * GIB) if setting.memory_gb else None,
        keep_free=round(setting.keep_free_gb * GIB),
        serve=setting.serve,
    )


def _setting(card: Card, settings: Mapping[str, CardSetting]) -> CardSetting | None:
    """By its name, as recipes may write it too: desk/cuda-0, which comes before others, cuda-0, cuda:0."""
    named = {name.replace(":", "-"): each for name, each in settings.items()}
    return named.get(f"{host_name()}/{card.name}") or named.get(card.name)


def _try_lock(project: Project, card: Card, name: str, text: str) -> CardLock | None:
    with _guarded(project.cards, card.name) as folder:
        fd = try_exclusive(folder / name)
        if fd is None:
            return None
        os.ftruncate(fd, 0)
        os.pwrite(fd, text.encode(), 0)
        os.set_inheritable(fd, True)
        return CardLock(fd)


def _written(cards: Path, card: str, name: str) -> str:
    """What the holder of that lock wrote; '' if nobody holds it."""
    with _guarded(cards, card) as folder:
        lock = folder / name
        return lock.read_text(encoding="utf-8") if is_held(lock) else ""


@contextmanager
def _guarded(cards: Path, card: str) -> Iterator[Path]:
    """The card's folder, with this process alone at work in it for a moment."""
    folder = cards / card
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "see to its rights, or name another folder with FT_CACHE"
        raise Trouble(f"the cards' locks cannot be there: {error.strerror}", place=str(folder), fix=fix) from error
    with alone(folder / "guard"):
        yield folder


def _cpu() -> Card:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared = _text_of_lock("cpu", BESIDE).partition("\n")[2]
    return Card("cpu", f"CPU, {os.cpu_count()} cores", memory, used=int(shared) if shared.isdecimal() else 0)


def _text_of_lock(card: str, name: str) -> str:
    """For who lists cards: without making folders, and nothing where they cannot be read."""
    cards = cache_folder() / "cards"
    with suppress(Trouble, OSError):
        return _written(cards, card, name) if (cards / card / name).exists() else ""
    return ""


def _nvidia_cards() -> list[Card]:
    import pynvml  # loads the driver's library, and is wanted only here

    try:
        pynvml.nvmlInit()
        seen = [_seen(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    return [_judged(each) for each in seen]


def _seen(nvml: Any, index: int) -> Seen:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory, capability = nvml.nvmlDeviceGetMemoryInfo(handle), ""
    with suppress(nvml.NVMLError):  # without what the driver keeps for itself; of a driver of 2021 or later
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    with suppress(nvml.NVMLError):
        capability = "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle))
    processes: dict[int, int | None] = {}
    for ask in (nvml.nvmlDeviceGetGraphicsRunningProcesses, nvml.nvmlDeviceGetComputeRunningProcesses):
        with suppress(nvml.NVMLError):
            processes |= {each.pid: each.usedGpuMemory for each in ask(handle)}
    title = str(nvml.nvmlDeviceGetName(handle))
    return Seen(index, title, int(memory.total), int(memory.used), capability, tuple(processes.items()))


def _judged(seen: Seen) -> Card:
    name = f"cuda-{seen.index}"
    lock = cache_folder() / "cards" / name / LOCK
    return card_seen(seen, held=bool(_text_of_lock(name, LOCK)), whose=lambda pid: _whose(pid, lock))


def _whose(pid: int, lock: Path) -> Whose:
    """Whether a process belongs to the holder of the lock: a trainer, or the keeper of a vLLM, leads its session."""
    try:
        leader = os.getsid(pid)
    except OSError:
        return "unseen"
    with suppress(OSError):  # another user's
        for descriptor in Path(f"/proc/{leader}/fd").iterdir():
            if os.path.realpath(descriptor) == str(lock):
                return "ours"
    return "another's"
