"""The way of one adapter version into an engine: admitted, loaded, warmed, probed. The flip comes after.

Nothing here touches a route, so whatever goes wrong on the way, the version that answers goes on answering.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from registry.adapters import Version
from registry.admission import admit
from registry.errors import AdmissionError
from serving.engine import Engine
from serving.parity import Parity, probe, read_fingerprint


@dataclass(frozen=True)
class Landed:
    """A version that is loaded and has shown that it is itself; `seconds` of each part of its way."""

    parity: Parity
    seconds: dict[str, float] = field(default_factory=dict)


class ProbeFailed(AdmissionError):
    """The server does not say what the trainer heard; `parity` has the numbers."""

    def __init__(self, name: str, parity: Parity, place: str) -> None:
        super().__init__(f"{name} failed the parity probe: {parity.reason}", place=place,
                         fix="train it again; what answered before goes on answering")  # fmt: skip
        self.parity = parity


async def bring_up(engine: Engine, version: Version, folder: Path, max_rank: int, modules: Collection[str]) -> Landed:
    """Admit, load as `model@N`, warm, probe. `modules`: what the engine adapts. Doing it again does no harm.

    Raises AdmissionError (ProbeFailed is one) if the version must not answer, and then it is not loaded;
    EngineError if the engine went away meanwhile.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "admit"):
        facts = await asyncio.to_thread(admit, folder, str(version.body["base"]["digest"]), max_rank)
        _refuse_other_modules(facts["targets"], modules, folder)
        fingerprint = await asyncio.to_thread(read_fingerprint, folder)
    with _timed(seconds, "load"):
        await engine.load(version.name, folder)
    with _timed(seconds, "warm"):
        await engine.chat(version.name, [{"role": "user", "content": "."}], max_tokens=1, temperature=0)
    with _timed(seconds, "probe"):
        parity = await probe(engine, version.name, fingerprint)
    if parity.outcome == "fail":
        await engine.unload(version.name)
        raise ProbeFailed(version.name, parity, str(folder))
    return Landed(parity, seconds)


def _refuse_other_modules(targets: list[str], modules: Collection[str], folder: Path) -> None:
    # vLLM would load the adapter and leave these out without a word.
    others = sorted(set(targets) - set(modules))
    if others:
        raise AdmissionError(f"it adapts {', '.join(others)}, which this server does not", place=str(folder),
                             fix="train it with `targets: all-linear`")  # fmt: skip


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[part] = round(time.monotonic() - began, 4)
