"""A line to a server on loopback that breaks as real ones do: cut, an answer that is lost, a body that never comes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BEGINS = (b"PUT ", b"POST ")


class Line:
    """`url` leads to the server. What it is told to lose, it loses once: at the next writing request."""

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("http://").split(":")
        self.target = (host, int(port))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.lose, self.spared = "", -1
        self.down, self.hanging = threading.Event(), threading.Event()
        self.open: set[socket.socket] = set()

    def lose_answer(self) -> None:
        """The server does what it is asked, and its answer does not arrive."""
        self.lose = "answer"

    def lose_body(self) -> None:
        """The server gets the head of a request, and then nobody speaks any more."""
        self.lose = "body"

    def cut_after(self, writes: int) -> None:
        """Cut it when so many more requests that write have got their answers."""
        self.spared = writes

    def cut(self) -> None:
        """From now on nobody is reached."""
        self.down.set()
        for each in [*self.open]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def hang(self) -> None:
        """From now on whoever asks waits for an answer."""
        self.hanging.set()

    def mend(self) -> None:
        self.down.clear()
        self.hanging.clear()

    def serve(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=[near], daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            if self.down.is_set():
                return
            with socket.create_connection(self.target) as far:
                ends = {near, far}
                self.open |= ends
                losing = [""]
                back = threading.Thread(target=self._carry_back, args=[far, near, losing], daemon=True)
                back.start()
                while some := near.recv(1 << 16):
                    if self._is_last(some):
                        self.cut()
                        break
                    if self.lose and some.startswith(BEGINS):
                        losing[0], self.lose = self.lose, ""
                    while self.hanging.is_set():
                        time.sleep(0.05)
                    far.sendall(some)
                self.open -= ends

    def _is_last(self, some: bytes) -> bool:
        if self.spared < 0 or not some.startswith(BEGINS):
            return False
        self.spared -= 1
        return self.spared < 0

    def _carry_back(self, far: socket.socket, near: socket.socket, losing: list[str]) -> None:
        with suppress(OSError):
            while some := far.recv(1 << 16):
                # boto3 asks first whether it may send the body: that is not the answer yet.
                if losing[0] == "body" or (losing[0] and not some.startswith(b"HTTP/1.1 100")):
                    break
                near.sendall(some)
        with suppress(OSError):
            near.shutdown(socket.SHUT_RDWR)


@contextmanager
def line_to(target: str) -> Iterator[Line]:
    line = Line(target)
    thread = threading.Thread(target=line.serve)
    thread.start()
    try:
        yield line
    finally:
        line.listener.shutdown(socket.SHUT_RDWR)
        line.listener.close()
        line.mend()
        line.cut()
        thread.join(10)
