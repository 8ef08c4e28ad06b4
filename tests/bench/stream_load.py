"""`python -m tests.bench.stream_load PORT STREAMS EVENTS SECONDS PAUSE [NAME=VALUE...]`: many streams at once.

Prints {"events", "pieces", "seconds", "broken"}: events of all streams, the HTTP chunks they came in (as many, where
each was flushed by itself), and the time from the first byte to the last. Headers follow as NAME=VALUE.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from dataclasses import dataclass
from typing import cast

from serving.listening import loop_factory
from tests.bench.http_wire import END_OF_CHUNKS, chat_body, post

# The line with a chunk's size; no event of the canned upstream looks like one.
CHUNK = re.compile(rb"(?:^|\r\n)[0-9a-fA-F]+\r\n")


@dataclass
class Counts:
    events: int = 0
    pieces: int = 0
    ended: int = 0
    broken: int = 0
    began: float = 0.0
    last: float = 0.0


class Stream(asyncio.Protocol):
    """One stream on a connection of its own."""

    def __init__(self, counts: Counts, request: bytes, ended: asyncio.Event, streams: int) -> None:
        self._counts, self._request, self._ended, self._streams = counts, request, ended, streams
        self._tail, self._over = b"", False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        here = self._counts
        here.last = time.perf_counter()
        here.began = here.began or here.last
        here.events += data.count(b"data: ")
        here.pieces += len(CHUNK.findall(data))
        self._tail = (self._tail + data)[-len(END_OF_CHUNKS) :]
        if self._tail == END_OF_CHUNKS:
            self._end()

    def connection_lost(self, _: Exception | None) -> None:
        self._counts.broken += not self._over
        self._end()

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._counts.ended += 1
            self._transport.close()
            if self._counts.ended == self._streams:
                self._ended.set()


async def load(port: int, streams: int, canned: dict[str, float], seconds: float, headers: dict[str, str]) -> Counts:
    """`streams` streams as `canned` asks for, for at most so many seconds."""
    counts, ended = Counts(), asyncio.Event()
    request = post(port, chat_body(stream=True, canned=canned), headers)
    loop = asyncio.get_running_loop()
    made = [
        (await loop.create_connection(lambda: Stream(counts, request, ended, streams), "127.0.0.1", port))[0]
        for _ in range(streams)
    ]
    try:
        async with asyncio.timeout(seconds):
            await ended.wait()
    except TimeoutError:
        unfinished = streams - counts.ended
        for each in made:
            each.abort()
        await asyncio.sleep(0.1)
        counts.broken = max(0, counts.broken - unfinished)  # these were ended here
    return counts


def main() -> None:
    port, streams, events = (int(each) for each in sys.argv[1:4])
    seconds, pause = float(sys.argv[4]), float(sys.argv[5])
    headers = dict(each.split("=", 1) for each in sys.argv[6:])
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        found = runner.run(load(port, streams, {"events": events, "pause": pause}, seconds, headers))
    took = found.last - found.began
    print(json.dumps({"events": found.events, "pieces": found.pieces, "seconds": took, "broken": found.broken}))


if __name__ == "__main__":
    main()
