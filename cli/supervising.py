"""Starting and ending the supervisor of `.ft/up`, and the parts that one which was killed has left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from cli.part_process import POLL_SECONDS, left_behind, stop, sweep_remains
from cli.parts import Part
from cli.up_folder import LOCK_VARIABLE, UpFolder
from registry.errors import Trouble
from registry.project import Project

COMMAND = [sys.executable, "-m", "cli.supervisor"]
SLACK_SECONDS = 15.0
# Kept, because Python warns of a process that is forgotten while it runs; it outlives this one by intent.
_started: list[subprocess.Popen[bytes]] = []


def start_supervisor(project: Project, folder: UpFolder, parts: list[Part]) -> bool:
    """Start one for these parts, in a session of its own and born with its lock. False if there is one already."""
    lock = folder.take()
    if lock is None:
        return False
    try:
        folder.write_plan(parts)
        project.logs.mkdir(parents=True, exist_ok=True)
        with (project.logs / "up.log").open("ab") as log:
            process = subprocess.Popen(
                COMMAND,
                cwd=project.root,
                env=_environment(project, lock),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
            )
        os.pwrite(lock, str(process.pid).encode(), 0)
        _started.append(process)
        return True
    finally:
        os.close(lock)


def become_supervisor(project: Project, folder: UpFolder, parts: list[Part]) -> None:
    """Be it from here on, with none of what this process has imported. Returns only if there is one already."""
    lock = folder.take()
    if lock is None:
        return
    folder.write_plan(parts)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    os.set_inheritable(lock, True)
    sys.stdout.flush()
    os.chdir(project.root)
    os.execve(COMMAND[0], COMMAND, _environment(project, lock))


def stop_supervisor(folder: UpFolder, say: Callable[[str], None]) -> bool:
    """End it and all parts; returns when they are gone. False if nothing was on. Raises Trouble if one will not go."""
    was_up, patience = folder.is_up(), {each.lock: each.stop_seconds for each in folder.plan()}
    if was_up:
        _end(folder, sum(patience.values()) + SLACK_SECONDS, say)
    left = folder.left_behind()
    for lock in reversed(left):
        found = left_behind(lock)
        if found is not None:
            say(f"{lock.stem}: its supervisor was gone; stopping it (pid {found[0].pid})")
            stop(found[0], patience.get(str(lock), 20.0))
    for lock in folder.folder.glob("*.lock"):
        sweep_remains(lock)
    if still := folder.left_behind():
        raise Trouble(f"these do not end: {', '.join(lock.stem for lock in still)}", place=str(folder.folder),
                      fix="the lock files there have their process ids; try again")  # fmt: skip
    return was_up or bool(left)


def _end(folder: UpFolder, seconds: float, say: Callable[[str], None]) -> None:
    deadline, asked, told = time.monotonic() + seconds, False, dict[str, str]()
    while folder.is_up():
        pid = folder.supervisor()  # none for a moment after its birth
        if pid is not None and not asked:
            _signal(pid, signal.SIGTERM)
            asked = True
        if pid is not None and time.monotonic() > deadline:
            _signal(pid, signal.SIGKILL)
        for part in reversed(folder.now()):  # in the order in which they stop, where two have since the last look
            if part["state"] in ("stopping", "stopped") and told.get(part["name"]) != part["state"]:
                told[part["name"]] = part["state"]
                say(f"{part['name']}: {part['state']}")
        time.sleep(POLL_SECONDS)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _environment(project: Project, lock: int) -> dict[str, str]:
    ours = {"FT_PROJECT": project.root, "FT_HOME": project.home, "FT_CACHE": project.cache, LOCK_VARIABLE: lock}
    return {**os.environ, **{name: str(value) for name, value in ours.items()}, "PYTHONUNBUFFERED": "1"}
