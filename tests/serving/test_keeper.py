"""The process that ends an engine with its server, shown with plain programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving import keeper

# Like vLLM: a first process, and another that outlives it unless somebody ends it.
PROGRAM = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def start() -> tuple[subprocess.Popen[str], int, int]:
    """The keeper, our end of its pipe, and the pid of the program's own child."""
    theirs, ours = os.pipe()
    command = [sys.executable, "-I", keeper.__file__, str(theirs), sys.executable, "-c", PROGRAM]
    process = subprocess.Popen(command, pass_fds=[theirs], stdout=subprocess.PIPE, text=True, start_new_session=True)
    os.close(theirs)
    assert process.stdout is not None
    return process, ours, int(process.stdout.readline())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(seconds: float, pid: int) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


@pytest.mark.parametrize("cause", ["server gone", "program killed"])
def test_nothing_is_left(cause: str) -> None:
    process, ours, grandchild = start()
    try:
        assert is_alive(grandchild)
        if cause == "server gone":
            os.close(ours)
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
            os.kill(int(children[0]), signal.SIGKILL)
        assert process.wait(15) == -signal.SIGKILL
        assert gone_within(5, grandchild)
    finally:
        if process.stdout:
            process.stdout.close()
        if cause != "server gone":
            os.close(ours)
