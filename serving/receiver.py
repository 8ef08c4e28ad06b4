"""`python -m serving.receiver`: takes events over HTTP and appends them to the log. It does nothing else.

Whether a worker is on is not its business: the next one finds what was appended.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn

from registry.errors import FtError, WrongInput
from registry.project import Project, find_project
from registry.settings import Settings, load_settings
from registry.store import Store, open_store
from serving.doors import Receiver
from serving.inbox import Inbox
from serving.listening import http_server, is_loopback, listen, loop_factory, url_of
from serving.receiver_lock import only_receiver

DRAIN_SECONDS = 15
# Each may hold one body of `receiver_max_body`.
MOST_CONNECTIONS = 512


def run_receiver(project: Project, store: Store, settings: Settings, say: Callable[[str], None]) -> None:
    """Receive until SIGTERM or SIGINT; `say` gets the URL. Raises WrongInput, Trouble (port in use) and Conflict."""
    host = settings.receiver_host
    if not settings.receiver_token and not is_loopback(host):
        raise WrongInput("beyond loopback anybody could post events, and these start runs",
                         place=f"receiver_host {host}",
                         fix="set FT_RECEIVER_TOKEN (`openssl rand -hex 32` makes one)")  # fmt: skip
    with only_receiver(project) as note:
        listening = listen(host, settings.receiver_port, "the receiver", "FT_RECEIVER_PORT")
        note(url_of(listening))
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_receive(listening, store, settings, say))


async def _receive(listening: socket.socket, store: Store, settings: Settings, say: Callable[[str], None]) -> None:
    """Until asked to stop; then what has come is appended and answered."""
    inbox = Inbox(store)
    receiver = Receiver(inbox, settings)
    server = _server(receiver)
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, setattr, server, "should_exit", True)
    say(url_of(listening))
    try:
        await server.serve(sockets=[listening])
        await receiver.close()
    finally:
        await asyncio.to_thread(inbox.close)


def _server(receiver: Receiver) -> uvicorn.Server:
    # A warning for each broken request would let anybody fill the output.
    return http_server(receiver, DRAIN_SECONDS, log_level="error", limit_concurrency=MOST_CONNECTIONS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.receiver", description=__doc__)
    parser.add_argument("--project", type=Path, help="a folder in the project; default: here")
    asked = parser.parse_args(arguments)
    try:
        project = find_project(asked.project)
        settings = load_settings(project)
        run_receiver(project, open_store(project), settings, lambda url: print(f"receiving at {url}", flush=True))
    except FtError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
