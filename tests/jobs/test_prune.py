"""Pruning as a whole: folders, rows and the engine's rows; killed in the middle, on time, and never what is in use."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from jobs import prune as pruning
from registry import adapters, runs
from registry.bucket import open_bucket
from registry.cards import pick_card, try_lock
from registry.errors import Conflict, Trouble
from registry.events import advance, read
from registry.file_locks import try_exclusive
from registry.project import Project
from registry.retention import Keep
from registry.store import Store
from tests.conftest import run_bounded, started
from tests.weed_server import WeedServer

# SQLAlchemy warns of its own deprecations, and DBOS of pages that are not ours.
pytestmark = pytest.mark.filterwarnings("default")

FT = ["-m", "cli.main"]
FILES = 30
AT_ONCE = Keep(runs="0d", jobs="0d", failed_jobs="0d", checkpoints="0d", adapters="0d", scores="0d", events="0d")


def make_run(project: Project, store: Store, run_id: str, state: runs.State = "succeeded", files: int = 2) -> str:
    with store.writing() as connection:
        runs.submit_within(connection, run_id, {"name": "m", "model": "m"}, "recipes/m.yaml", "d")
    for part in ("data", "checkpoints/0001-000010"):
        folder = project.job_folder(run_id) / part
        folder.mkdir(parents=True)
        for number in range(files):
            (folder / f"{number}.bin").write_bytes(b"x" * 1000)
    runs.finish(store, run_id, state)
    if state in ("failed", "cancelled"):
        runs.mark_told(store, runs.get(store, run_id))
    return run_id


def make_version(project: Project, store: Store, number: int, run_id: str, outcome: str = "pass") -> Path:
    folder = project.adapter_folder("m", number)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    adapters.add_version(store, "m", number, run_id, f"adapters/m/{number}", {})
    champion = adapters.aliases(store, "m").get("champion")
    verdict = adapters.add_verdict(store, "m", number, outcome, {"champion": champion}, None)
    if outcome == "pass":
        adapters.promote(store, verdict, by_whom="ann")
    return folder


def pruned(project: Project, store: Store, keep: Keep = AT_ONCE) -> dict[str, Any]:
    plan = pruning.plan_of(project, store, keep, time.time() + 1)
    seen, done = pruning.preview(project, store, plan), pruning.prune(project, store, plan)
    assert seen.as_dict() == done.as_dict(), "what was shown is what was done"
    return {name: each["number"] for name, each in pruning.shown(done).items()}


def test_what_an_adapter_in_use_was_made_of_is_kept(project: Project, store: Store) -> None:
    for number, outcome in enumerate(("fail", "pass", "pass", "fail"), start=1):
        make_version(project, store, number, make_run(project, store, f"m-{number}"), outcome)
    make_run(project, store, "m-lost", "failed")
    with store.writing() as connection:
        runs.submit_within(connection, "m-busy", {"name": "m", "model": "m"}, "recipes/m.yaml", "d")
    advance(store, "triggers", 999)
    assert pruned(project, store) == {"runs": 2, "adapters": 1, "events": 6}
    assert {run.id for run in runs.listed(store)} == {"m-2", "m-3", "m-4", "m-busy"}
    assert {path.name for path in (project.home / "jobs").iterdir()} == {"m-2", "m-3", "m-4"}
    assert {path.name for path in (project.home / "adapters" / "m").iterdir()} == {"2", "3", "4"}
    whole = {each.subject for each in read(store) if not each.pruned and each.type != "store.pruned"}
    assert whole == {"m-2", "m-3", "m-4", "m-busy", "m@2", "m@3", "m@4"}
    [said] = read(store, type_="store.pruned")
    assert said.data["counts"]["runs"] == {"number": 2, "bytes": 8000}
    assert pruned(project, store) == {}, "nothing is left to do"


def test_checkpoints_go_first_then_the_folder_then_the_row(project: Project, store: Store) -> None:
    run_id = make_run(project, store, "m-1")
    later = AT_ONCE.model_copy(update={"runs": "off", "jobs": "off", "events": "off"})
    assert pruned(project, store, later) == {"checkpoints": 1}
    assert [path.name for path in project.job_folder(run_id).iterdir()] == ["data"]
    assert pruned(project, store, AT_ONCE.model_copy(update={"runs": "off"})) == {"jobs": 1}
    assert not project.job_folder(run_id).exists()
    assert runs.get(store, run_id).pruned
    assert pruned(project, store) == {"runs": 1}


def test_a_trainer_that_lives_keeps_its_folder_whatever_its_row_says(project: Project, store: Store) -> None:
    run_id = make_run(project, store, "m-1", "failed")
    lock = try_lock(project, pick_card("cpu"), f"trainer of {project.job_folder(run_id)}")
    assert lock
    assert pruned(project, store) == {}
    lock.release()
    assert pruned(project, store) == {"runs": 1}


def test_what_a_live_server_has_loaded_is_in_use(project: Project, store: Store) -> None:
    for number in (1, 2):
        make_version(project, store, number, make_run(project, store, f"m-{number}"), "fail")
    with store.writing() as connection:
        body = json.dumps({"loaded": ["m@1"], "routes": {}})
        connection.execute("INSERT INTO servers VALUES ('server', 0, ?, ?)", (time.time(), body))
    assert pruned(project, store) == {}


def test_folders_of_runs_that_the_store_never_knew_stay(project: Project, store: Store) -> None:
    folder = project.job_folder("of-another-database")
    folder.mkdir(parents=True)
    make_run(project, store, "m-1")
    assert pruned(project, store) == {"runs": 1}
    assert folder.is_dir()


def test_two_prunes_at_once_are_refused(project: Project, store: Store) -> None:
    held = try_exclusive(project.home / "prune.lock")
    assert held is not None
    with pytest.raises(Conflict, match="another prune"):
        pruning.prune(project, store, pruning.plan_of(project, store, AT_ONCE, time.time()))
    os.close(held)


def test_what_cannot_be_deleted_keeps_nobody_from_the_rest(project: Project, store: Store) -> None:
    make_run(project, store, "m-1")
    make_run(project, store, "m-2")
    # A file where the folder would be renamed to: neither can be taken for the other.
    (project.home / "jobs" / f"{pruning.GONE}m-1").write_text("in the way")
    with pytest.raises(Trouble, match=r"could not be deleted:\n.*m-1"):
        pruning.prune(project, store, pruning.plan_of(project, store, AT_ONCE, time.time() + 1))
    assert {path.name for path in (project.home / "jobs").iterdir()} == {"m-1", f"{pruning.GONE}m-1"}
    (project.home / "jobs" / f"{pruning.GONE}m-1").unlink()
    assert pruned(project, store) == {"leftovers": 1}


def test_a_worker_prunes_once_a_day(project: Project, store: Store) -> None:
    make_run(project, store, "m-1")
    daily = AT_ONCE.model_copy(update={"auto": True})
    time.sleep(0.01)
    assert pruning.prune_daily(project, store, AT_ONCE) is None
    done = pruning.prune_daily(project, store, daily)
    assert done
    assert done.runs.number == 1
    assert pruning.prune_daily(project, store, daily) is None
    lock = project.home / "prune.lock"
    for wrong in (time.time() - 2 * pruning.DAY, time.time() + 400 * pruning.DAY):  # a day is over; a clock was wrong
        os.utime(lock, (wrong, wrong))
        assert pruning.prune_daily(project, store, daily) is not None


def test_the_engine_forgets_pruned_runs_and_their_children(project: Project, either_store: Store) -> None:
    from dbos import DBOS, DBOSClient

    url = project.database_url or f"sqlite:///{project.runs_database}"
    DBOS.migrate(url)
    client = DBOSClient(system_database_url=url, application_name="ft-engine")
    for id_ in ("m-1", "m-1-1", "m-2"):
        client.enqueue({"workflow_name": "finetune", "queue_name": "control", "workflow_id": id_, "app_version": "1"})
    schema = "dbos." if project.database_url else ""
    with client._sys_db.engine.begin() as connection:
        row = "SET parent_workflow_id = 'm-1' WHERE workflow_uuid = 'm-1-1'"
        connection.execute(sqlalchemy.text(f"UPDATE {schema}workflow_status {row}"))
    make_run(project, either_store, "m-1")
    assert pruned(project, either_store) == {"runs": 1}
    assert {each.workflow_id for each in client.list_workflows()} == {"m-2"}
    client.destroy()
    assert either_store.read("SELECT id, forgotten FROM pruned_runs") == [{"id": "m-1", "forgotten": 1}]


def test_a_pruned_runs_folder_in_the_bucket_goes_and_what_jobs_share_stays(
    project: Project, store: Store, s3: WeedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment(tmp_path.name).items():
        monkeypatch.setenv(name, value)
    make_run(project, store, "m-1")
    with closing(open_bucket(s3.settings(tmp_path.name))) as bucket:
        for key in ("jobs/m-1/spec.json", "jobs/m-2/spec.json", "data/d/train.jsonl"):
            bucket.put(key, b"{}")
        assert pruned(project, store) == {"runs": 1}
        assert [each.key for each in bucket.names("")] == ["data/d/train.jsonl", "jobs/m-2/spec.json"]


def whole(folder: Path) -> bool:
    return sum(1 for _ in folder.rglob("*.bin")) == 2 * FILES


def test_killed_in_the_middle_nothing_is_left_by_halves(project: Project, store: Store) -> None:
    ids = [make_run(project, store, f"m-{number:02}", files=FILES) for number in range(40)]
    policy = {name: value for name, value in AT_ONCE.model_dump().items() if name != "auto"}
    (project.root / "ft.yaml").write_text(json.dumps({"keep": policy}))
    time.sleep(1.1)
    kills = 0
    for there in (36, 24, 12):
        with started([sys.executable, *FT, "prune", "--yes"], cwd=project.root) as process:
            while process.poll() is None and len(runs.listed(store, limit=99)) > there:
                time.sleep(0.001)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
        rows = {run.id for run in runs.listed(store, limit=99)}
        told = {row["id"] for row in store.read("SELECT id FROM pruned_runs")}
        assert rows | told == set(ids)
        assert not rows & told
        assert all(whole(project.job_folder(each)) for each in rows)
        halves = [each for each in told if project.job_folder(each).exists() and not whole(project.job_folder(each))]
        assert halves == []
    assert kills == 3
    done = run_bounded([sys.executable, *FT, "prune", "--yes"], 60, cwd=project.root)
    assert done.returncode == 0, done.stderr
    assert list((project.home / "jobs").iterdir()) == []
    assert runs.listed(store) == []
