"""A job is a folder: what to do, who does it, how far it is, and the result that counts (HOUSE.md, section 6).

    spec.json                   what to do (written once)
    attempts/<n>.json           what of it is different since trainer n has failed, each written once
    data/                       the pinned dataset version's files
    lease.json                  the trainer's claim; names the accepted result's hash
    stop.json                   asks for checkpoint-then-stop
    progress/<epoch>-<n>.jsonl  one file per batch of progress lines, each written once
    checkpoints/<epoch>-<step>/ complete only with its MANIFEST.json
    adapter/                    the result, with MANIFEST.json and fingerprint.json
    result.json                 counts only when its sha256 is in lease.json
    log.txt                     what the trainer printed
    evaluate-<n>/               a job of its own: an evaluation in a pod

Changing the lease is a compare-and-set on its ETag (the content's sha256), as a bucket's If-Match is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from registry.file_locks import alone
from registry.manifest import broken_files

EVALUATION = "evaluate-"


@dataclass(frozen=True)
class Lease:
    """Who trains. `epoch` grows with every takeover, `beat` with every renewal, `result` is the accepted sha256."""

    epoch: int
    owner: str
    pid: int
    beat: int = 0
    result: str | None = None


@dataclass(frozen=True)
class Held:
    """A lease as read or written, with the ETag that a change of it must name."""

    lease: Lease
    etag: str


class LeaseLost(Exception):
    """Somebody else has changed the lease: stop, and publish nothing."""


class Claims(Protocol):
    """Where a trainer claims its job: the job's folder, or a bucket. `term`: seconds without a renewal end a claim."""

    term: float

    def lease(self) -> Held | None: ...

    def claim(self, owner: str, seen: Held | None) -> Held: ...

    def renew(self, held: Held) -> Held: ...

    def accept(self, held: Held, result: dict[str, Any], adapter: Path | None = None) -> Held: ...


