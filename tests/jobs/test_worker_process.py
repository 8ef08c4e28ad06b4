"""The two locks that make "submitted" imply "somebody will do it". Who holds them is a real process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jobs.worker_process import close_gate, submitting, take_worker_lock, worker_is_on, worker_log_tail, worker_pid
from registry.project import Project
from tests.conftest import all_at_once, run_bounded, started

WORK = """
import time
from jobs.worker_process import take_worker_lock
from registry.project import find_project
print(take_worker_lock(find_project()) is not None, flush=True)
time.sleep(60)
"""
IMPORT = """
from jobs.worker_process import take_worker_lock
from registry.project import find_project
project = find_project()
"""
# Who got it keeps it until all have tried.
TAKE = """
import time
print(take_worker_lock(project) is not None, flush=True)
time.sleep(2)
"""
LOOK = """
import sys, time
from jobs.worker_process import worker_is_on
from registry.project import find_project
project, end = find_project(), time.monotonic() + float(sys.argv[1])
print("on", flush=True)
while time.monotonic() < end:
    worker_is_on(project)
"""
SUBMIT = """
import time
from jobs.worker_process import submitting
from registry.project import find_project
with submitting(find_project()):
    print("in", flush=True)
    time.sleep(60)
"""


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_worker_is_on_while_its_process_lives(project: Project) -> None:
    assert not worker_is_on(project)
    with started([sys.executable, "-c", WORK], cwd=project.root) as worker:
        assert first_line(worker) == "True"
        assert worker_is_on(project)
        assert take_worker_lock(project) is None
        assert worker_pid(project) == worker.pid
        worker.kill()
        worker.wait(10)
        assert not worker_is_on(project)


def test_of_workers_that_start_at_once_one_stays(project: Project) -> None:
    assert all_at_once(4, IMPORT, TAKE, project.root) == ["False", "False", "False", "True"]


def test_who_only_looks_does_not_keep_a_worker_from_starting(project: Project) -> None:
    look = [sys.executable, "-c", LOOK, "30"]
    with started(look, cwd=project.root) as one, started(look, cwd=project.root) as two:
        assert (first_line(one), first_line(two)) == ("on", "on")
        for _ in range(10):
            with started([sys.executable, "-c", WORK], cwd=project.root) as worker:
                assert first_line(worker) == "True"


def test_no_worker_ends_while_somebody_submits(project: Project) -> None:
    with started([sys.executable, "-c", SUBMIT], cwd=project.root) as one:
        assert first_line(one) == "in"
        with submitting(project):  # several may at once
            assert close_gate(project) is None
        one.kill()
        one.wait(10)
    gate = close_gate(project)
    assert gate is not None
    assert close_gate(project) is None


def test_who_submits_waits_for_a_worker_that_is_about_to_end(project: Project) -> None:
    assert close_gate(project) is not None  # held until this process closes it, so asked from another
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_bounded([sys.executable, "-c", SUBMIT], 1.0, cwd=project.root)
    assert not caught.value.output


def test_the_logs_tail(project: Project) -> None:
    assert worker_log_tail(project) == ""
    project.logs.mkdir(parents=True)
    (project.logs / "worker.log").write_bytes(b"a\nb\xff\nc\n")
    assert worker_log_tail(project, lines=2) == "b\ufffd\nc"
