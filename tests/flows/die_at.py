"""`python -m tests.flows.die_at ORDER ROLE MODULE [ARGUMENT...]`: run a module, and kill -9 it where ORDER says.

The module is run as it is; a profiler's hook sees its calls and returns. ORDER is a file with one point as JSON (see
points.py), looked at whenever a function of its table is called, so an order reaches a process that is up. Who takes it
leaves ORDER.done and dies.
"""

from __future__ import annotations

import dis
import json
import os
import runpy
import signal
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from tests.flows.points import IN_POD, LENT, POINTS, Point


class Executioner:
    """The hook of one process. It is called millions of times: what is none of our functions leaves at once."""

    def __init__(self, order: Path, role: str) -> None:
        self.order = order
        self.points = [each for each in (*POINTS, *LENT, *IN_POD) if each.role == role]
        self.names = frozenset(each.function.rpartition(".")[2] for each in self.points)
        self.seen: Counter[str] = Counter()
        self.last = ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if code.co_name in self.names and event in ("call", "return") and _is_whole(frame, event):
            self._look(frame, event)

    def _look(self, frame: FrameType, event: str) -> None:
        file, function = frame.f_code.co_filename, frame.f_code.co_qualname
        if not any(_is_in(each, file, function, event) for each in self.points):
            return
        point = self._ordered()
        if point is None or not _is_in(point, file, function, event) or not _has(frame, point.where):
            return
        self.seen[point.name] += 1
        if self.seen[point.name] >= point.count:
            self._execute(point)

    def _ordered(self) -> Point | None:
        try:
            point = Point(**json.loads(self.order.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
        if point.name != self.last:
            self.last = point.name
            self.seen.clear()
        return point if point in self.points else None

    def _execute(self, point: Point) -> None:
        with suppress(FileNotFoundError):  # another thread of this process was faster
            self.order.replace(self.order.with_suffix(".done"))
            for pid in _descendants(os.getpid()) if point.victim == "engine" else [os.getpid()]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _is_in(point: Point, file: str, function: str, event: str) -> bool:
    path = f"/{point.module.replace('.', '/')}.py"
    return point.when == event and point.function == function and file.endswith(path)


def _is_whole(frame: FrameType, event: str) -> bool:
    """Coroutines are called again after every wait, and return at every one: only their first and last count."""
    code, at = frame.f_code.co_code, frame.f_lasti
    if at < 0:
        return event == "call"
    name = dis.opname[code[at]]
    return name.startswith("RETURN") if event == "return" else name == "RESUME" and code[at + 1] & 3 == 0


def _has(frame: FrameType, where: dict[str, str]) -> bool:
    """`event.type` is the attribute `type` of the argument `event`."""
    found: dict[str, Any] = frame.f_locals
    for path, wanted in where.items():
        name, *attributes = path.split(".")
        value = found.get(name)
        for each in attributes:
            value = getattr(value, each, None)
        if value != wanted:
            return False
    return True


def _descendants(pid: int) -> list[int]:
    """Its children and theirs, except what only keeps them: vLLM itself, not its keeper."""
    children = [int(each) for task in Path(f"/proc/{pid}/task").iterdir() for each in _words(task / "children")]
    found = [each for child in children for each in (child, *_descendants(child))]
    return [each for each in found if "keeper.py" not in " ".join(_words(Path(f"/proc/{each}/cmdline")))]


def _words(path: Path) -> list[str]:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    except OSError:
        return []


def main() -> None:
    order, role, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    hook = Executioner(Path(order), role)
    threading.setprofile(hook)
    sys.setprofile(hook)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
