"""One receiver of a project on a host: the lock that says so, and where that one listens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.errors import Conflict
from registry.file_locks import is_held, try_exclusive
from registry.project import Project


@contextmanager
def only_receiver(project: Project) -> Iterator[Callable[[str], None]]:
    """Be it while the block runs; gives a function that notes the URL. Raises Conflict if another process is."""
    fd = try_exclusive(_path(project))
    if fd is None:
        raise Conflict("a receiver of this project runs already", place=receiver_url(project) or str(project.home),
                       fix="post to that one, or end it")  # fmt: skip

    def note(url: str) -> None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "url": url}).encode(), 0)

    try:
        yield note
    finally:
        os.close(fd)


def receiver_url(project: Project) -> str:
    """Of the receiver that runs; '' if none does, or it has not said yet."""
    path = _path(project)
    if not is_held(path):
        return ""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["url"])
    except (OSError, ValueError, KeyError):
        return ""


def _path(project: Project) -> Path:
    return project.home / "receiver.lock"
