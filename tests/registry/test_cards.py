"""Cards: who holds one, who wants one, and that looking disturbs nobody. The processes are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from registry.cards import (
    BESIDE,
    GIB,
    LOCK,
    Card,
    CardLock,
    Seen,
    Whose,
    _whose,
    as_set,
    card_seen,
    holder,
    holder_beside,
    list_cards,
    marker,
    pick_card,
    refuse_serving,
    try_lock,
    try_lock_beside,
    wanted,
)
from registry.cloud_terms import CardSetting
from registry.errors import WrongInput
from registry.project import Project
from tests.conftest import run_bounded, started

CPU = pick_card("cpu")
SLEEP = [sys.executable, "-c", "import time; print('on', flush=True); time.sleep(60)"]
# The holder starts a child that inherits the card, says its pid, and waits.
PARENT = """
import subprocess, sys, time
from registry.cards import pick_card, try_lock
from registry.project import find_project
lock = try_lock(find_project(), pick_card("cpu"), "the parent")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.fd])
lock.release()
print(child.pid, flush=True)
child.wait()
time.sleep(60)
"""
MARKER = """
import sys, time
from registry.cards import marker, pick_card
from registry.project import find_project
with marker(find_project(), pick_card("cpu"), sys.argv[1]):
    print("on", flush=True)
    time.sleep(60)
"""
LOOKER = """
import sys, time
from registry.cards import holder, pick_card, wanted
from registry.project import find_project
project, card, end = find_project(), pick_card("cpu"), time.monotonic() + float(sys.argv[1])
print("on", flush=True)
while time.monotonic() < end:
    holder(project, card), wanted(project, card, "train")
"""
MARKERS = """
import sys, time
from registry.cards import marker, pick_card, wanted
from registry.project import find_project
project, card, end, made = find_project(), pick_card("cpu"), time.monotonic() + float(sys.argv[1]), 0
while time.monotonic() < end:
    with marker(project, card, "train"):
        assert wanted(project, card, "train"), f"marker {made} is not seen"
    made += 1
