"""`ft up` and `ft down` with real small programs as parts: what ends is started again, and nothing is on twice."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from cli.log_rotation import rotate
from cli.parts import Part, parts_of, stamped
from cli.supervising import start_supervisor, stop_supervisor
from cli.up_folder import UpFolder
from registry.errors import WrongInput
from registry.file_locks import open_lock
from registry.project import Project
from tests.cli.small_parts import (
    CRASH,
    DEAF,
    NEVER_READY,
    STAY,
    WITH_CHILD,
    is_alive,
    kill_all,
    lives,
    part,
    state,
    supervised,
    until,
)
from tests.conftest import run_bounded, started
from tests.mlflow_server import free_port


@pytest.fixture(autouse=True)
def _ports_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FT_MLFLOW_PORT", "FT_RECEIVER_PORT", "FT_GATEWAY_PORT"):
        monkeypatch.setenv(name, "0")


def ft(project: Project, *arguments: str) -> tuple[int, str, str]:
    done = run_bounded([sys.executable, "-m", "cli.main", *arguments], timeout=60, cwd=project.root)
    return done.returncode, done.stdout, done.stderr


def is_up(up: UpFolder, name: str) -> bool:
    return str(state(up, name)["state"]) == "up"


def test_parts_come_up_and_go_down(project: Project) -> None:
    with supervised(project, part(project, "one", STAY), part(project, "two", STAY)) as up:
        until(up.is_well, "both parts")
        code, out, _ = ft(project, "up", "--status", "--json")
        said = json.loads(out)
        assert (code, said["up"], said["well"], said["pid"]) == (0, True, True, up.supervisor())
        assert [each["state"] for each in said["parts"]] == ["up", "up"]
        assert [each["pid"] for each in said["parts"]] == [lives(project, name)[0][0] for name in ("one", "two")]
        assert Path(said["parts"][0]["log"]).read_text() == "hello\n"
        pids = [each["pid"] for each in said["parts"]]
        code, out, _ = ft(project, "down")
        assert code == 0
        assert out.splitlines()[0].startswith("two: stopp"), "the last one first"
        assert out.splitlines()[-1] == "down"
        assert not any(map(is_alive, pids))
        assert not up.is_up()
    code, out, _ = ft(project, "up", "--status")
    assert (code, out) == (1, "not up; `ft up` starts it\n")


def test_down_where_nothing_is_up(project: Project) -> None:
    assert ft(project, "down")[:2] == (0, "nothing was up\n")
    code, out, _ = ft(project, "down", "--json")
    assert (code, json.loads(out)) == (0, {"stopped": False, "training": [], "worker": False})


def test_a_part_that_is_killed_is_started_again(project: Project) -> None:
    with supervised(project, part(project, "one", STAY)) as up:
        until(lambda: is_up(up, "one"), "the part")
        os.kill(lives(project, "one")[0][0], signal.SIGKILL)
        until(lambda: len(lives(project, "one")) == 2 and is_up(up, "one"), "its second life")
        now = state(up, "one")
        assert (now["restarts"], now["pid"]) == (1, lives(project, "one")[1][0])
        assert now["error"].startswith("killed by SIGKILL")


def test_one_that_crashes_is_tried_later_each_time_and_says_why(project: Project) -> None:
    with supervised(project, part(project, "one", CRASH), part(project, "two", STAY)) as up:
        until(lambda: len(lives(project, "one")) == 4, "three restarts")
        times = [each[1] for each in lives(project, "one")]
        gaps = [after - before for before, after in pairwise(times)]
        assert [1 <= gaps[0] < 2.5, 2 <= gaps[1] < 4, 4 <= gaps[2] < 7] == [True] * 3, gaps
        until(lambda: state(up, "one")["state"] == "down", "its end")
        assert state(up, "one")["error"] == "ended with exit code 3\n    no card here"
        assert is_up(up, "two")
        code, out, _ = ft(project, "up", "--status")
        assert code == 1
        assert "no card here" in out


def test_a_part_that_never_gets_well_is_ended_and_tried_again(project: Project) -> None:
    with supervised(project, part(project, "one", NEVER_READY, start_seconds=1.0)) as up:
        until(lambda: len(lives(project, "one")) == 2, "its second life")
        assert "did not answer for 1 s" in state(up, "one")["error"]
        assert not is_alive(lives(project, "one")[0][0])


def test_one_that_does_not_hear_sigterm_is_killed_after_its_time(project: Project) -> None:
    with supervised(project, part(project, "one", DEAF, stop_seconds=1.0)) as up:
        until(lambda: is_up(up, "one"), "the part")
        pid, began = lives(project, "one")[0][0], time.monotonic()
        assert stop_supervisor(up, print)
        assert 1 <= time.monotonic() - began < 10
        assert not is_alive(pid)


def test_children_of_a_part_go_with_it(project: Project) -> None:
    with supervised(project, part(project, "one", WITH_CHILD + STAY)) as up:
        until(lambda: is_up(up, "one") and len(lives(project, "one")) == 2, "the part and its child")
        parent = int(state(up, "one")["pid"])
        [child] = {pid for pid, _ in lives(project, "one")} - {parent}
        os.kill(parent, signal.SIGKILL)
        until(lambda: len(lives(project, "one")) == 4, "both again")
        assert not is_alive(child)


def test_only_one_is_up(project: Project) -> None:
    with supervised(project, part(project, "one", STAY)) as up:
        until(lambda: is_up(up, "one"), "the part")
        assert not start_supervisor(project, up, [part(project, "one", STAY)])
        code, out, err = ft(project, "up", "--foreground", "--only", "receiver")
        assert code == 2
        assert f"it is up already (pid {up.supervisor()})" in err
        code, out, _ = ft(project, "up", "--only", "receiver")
        assert code == 0
        assert "it is up already" in out
        assert "other parts" in out
        assert len(lives(project, "one")) == 1


def test_what_a_killed_supervisor_left_is_taken_over(project: Project) -> None:
    same = part(project, "one", STAY)
    with supervised(project, same, part(project, "two", STAY)) as up:
        until(up.is_well, "both parts")
        kill_supervisor(up)
        code, out, _ = ft(project, "up", "--status")
        assert code == 1
        assert "the supervisor is gone, but not one, two" in out
        other = part(project, "two", STAY, env={"COLOUR": "red"})
        assert start_supervisor(project, up, [same, other])
        until(up.is_well, "both parts again")
        assert len(lives(project, "one")) == 1, "kept"
        assert len(lives(project, "two")) == 2, "with other settings it is started anew"
        assert not is_alive(lives(project, "two")[0][0])
        os.kill(lives(project, "one")[0][0], signal.SIGKILL)  # not this supervisor's child, and yet
        until(lambda: len(lives(project, "one")) == 2 and up.is_well(), "its second life")


def test_down_stops_what_a_killed_supervisor_left(project: Project) -> None:
    with supervised(project, part(project, "one", STAY), part(project, "two", DEAF, stop_seconds=1.0)) as up:
        until(up.is_well, "both parts")
        pids = [each["pid"] for each in up.now()]
        kill_supervisor(up)
        code, out, _ = ft(project, "down")
        assert code == 0
        assert "its supervisor was gone" in out
        assert not any(map(is_alive, pids))


def test_what_is_left_of_a_part_that_was_killed_with_its_supervisor_goes_too(project: Project) -> None:
    whole = part(project, "one", WITH_CHILD + STAY)
    with supervised(project, whole) as up:
        until(lambda: is_up(up, "one") and len(lives(project, "one")) == 2, "the part and its child")
        parent = int(state(up, "one")["pid"])
        [child] = {pid for pid, _ in lives(project, "one")} - {parent}
        kill_supervisor(up)
        os.kill(parent, signal.SIGKILL)
        until(lambda: not is_alive(parent), "its end")
        assert is_alive(child)
        assert start_supervisor(project, up, [whole])
        until(lambda: len(lives(project, "one")) == 4, "both again")
        assert not is_alive(child)


def kill_supervisor(up: UpFolder) -> None:
    pid = up.supervisor()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: not up.is_up(), "its end")


def test_a_port_that_is_taken_is_told_without_starting_anything(project: Project) -> None:
    port = free_port()
    one = part(project, "one", STAY, listens=("127.0.0.1", port))
    with closing(socket.create_server(("127.0.0.1", port))) as other, supervised(project, one) as up:
        until(lambda: state(up, "one")["state"] == "down", "the news")
        assert state(up, "one")["error"] == f"port {port} of 127.0.0.1 is in use by another program"
        assert lives(project, "one") == []
        other.close()
        until(lambda: is_up(up, "one"), "the part, now that the port is free")


def test_one_that_somebody_else_has_started_is_waited_for(project: Project) -> None:
    other = project.home / "worker.lock"
    lock = open_lock(other)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with supervised(project, part(project, "one", STAY, other_lock=str(other), lock_variable="ITS_LOCK")) as up:
        until(lambda: state(up, "one")["state"] == "elsewhere", "the news")
        assert up.is_well()
        time.sleep(1.5)
        assert lives(project, "one") == []
        os.close(lock)
        until(lambda: is_up(up, "one"), "the part")
        assert other.read_text() == str(state(up, "one")["pid"]), "it was born with that lock"


def test_what_follows_a_start_is_tried_until_it_succeeds(project: Project) -> None:
    flag = project.home / "flag"
    program = f"import pathlib, sys; pathlib.Path({str(flag)!r}).exists() or sys.exit('not yet')"
    follow = (sys.executable, "-c", program)
    with supervised(project, part(project, "one", STAY, then=follow)) as up:
        until(lambda: "not yet" in state(up, "one").get("note", ""), "the news")
        assert is_up(up, "one")
        flag.touch()
        until(lambda: not state(up, "one")["note"], "its success")


def test_the_address_is_announced_while_the_part_is_well(project: Project) -> None:
    file = project.home / "one.url"
    with supervised(project, part(project, "one", STAY, address="http://here", announce=str(file))) as up:
        until(file.exists, "the address")
        assert file.read_text() == "http://here"
        assert stop_supervisor(up, print)
        assert not file.exists()


def test_the_supervisor_ends_when_its_state_is_removed(project: Project) -> None:
    with supervised(project, part(project, "one", STAY)) as up:
        until(lambda: is_up(up, "one"), "the part")
        pid = lives(project, "one")[0][0]
        up.lock.unlink()
        until(lambda: not is_alive(pid), "the part's end")


def test_nothing_is_lost_by_a_kill_of_the_supervisor_at_any_moment(project: Project) -> None:
    """Killed while it starts parts: whatever lives then is found by the next, and no part is on twice."""
    names = ["one", "two", "three"]
    wanted = [part(project, name, STAY) for name in names]
    up = UpFolder(project.home)
    try:
        for living in (0, 1, 1, 2, 3, 3):
            assert start_supervisor(project, up, wanted)
            until(lambda least=living: len(up.left_behind()) >= least, "so many parts")  # type: ignore[misc]
            kill_supervisor(up)
        assert start_supervisor(project, up, wanted)
        until(up.is_well, "all parts")
        for name in names:
            alive = [pid for pid, _ in lives(project, name) if is_alive(pid)]
            assert alive == [state(up, name)["pid"]]
    finally:
        kill_all(up)


def test_logs_stay_small(tmp_path: Path) -> None:
    log = tmp_path / "one.log"
    with log.open("ab", buffering=0) as writer:
        for letter in b"abcd":
            writer.write(bytes([letter]) * 150)
            assert rotate(log, limit=100)
        assert not rotate(log, limit=100)
        writer.write(b"e")
    assert log.read_bytes() == b"e"
    assert (tmp_path / "one.log.1").read_bytes() == b"d" * 100
    assert (tmp_path / "one.log.2").read_bytes() == b"c" * 100
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one.log", "one.log.1", "one.log.2"]


def test_which_parts_there_are(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, left_out = parts_of(project)
    assert [each.name for each in parts] == ["mlflow", "worker", "receiver"]
    assert list(left_out) == ["serving"]
    assert [Part.from_dict(json.loads(json.dumps(each.as_dict()))) for each in parts] == parts
    assert [each.name for each in parts_of(project, only=["worker"])[0]] == ["worker"]
    with pytest.raises(WrongInput, match="no such part: gateway"):
        parts_of(project, only=["gateway"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@elsewhere:5000")
    parts, left_out = parts_of(project)
    assert [each.name for each in parts] == ["worker", "receiver"]
    assert left_out["mlflow"] == "MLFLOW_TRACKING_URI names another one: elsewhere:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("FT_MLFLOW_PORT", "5000")
    assert parts_of(project)[0][0].name == "mlflow"


def test_a_free_port_is_chosen_once(project: Project) -> None:
    first, again = (parts_of(project, only=["mlflow"])[0][0] for _ in range(2))
    assert first == again
    assert first.listens is not None
    with closing(socket.create_server(first.listens)):
        assert parts_of(project, only=["mlflow"])[0][0].listens != first.listens


def test_keys_are_for_their_owner_only(project: Project) -> None:
    up = UpFolder(project.home)
    up.write_plan(parts_of(project)[0])
    files = [project.home / "mlflow_keys.json", up.folder / "plan.json"]
    assert [oct(file.stat().st_mode & 0o777) for file in files] == ["0o600", "0o600"]
    keys = json.loads(files[0].read_text())
    assert keys["encryption_key"] not in str(parts_of(project)[0][0].command)
    assert parts_of(project)[0] == up.plan(), "made once"


def test_a_stamp_knows_settings_and_environment(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    one = part(project, "one", STAY)
    assert stamped(one) == one
    assert stamped(one, "other settings").stamp != one.stamp
    monkeypatch.setenv("FT_DATABASE_URL", "postgresql://x")
    assert stamped(one).stamp != one.stamp


def test_the_supervisor_needs_next_to_nothing(project: Project) -> None:
    with supervised(project, *(part(project, name, STAY) for name in ("one", "two", "three", "four"))) as up:
        until(up.is_well, "the parts")
        pid = up.supervisor()
        before = cpu_seconds(pid)
        time.sleep(6)
        assert cpu_seconds(pid) - before <= 0.06, "1 % of a core"
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        assert pages * os.sysconf("SC_PAGE_SIZE") < 40e6


def cpu_seconds(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_in_the_foreground_it_stays_until_sigterm(project: Project) -> None:
    """`ft up --foreground` becomes the supervisor: the same process, with the part that it was asked for."""
    command = [sys.executable, "-m", "cli.main", "up", "--foreground", "--only", "receiver"]
    up = UpFolder(project.home)
    with started(command, cwd=project.root) as process:
        try:
            until(up.now, "its first word")
            assert up.supervisor() == process.pid
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert not up.is_up()
        finally:
            kill_all(up)
