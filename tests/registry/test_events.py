"""The event log: appended once by (source, id), in order, together with the change that it tells of."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress

from registry.events import TOGETHER, append, append_all, append_within, find, new_event, read
from registry.project import Project
from registry.store import Store
from tests.conftest import started

# All append the same fifty events, and fifty of their own.
APPEND = """
import sys
from registry.events import append, new_event
from registry.project import find_project
from registry.store import open_store
store, mine = open_store(find_project()), 0
for n in range(50):
    mine += append(store, new_event("shared", "tick", "t", {}, key=str(n)))
    append(store, new_event(sys.argv[1], "tick", "own", {"n": n}, key=str(n)))
print(mine)
"""


def test_processes_append_each_event_exactly_once(store: Store, project: Project) -> None:
    with ExitStack() as stack:
        commands = [[sys.executable, "-c", APPEND, f"process {n}"] for n in range(3)]
        running = [stack.enter_context(started(command, cwd=project.root)) for command in commands]
        appended = [int(process.communicate(timeout=120)[0]) for process in running]
    assert sum(appended) == 50
    events = read(store)
    assert len(events) == len({(event.source, event.id) for event in events}) == 200
    assert [event.seq for event in events] == sorted({event.seq for event in events})
    for n in range(3):
        own = [event.data["n"] for event in events if event.source == f"process {n}"]
        assert own == list(range(50))


def test_the_same_key_from_another_source_is_another_event(store: Store) -> None:
    assert append(store, new_event("a", "t", "s", {}, key="1"))
    assert not append(store, new_event("a", "other type", "s", {"x": 1}, key="1"))
    assert append(store, new_event("b", "t", "s", {}, key="1"))
    assert append(store, new_event("a", "t", "s", {}))  # without a key, each is new
    assert append(store, new_event("a", "t", "s", {}))


def test_an_event_is_not_there_when_its_change_is_not(store: Store) -> None:
    with suppress(KeyError), store.writing() as connection:
        assert append_within(connection, new_event("a", "t", "s", {}, key="1"))
        raise KeyError
    assert read(store) == []


def test_reading_takes_a_part(store: Store) -> None:
    for n in range(6):
        append(store, new_event("a", "odd" if n % 2 else "even", f"s{n % 3}", {"ü": [n, None]}))
    assert [event.data["ü"][0] for event in read(store, type_="odd")] == [1, 3, 5]
    assert [event.data["ü"][0] for event in read(store, subject="s1")] == [1, 4]
    second = read(store, limit=2)[-1]
    assert [event.data["ü"][0] for event in read(store, after=second.seq, limit=2)] == [2, 3]
    assert second.data == {"ü": [1, None]}


def test_many_are_appended_in_their_order_and_each_says_whether_it_was_new(store: Store) -> None:
    append(store, new_event("a", "t", "s", {}, key="3"))
    keys = [str(n) for n in range(2 * TOGETHER + 1)]
    wanted = [new_event("a", "t", "s", {"n": key}, key=key) for key in [*keys, "7", "7", str(TOGETHER + 50)]]
    assert append_all(store, wanted) == [key != "3" for key in keys] + [False] * 3
    assert [event.id for event in read(store)] == ["3", *(key for key in keys if key != "3")]
    twice = [new_event("b", "t", "s", {}, key="1"), new_event("b", "t", "s", {}, key="1")]
    assert append_all(store, twice) == [True, False]
    assert append_all(store, []) == []


def test_of_many_none_is_there_when_one_cannot_be(store: Store) -> None:
    with suppress(UnicodeError):
        append_all(store, [new_event("a", "t", "s", {}), new_event("a", "t", "s", {"half": "\ud800"})])
        raise AssertionError("half a character was taken")
    assert read(store) == []


def test_an_id_is_found_in_every_source(store: Store) -> None:
    assert find(store, "e1") == []
    for source in ("z", "app", "github", "app/2"):
        append(store, new_event(source, "external.x", "", {}, key="e1"))
        append(store, new_event(source, "external.x", "", {}, key="e2"))
    assert [each.source for each in find(store, "e1")] == ["z", "app", "github", "app/2"]
    assert find(store, "e3") == []