class JobFolder:
    """One job's folder on a local (or shared) disk."""

    term = math.inf  # a trainer on this machine is known to be gone by its card's lock

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The job's id, which is its run's."""
        return self.path.name

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def work(self) -> Path:
        """Scratch of whoever trains; nothing in it counts."""
        return self.path / "work"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    def write_spec(self, spec: dict[str, Any]) -> None:
        """Written once: the same content again is fine, other content is an error."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(spec, indent=1, sort_keys=True, ensure_ascii=False)
        target = self.path / "spec.json"
        if target.exists() and target.read_text(encoding="utf-8") != text:
            raise ValueError(f"{target} is there already, with other content")
        write_whole(target, text)

    def spec(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "spec.json").read_text(encoding="utf-8")))

    def add_attempt(self, change: dict[str, Any]) -> None:
        """From now on the job is done so; `after` is the epoch of the trainer that has failed, `train` what changes."""
        folder = self.path / "attempts"
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"{change['after']:04d}.json", json.dumps(change, sort_keys=True, ensure_ascii=False))

    def attempts(self) -> list[dict[str, Any]]:
        """All changes, the last one last."""
        return [
            json.loads(file.read_text(encoding="utf-8")) for file in sorted((self.path / "attempts").glob("*.json"))
        ]

    def recipe(self) -> dict[str, Any]:
        """The recipe as it is to be done now: of the spec, with what later attempts changed."""
        found = dict(self.spec()["recipe"])
        changes = [each["train"] for each in self.attempts()]
        return {**found, "train": {**found["train"], **{name: new for each in changes for name, new in each.items()}}}

    def lease(self) -> Held | None:
        text = _read(self.path / "lease.json")
        return Held(Lease(**json.loads(text)), _digest(text)) if text else None

    def claim(self, owner: str, seen: Held | None) -> Held:
        """Take the job: create the lease, or take over the one `seen`. Raises LeaseLost if another was faster."""
        epoch = seen.lease.epoch + 1 if seen else 1
        with self._exclusive():
            return self._swap(seen, Lease(epoch, owner, os.getpid()))

    def renew(self, held: Held) -> Held:
        with self._exclusive():
            return self._swap(held, replace(held.lease, beat=held.lease.beat + 1))

    def accept(self, held: Held, result: dict[str, Any], adapter: Path | None = None) -> Held:
        """Publish `result` (and the folder `adapter`) as what counts. Raises LeaseLost: then nothing was published."""
        text = json.dumps(result, indent=1, sort_keys=True, ensure_ascii=False)
        # One lock around all of it: who loses the lease half-way must not overwrite what the winner publishes.
        # The lease first, result.json last: killed between, the job has no result and goes on from its checkpoint.
        with self._exclusive():
            accepted = self._swap(held, replace(held.lease, result=_digest(text)))
            if adapter:
                shutil.rmtree(self.adapter, ignore_errors=True)
                adapter.replace(self.adapter)
            write_whole(self.path / "result.json", text)
            return accepted

    def result(self) -> dict[str, Any] | None:
        """The accepted result, None while there is none."""
        held, text = self.lease(), _read(self.path / "result.json")
        if held is None or text is None or held.lease.result != _digest(text):
            return None
        return dict(json.loads(text))

    def accepted(self) -> int:
        """Epoch of the trainer whose result is the accepted one; 0 while there is none."""
        held = self.lease()
        return held.lease.epoch if held and self.result() else 0

    def ask_to_stop(self, reason: str) -> None:
        write_whole(self.path / "stop.json", json.dumps({"reason": reason}))

    def stop_reason(self) -> str | None:
        text = _read(self.path / "stop.json")
        return str(json.loads(text)["reason"]) if text else None

    def withdraw_stop(self) -> None:
        (self.path / "stop.json").unlink(missing_ok=True)

    def add_progress(self, epoch: int, number: int, lines: list[dict[str, Any]]) -> None:
        """Write one batch of progress; `epoch` and `number` make its name, so it is written once."""
        folder = self.path / "progress"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
        write_whole(folder / f"{epoch:04d}-{number:06d}.jsonl", text)

    def progress_files(self) -> list[Path]:
        """Batches in the order in which they were written."""
        return sorted((self.path / "progress").glob("*.jsonl"))

    def progress(self) -> Iterator[dict[str, Any]]:
        for file in self.progress_files():
            for line in file.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)

    def complete_checkpoints(self) -> list[Path]:
        """Checkpoints whose every file is as their manifest says, the one with the most steps first."""
        found = sorted(self.checkpoints.glob("*-*"), key=steps_of, reverse=True)
        return [each for each in found if not broken_files(each)]

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all but the newest `keep` complete checkpoints, and half-written ones."""
        kept = self.complete_checkpoints()[:keep]
        for each in self.checkpoints.glob("*"):
            if each not in kept:
                shutil.rmtree(each, ignore_errors=True)

    def evaluations(self) -> list[JobFolder]:
        """Jobs inside of a run's, which evaluate what it has made, in their order (jobs/evaluation_job.py)."""
        found = [path for path in self.path.glob(f"{EVALUATION}*") if (path / "spec.json").exists()]
        return [JobFolder(path) for path in sorted(found, key=evaluation_number)]

    def _swap(self, seen: Held | None, new: Lease) -> Held:
        now = self.lease()
        if (now.etag if now else None) != (seen.etag if seen else None):
            raise LeaseLost(str(self.path))
        text = json.dumps(asdict(new), sort_keys=True)
        write_whole(self.path / "lease.json", text)
        return Held(new, _digest(text))

    def _exclusive(self) -> AbstractContextManager[None]:
        return alone(self.path / ".lock")


def evaluation_number(path: Path) -> int:
    """Of `evaluate-3`; 0 for another folder."""
    number = path.name.removeprefix(EVALUATION)
    return int(number) if number.isdecimal() else 0


def steps_of(checkpoint: Path) -> tuple[int, int]:
    """Steps and epoch in a checkpoint's name, to sort by."""
    epoch, _, step = checkpoint.name.partition("-")
    return (int(step), int(epoch)) if epoch.isdigit() and step.isdigit() else (-1, -1)


def write_whole(target: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(target)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
