"""Somebody moves `champion` in a real MLflow; the worker's watch answers, and survives being killed anywhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.mlflow_aliases import AliasWatch
from jobs.tell_mlflow import tell_the_rest
from registry import adapters
from registry.events import append, new_event, read
from registry.mlflow_mirror import mirror
from registry.mlflow_store import Tracker
from registry.project import Project
from registry.store import Store
from tests.conftest import run_bounded
from tests.mlflow_server import free_port, mlflow_server

# MLflow and SQLAlchemy warn of their own deprecations, which are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

# Killed by itself at a moment that is named: after the decision, after MLflow's alias was put back, before it is noted.
KILLED = """
import os, signal, sys
from jobs.mlflow_aliases import AliasWatch
from registry.project import find_project
from registry.store import open_store
moment, calls = sys.argv[1], []
def watch(frame, event, argument):
    if event == "call" and frame.f_code.co_name == moment:
        os.kill(os.getpid(), signal.SIGKILL)
sys.setprofile(watch)
project = find_project()
AliasWatch(project, open_store(project)).look()
"""


def add(
    store: Store, tracker: Tracker, project: Project, number: int, against: int | None, *, passed: bool = True
) -> None:
    recipe = {
        "kind": "finetune", "name": "m", "model": "m", "base": {"model": "org/base"},
        "data": {"path": "datasets/m"}, "evaluate": {"task": "label"},
    }  # fmt: skip
    with tracker._client("") as client:
        if number == 1:
            client.create_registered_model("m")
        client.create_model_version("m", source=str(project.root), run_id=None)
    adapters.add_version(store, "m", number, f"run-{number}", f"adapters/m/{number}", {"recipe": recipe})
    verdict = adapters.add_verdict(
        store, "m", number, "pass" if passed else "fail", {"champion": against, "checks": []}, None
    )
    if number == 1:
        adapters.promote(store, verdict, by_whom="ann")


@pytest.fixture
def tracker(project: Project, store: Store) -> Tracker:
    """Version 1 is champion, 2 has passed against it, 3 has failed; MLflow knows."""
    tracker = Tracker(project)
    for number, passed in ((1, True), (2, True), (3, False)):
        add(store, tracker, project, number, None if number == 1 else 1, passed=passed)
    mirror(store, tracker, "m")
    return tracker


def move(tracker: Tracker, version: int | None) -> None:
    """As a person does it."""
    with tracker._client("") as client:
        if version is None:
            client.delete_registered_model_alias("m", "champion")
        else:
            client.set_registered_model_alias("m", "champion", str(version))


def in_mlflow(tracker: Tracker) -> dict[str, int]:
    return tracker.aliases("m") or {}


def tag(tracker: Tracker, version: int) -> str | None:
    with tracker._client("") as client:
        return client.get_model_version("m", str(version)).tags.get("ft.refused")  # type: ignore[no-any-return]


def types(store: Store) -> list[str]:
    return [each.type for each in read(store) if each.type.startswith(("alias.", "adapter.promoted", "adapter.rolled"))]


def test_what_a_person_asks_for_is_done_and_told(project: Project, store: Store, tracker: Tracker) -> None:
    watch = AliasWatch(project, store)
    watch.look()
    assert types(store) == ["adapter.promoted"]
    move(tracker, 2)
    watch.look()
    assert adapters.aliases(store, "m")["champion"] == 2
    assert in_mlflow(tracker) == {"champion": 2, "previous": 1, "candidate": 3}
    move(tracker, 1)
    watch.look()
    watch.look()
    assert in_mlflow(tracker) == {"champion": 1, "previous": 2, "candidate": 3}
    assert types(store) == [
        "adapter.promoted", "alias.requested", "adapter.promoted", "alias.requested", "adapter.rolled_back",
    ]  # fmt: skip


def test_what_is_refused_is_put_back_and_the_reason_stands_beside_it(
    project: Project, store: Store, tracker: Tracker
) -> None:
    with tracker._client("") as client:
        client.create_model_version("m", source=str(project.root), run_id=None)  # 4, by hand
        client.set_registered_model_alias("m", "other", "3")
    watch = AliasWatch(project, store)
    for wanted, reason in ((3, "no passing verdict (fail)"), (4, "ft has no version m@4"), (None, "")):
        move(tracker, wanted)
        watch.look()
        assert in_mlflow(tracker) == {"champion": 1, "candidate": 3, "other": 3}
        assert wanted is None or reason in (tag(tracker, wanted) or "")
        watch.look()
    assert types(store) == ["adapter.promoted", *["alias.requested", "alias.refused"] * 3]


def test_a_first_champion_that_is_refused_is_taken_away(project: Project, store: Store) -> None:
    tracker = Tracker(project)
    with tracker._client("") as client:
        client.create_registered_model("m")
        client.create_model_version("m", source=str(project.root), run_id=None)
    adapters.add_version(store, "m", 1, "run-1", "adapters/m/1", {"recipe": {
        "kind": "finetune", "name": "m", "model": "m", "base": {"model": "org/base"},
        "data": {"path": "datasets/m"}, "evaluate": {"task": "label"}}})  # fmt: skip
    mirror(store, tracker, "m")
    move(tracker, 1)
    AliasWatch(project, store).look()
    assert in_mlflow(tracker) == {"candidate": 1}
    assert "never judged" in (tag(tracker, 1) or "")


@pytest.mark.parametrize(
    ("moment", "wanted"),
    [("decide_request", 2), ("tell_alias", 2), ("end_telling", 2), ("set_alias", 3), ("tag_refused", 3),
     ("mark_refusal_told", 3)],
)  # fmt: skip
def test_killed_anywhere_it_is_decided_once(
    moment: str, wanted: int, project: Project, store: Store, tracker: Tracker
) -> None:
    move(tracker, wanted)
    done = run_bounded([sys.executable, "-c", KILLED, moment], 120, cwd=project.root)
    assert done.returncode == -9, done.stderr
    for _ in range(2):
        tell_the_rest(project, store)
        AliasWatch(project, store).look()
    champion = 2 if wanted == 2 else 1
    assert adapters.aliases(store, "m")["champion"] == in_mlflow(tracker)["champion"] == champion
    assert types(store)[1:] == ["alias.requested", "adapter.promoted" if wanted == 2 else "alias.refused"]
    assert (tag(tracker, 3) is not None) == (wanted == 3)


def test_what_ft_does_itself_is_never_taken_for_a_person(project: Project, store: Store, tracker: Tracker) -> None:
    """Promotions and rollbacks are told to MLflow while it is watched without a pause."""
    watch, over = AliasWatch(project, store), threading.Event()

    def look() -> None:
        while not over.is_set():
            watch.look()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for n in range(12):
            verdict = adapters.add_verdict(
                store, "m", 2, "pass", {"champion": adapters.aliases(store, "m")["champion"], "checks": []}, None
            )
            adapters.promote(store, verdict, by_whom="ann", person=True)
            if n % 2:
                tell_the_rest(project, store)
            adapters.roll_back(store, "m", by_whom="ann", to=1)
            tell_the_rest(project, store)
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    tell_the_rest(project, store)
    assert in_mlflow(tracker)["champion"] == 1
    assert [each for each in types(store) if each.startswith("alias.")] == []


def test_one_that_is_away_is_left_alone_and_a_hint_makes_it_look_at_once(
    project: Project, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    tracker = Tracker(project)
    with mlflow_server(port, tmp_path / "server"):
        with Tracker(project, f"sqlite:///{tmp_path}/server/mlflow.db")._client("") as client:
            client.create_registered_model("m")
            for _ in range(2):
                client.create_model_version("m", source=str(project.root), run_id=None)
        for number in (1, 2):
            _add_known(store, number)
        mirror(store, tracker, "m")
        threading.Thread(target=AliasWatch(project, store).run, daemon=True).start()
        time.sleep(2)
        move(tracker, 2)
        began = time.monotonic()
        append(store, new_event("mlflow", "external.mlflow.model_version_alias.created", "m", {}))
        _wait(lambda: adapters.aliases(store, "m")["champion"] == 2)
        assert time.monotonic() - began < 5, "not only when the time has come"
        _wait(lambda: in_mlflow(tracker) == {"champion": 2, "previous": 1, "candidate": 2})
    watch = AliasWatch(project, store)
    capfd.readouterr()
    watch.look()
    watch.look()
    assert capfd.readouterr().err.count("are not looked at") == 1
    assert types(store).count("alias.requested") == 1


def _add_known(store: Store, number: int) -> None:
    recipe = {
        "kind": "finetune", "name": "m", "model": "m", "base": {"model": "org/base"},
        "data": {"path": "datasets/m"}, "evaluate": {"task": "label"},
    }  # fmt: skip
    adapters.add_version(store, "m", number, f"run-{number}", f"adapters/m/{number}", {"recipe": recipe})
    before = None if number == 1 else 1
    verdict = adapters.add_verdict(store, "m", number, "pass", {"champion": before, "checks": []}, None)
    if number == 1:
        adapters.promote(store, verdict, by_whom="ann")


def _wait(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)
