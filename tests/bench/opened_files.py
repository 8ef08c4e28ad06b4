"""Which adapters were read from disk, and when: the kernel's own notices (inotify), so that nothing has to tell us.

An engine that holds fewer adapters than it serves reads one again when it is asked for; no metric of vLLM says so.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

IN_OPEN = 0x20
IN_NONBLOCK = 0x800
HEAD = struct.Struct("iIII")
WEIGHTS = b"adapter_model.safetensors"


class Opened:
    """`times` has, for each name, when its weights were opened (Unix seconds)."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self._checked(self._libc.inotify_init1(IN_NONBLOCK))
        self._names: dict[int, str] = {}
        self.times: dict[str, list[float]] = {name: [] for name in folders}
        for name, folder in folders.items():
            watch = self._checked(self._libc.inotify_add_watch(self.fd, os.fsencode(folder), IN_OPEN))
            self._names[watch] = name

    def read(self) -> None:
        """Note what has been opened since the last call."""
        now = time.time()
        try:
            raw = os.read(self.fd, 1 << 20)
        except BlockingIOError:
            return
        place = 0
        while place < len(raw):
            watch, _, _, length = HEAD.unpack_from(raw, place)
            place += HEAD.size
            if raw[place : place + length].rstrip(b"\0") == WEIGHTS:
                self.times[self._names[watch]].append(now)
            place += length

    def _checked(self, answer: int) -> int:
        if answer < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return answer


@contextmanager
def watching(folders: Mapping[str, Path]) -> Iterator[Opened]:
    """Inside a running loop: the notices of the block, each noted at once."""
    opened = Opened(folders)
    asyncio.get_running_loop().add_reader(opened.fd, opened.read)
    try:
        yield opened
    finally:
        asyncio.get_running_loop().remove_reader(opened.fd)
        os.close(opened.fd)