print(made)
"""


def locked(project: Project, name: str = "a test") -> CardLock:
    lock = try_lock(project, CPU, name)
    assert lock is not None
    return lock


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.01)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_one_holds_a_card_and_says_who(project: Project) -> None:
    assert holder(project, CPU) == ""
    lock = locked(project, "a long name for a holder")
    assert try_lock(project, CPU, "another") is None
    assert holder(project, CPU) == "a long name for a holder"
    lock.release()
    assert holder(project, CPU) == ""
    locked(project, "short").release()
    assert (project.cards / "cpu" / "lock").read_text() == "short"


def test_a_child_inherits_the_card_and_frees_it_when_killed_though_the_parent_lives(project: Project) -> None:
    with started([sys.executable, "-c", PARENT], cwd=project.root) as parent:
        child = int(first_line(parent))
        assert holder(project, CPU) == "the parent"
        assert try_lock(project, CPU, "another") is None
        os.kill(child, signal.SIGKILL)
        until(lambda: holder(project, CPU) == "")
        assert parent.poll() is None
        locked(project).release()


def test_the_parent_dies_and_the_child_keeps_the_card(project: Project) -> None:
    with started([sys.executable, "-c", PARENT], cwd=project.root) as parent:
        child = int(first_line(parent))
        parent.kill()
        parent.wait(10)
        assert holder(project, CPU) == "the parent"
        os.kill(child, signal.SIGKILL)
        until(lambda: holder(project, CPU) == "")


def test_a_marker_is_gone_with_its_process(project: Project) -> None:
    with started([sys.executable, "-c", MARKER, "train"], cwd=project.root) as process:
        assert first_line(process) == "on"
        assert wanted(project, CPU, "train")
        assert not wanted(project, CPU, "eval")
        process.kill()
        process.wait(10)
        assert not wanted(project, CPU, "train")
    assert list((project.cards / "cpu").glob("train-*")) == []


def test_a_marker_lasts_as_long_as_its_block(project: Project) -> None:
    with marker(project, CPU, "eval"), marker(project, CPU, "eval"):
        assert wanted(project, CPU, "eval")
    assert not wanted(project, CPU, "eval")


def test_two_who_look_all_the_time_are_never_taken_for_a_holder(project: Project) -> None:
    look = [sys.executable, "-c", LOOKER, "2.5"]
    with started(look, cwd=project.root) as one, started(look, cwd=project.root) as two:
        assert (first_line(one), first_line(two)) == ("on", "on")
        end, times = time.monotonic() + 1.5, 0
        while time.monotonic() < end:
            lock = try_lock(project, CPU, "the only one")
            assert lock is not None, f"refused after {times} times, though nobody holds the card"
            assert holder(project, CPU) == "the only one"
            lock.release()
            times += 1
        assert times > 20
        assert (one.wait(20), two.wait(20)) == (0, 0)


def test_a_marker_is_never_taken_away_from_who_is_just_making_it(project: Project) -> None:
    look, make = [sys.executable, "-c", LOOKER, "2.5"], [sys.executable, "-c", MARKERS, "1.5"]
    with started(look, cwd=project.root), started(look, cwd=project.root):
        done = run_bounded(make, 30, cwd=project.root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_cards_are_named_as_recipes_write_them() -> None:
    assert (CPU.name, CPU.is_cpu, CPU.memory > 1 << 29) == ("cpu", True, True)
    assert pick_card("auto") == list_cards()[0]
    with pytest.raises(WrongInput, match="no card 'cuda:99' on this host") as caught:
        pick_card("cuda:99")
    assert "there is: " in caught.value.fix


VISION, TRAINER = 41, 42
DESK = Card("cuda-0", "NVIDIA GeForce RTX 3070", 8 * GIB, 0, 2 * GIB)


def seen(used: float, *processes: tuple[int, float | None]) -> Seen:
    """An 8 GiB card; sizes in GiB."""
    sizes = tuple((pid, None if size is None else round(size * GIB)) for pid, size in processes)
    return Seen(0, "NVIDIA GeForce RTX 3070", 8 * GIB, round(used * GIB), "8.6", sizes)


@pytest.mark.parametrize(
    ("said", "held", "taken"),
    [
        (seen(0.4), False, 0.4),  # what the driver keeps for itself
        (seen(2.5, (VISION, 2)), False, 2.5),
        (seen(7.5, (VISION, 2), (TRAINER, 5)), True, 2.5),
        (seen(7.5, (VISION, 2), (TRAINER, None)), True, 2),  # how much is the trainer's is not told
        (seen(7.5, (VISION, None), (TRAINER, None)), True, 0),
        (seen(7.5, (VISION, 2), (99, 5)), True, 2.5),  # a pid of another namespace: the holder's in its container
        (seen(7.5, (VISION, 2), (99, 5)), False, 7.5),
        (seen(2.5, (VISION, 2)), True, 2),  # the trainer has only just begun
        (seen(7.5), True, 0),  # WSL names no processes
    ],
)
def test_what_others_than_the_holder_have_of_a_card_counts_as_taken(said: Seen, held: bool, taken: float) -> None:
    known: dict[int, Whose] = {VISION: "another's", TRAINER: "ours"}
    card = card_seen(said, held=held, whose=lambda pid: known.get(pid, "unseen"))
    assert (card.name, card.capability, card.used) == ("cuda-0", "8.6", round(taken * GIB))
    assert card.free == 8 * GIB - card.used


def test_a_process_is_ours_when_its_session_holds_the_lock(project: Project) -> None:
    lock = locked(project)
    path = (project.cards / "cpu" / LOCK).resolve()
    with started(SLEEP, cwd=project.root) as other, started(SLEEP, cwd=project.root, pass_fds=[lock.fd]) as own:
        assert (first_line(other), first_line(own)) == ("on", "on")
        assert (_whose(own.pid, path), _whose(other.pid, path)) == ("ours", "another's")
    assert _whose(own.pid, path) == "unseen"
    lock.release()


@pytest.mark.parametrize(
    ("setting", "free"),
    [
        (CardSetting(), 6),
        (CardSetting(keep_free_gb=1.5), 4.5),
        (CardSetting(memory_gb=5), 5),
        (CardSetting(memory_gb=7, keep_free_gb=1), 5),
        (CardSetting(keep_free_gb=9), 0),
    ],
)
def test_what_ft_yaml_says_of_a_card_is_kept_to(setting: CardSetting, free: float) -> None:
    for name in ("cuda-0", "cuda:0"):
        [card] = as_set([DESK], {name: setting, "cuda-1": CardSetting(memory_gb=1)})
        assert card.free == free * GIB
    assert as_set([DESK], {"cuda-1": setting}) == [DESK]


def test_hosts_that_share_an_ft_yaml_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_HOST", "attic")
    both = {"attic/cuda:0": CardSetting(memory_gb=3), "cuda-0": CardSetting(memory_gb=5)}
    assert as_set([DESK], both)[0].free == 3 * GIB
    monkeypatch.setenv("FT_HOST", "desk")
    assert as_set([DESK], both)[0].free == 5 * GIB
    assert as_set([DESK], {"attic/cuda:0": CardSetting(memory_gb=3)}) == [DESK]


def test_a_card_can_be_taken_for_another_one() -> None:
    [card] = as_set([DESK], {"cuda-0": CardSetting(profile="RTX 4070 SUPER", serve="share")})
    assert (card.known_as, card.title, card.serve) == ("RTX 4070 SUPER", DESK.title, "share")
    assert DESK.known_as == DESK.title


def test_a_card_that_is_not_for_serving_is_refused_and_the_error_says_where_to_look() -> None:
    with pytest.raises(WrongInput, match="cuda-0 is not for serving") as caught:
        refuse_serving(DESK, {"cuda:0": CardSetting(serve="never")})
    assert caught.value.place == "ft.yaml: cards.cuda-0"
    refuse_serving(DESK, {"cuda:0": CardSetting(serve="share")})
    refuse_serving(DESK, {})


def test_a_server_that_shares_leaves_the_card_to_a_trainer_and_its_memory_counts(project: Project) -> None:
    server = try_lock_beside(project, CPU, "ft serve, pid 7", 3 * GIB)
    assert server is not None
    assert try_lock_beside(project, CPU, "another server", GIB) is None
    assert (holder(project, CPU), holder_beside(project, CPU)) == ("", "ft serve, pid 7")
    trainer = locked(project, "a trainer")
    assert (holder(project, CPU), pick_card("cpu").used) == ("a trainer", 3 * GIB)
    trainer.release()
    server.release()
    assert (holder_beside(project, CPU), pick_card("cpu").used) == ("", 0)
    assert (project.cards / "cpu" / BESIDE).exists()


def test_looking_at_cards_makes_no_folders(project: Project) -> None:
    assert pick_card("cpu").used == 0
    assert not project.cards.exists()
