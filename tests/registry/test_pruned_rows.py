"""Pruning in the store, on both databases: what is deleted stays known, and what is wanted again stays."""

from __future__ import annotations

import time
from typing import Any

import pytest

from registry import adapters, pruned_rows, runs
from registry.decisions import past_of
from registry.errors import NotFound, StoreError
from registry.events import Event, advance, append, causes, find, new_event, newest, read
from registry.migrations import AFTERWARDS, PRUNED
from registry.scores import Scored, find_score, keep_score
from registry.store import Store
from registry.triggers import Subscriber, Triggers

RECIPE = {"name": "m", "model": "m"}
FILTERS: list[dict[str, Any]] = [{}, {"recipe": "m"}, {"active": True}, {"recipe": "m", "active": True}, {"limit": 1}]


def ended(store: Store, run_id: str, state: runs.State = "succeeded", cause: str | None = None) -> str:
    with store.writing() as connection:
        runs.submit_within(connection, run_id, RECIPE, "recipes/m.yaml", "d", cause)
    runs.end_step(store, run_id, "train", runs.begin_step(store, run_id, "train", "step"))
    runs.finish(store, run_id, state)
    return run_id


def register(store: Store, number: int, run_id: str, outcome: str = "pass") -> adapters.Verdict:
    adapters.add_version(store, "m", number, run_id, f"adapters/m/{number}", {})
    champion = adapters.aliases(store, "m").get("champion")
    return adapters.add_verdict(store, "m", number, outcome, {"champion": champion}, None)


def test_a_run_that_was_pruned_is_told_of(store: Store) -> None:
    append(store, new_event("github", "external.push", "", {"branch": "main"}, key="p1"))
    run_id = ended(store, "m-1234567890", cause="github p1")
    assert pruned_rows.delete_run(store, run_id)
    assert not pruned_rows.delete_run(store, run_id)
    assert (runs.listed(store), runs.steps(store, run_id)) == ([], [])
    with pytest.raises(NotFound, match=r"m-1234567890 \(succeeded\) was pruned on 20"):
        runs.get(store, run_id)
    submitted = next(each for each in find(store, run_id) if each.type == "run.submitted")
    assert [each.ref for each in causes(store, submitted)] == ["github p1"]


@pytest.mark.parametrize("state", ["succeeded", "failed"])
def test_a_run_that_is_wanted_again_stays(store: Store, state: runs.State) -> None:
    run_id = ended(store, "m-1", state)
    runs.set_wish(store, run_id, "resume")
    assert pruned_rows.busy_runs(store) == {run_id}
    assert not pruned_rows.delete_run(store, run_id)
    assert not pruned_rows.give_up_folder(store, run_id)
    assert runs.get(store, run_id).pruned is None


def test_the_run_of_a_version_that_was_named_meanwhile_stays(store: Store) -> None:
    register(store, 1, ended(store, "m-1"))  # its candidate
    assert not pruned_rows.delete_run(store, "m-1")
    register(store, 2, ended(store, "m-2"))
    assert pruned_rows.delete_run(store, "m-1")


def test_a_job_folder_is_given_up_once(store: Store) -> None:
    run_id = ended(store, "m-1")
    assert pruned_rows.give_up_folder(store, run_id)
    assert not pruned_rows.give_up_folder(store, run_id)
    assert pruned_rows.folders_given_up(store) == ({run_id}, [])


def test_an_adapter_that_was_pruned_cannot_be_promoted(store: Store) -> None:
    failed = register(store, 1, "m-1", "fail")
    assert not pruned_rows.give_up_adapter(store, "m@1"), "it is the candidate"
    for number in (2, 3):
        adapters.promote(store, register(store, number, f"m-{number}"), by_whom="ann")
    assert pruned_rows.give_up_adapter(store, "m@1")
    assert not pruned_rows.give_up_adapter(store, "m@2")
    assert pruned_rows.folders_given_up(store) == (set(), ["adapters/m/1"])
    with pytest.raises(NotFound, match="m@1 was pruned on"):
        adapters.promote(store, failed, by_whom="ann", person=True)
    with pytest.raises(NotFound, match="m@1 was pruned on"):
        adapters.roll_back(store, "m", by_whom="ann", to=1)
    assert adapters.aliases(store, "m") == {"candidate": 3, "champion": 3, "previous": 2}


def test_a_version_that_failed_and_passed_later_stays(store: Store) -> None:
    for number in (1, 2):
        register(store, number, f"m-{number}", "fail")
    adapters.add_verdict(store, "m", 1, "pass", {}, None)
    assert not pruned_rows.give_up_adapter(store, "m@1")


def test_until_when_a_version_was_champion(store: Store) -> None:
    for number in (1, 2, 3):
        adapters.promote(store, register(store, number, f"m-{number}"), by_whom="ann")
    adapters.roll_back(store, "m", by_whom="ann", to=1)
    moves = [each.created for each in adapters.promotions(store)]
    found = pruned_rows.known_versions(store, {"m@2"}, 9e9)
    assert [each.champion_until for each in found] == [9e9, moves[2], moves[3]]
    assert [(each.aliased, each.loaded) for each in found] == [(True, False), (False, True), (True, False)]


def emptied(store: Store, before: float, **kept: Any) -> list[int]:
    pages = pruned_rows.old_events(
        store, before, pruned_rows.passed_by_all(store, ["chat"]), kept.get("kept", ()), kept.get("causing", ())
    )
    numbers = [number for page in pages for number, _ in page]
    pruned_rows.empty_events(store, numbers)
    return numbers


def test_a_pruned_event_is_still_known(store: Store) -> None:
    event = new_event("github", "external.push", "main", {"big": "x" * 100}, key="p1")
    append(store, event)
    advance(store, "triggers", 1)
    assert emptied(store, time.time() + 1) == [1]
    assert emptied(store, time.time() + 1) == []
    [found] = read(store)
    assert (found.data, found.pruned, found.time, found.subject) == ({}, True, event.time, "main")
    assert found.as_dict()["ftpruned"] is True
    assert not append(store, event), "it is never accepted twice"


def test_an_event_that_a_reader_has_not_passed_keeps_its_data(store: Store) -> None:
    for number in range(4):
        append(store, new_event("a", "external.x", "", {"n": number}, key=str(number)))
    advance(store, "triggers", 4)
    advance(store, "sink:chat", 2)
    advance(store, "sink:one that ft.yaml no longer has", 1)
    assert emptied(store, time.time() + 1) == [1, 2]


def test_an_event_that_still_waits_for_a_sink_keeps_its_data(store: Store) -> None:
    for number in range(2):
        append(store, new_event("a", "external.x", "", {"n": number}, key=str(number)))
    advance(store, "triggers", 2)
    with store.writing() as connection:
        connection.execute("INSERT INTO outbox (sink, seq, state, due) VALUES ('chat', 1, 'waiting', 0)")
    assert emptied(store, time.time() + 1) == [2]


def test_a_paused_run_is_not_over(store: Store) -> None:
    ended(store, "m-1")
    with store.writing() as connection:
        connection.execute("UPDATE runs SET state = 'paused'")
    assert pruned_rows.busy_runs(store) == {"m-1"}
    assert not pruned_rows.delete_run(store, "m-1")


def test_events_of_what_is_kept_and_those_that_led_to_it_keep_their_data(store: Store) -> None:
    for key in ("p1", "p2"):
        append(store, new_event("github", "external.push", key, {"branch": "main"}, key=key))
    ended(store, "m-1", cause="github p1")
    ended(store, "m-2", cause="github p2")
    advance(store, "triggers", 99)
    causing = pruned_rows.causes_of(store, ["m-1"])
    emptied(store, time.time() + 1, kept={"m-1"}, causing=causing)
    assert {each.subject for each in read(store) if each.pruned} == {"p2", "m-2"}


def test_feedback_counts_after_its_data_are_gone(store: Store) -> None:
    for rating in (5, 1, 4, 5, None, "5", True):
        append(store, new_event("app", "feedback.received", "m@1", {"rating": rating} if rating else {"tags": ["a"]}))
    advance(store, "triggers", 9)
    emptied(store, time.time() + 1)

    def count(**wanted: Any) -> int:
        on = Subscriber("m", "m", "datasets/m", Triggers.model_validate({"feedback": wanted}))
        return past_of(store, on, newest(store, 1)[0], time.time()).feedback

    assert count(count=9) == 7
    assert count(count=9, min_rating=4) == 3
    assert count(count=2, min_rating=4) == 2, "more than are asked for are not looked at"
    assert count(count=2, min_rating=4, since_last_run=False) == 3


def test_a_circle_is_found_when_the_data_of_its_events_are_gone(store: Store) -> None:
    ended(store, "my-m-1234567890")
    advance(store, "triggers", 9)
    emptied(store, time.time() + 1)
    on = Subscriber("other", "m", "datasets/m", Triggers.model_validate({"recipe": "changed"}))
    event = Event("ft/adapters", "x", "adapter.judged", "m@1", time.time(), {}, "ft/runs my-m-1234567890", 9)
    assert past_of(store, on, event, time.time()).chain == ("my-m",)


def test_kept_scores_go_unless_they_are_of_a_version_in_use(store: Store) -> None:
    for key, subject in (("a", "m@1"), ("b", "m@2"), ("c", "base")):
        keep_score(store, key, Scored(subject, None), [])
    now = time.time() + 1
    old = dict(pruned_rows.old_scores(store, now, {"m@1"}))
    assert set(old) == {"b", "c"}
    assert [pruned_rows.delete_score(store, key, now) for key in old] == [1, 1]
    assert find_score(store, "a")
    assert list(pruned_rows.old_scores(store, now - 100, ())) == []


@pytest.mark.parametrize("text", ["{broken", "[1]", ""])
def test_an_event_that_was_damaged_by_hand_is_named(store: Store, text: str) -> None:
    append(store, new_event("a", "external.x", "", {}, key="e1"))
    with store.writing() as connection:
        connection.execute("UPDATE events SET data = ?", (text,))
    with pytest.raises(StoreError, match=r"event 1 \(a e1\) is damaged"):
        read(store)


def test_what_was_deleted_is_given_back(sqlite_store: Store) -> None:
    for number in range(50):
        append(sqlite_store, new_event("a", "external.x", "", {"big": "x" * 20_000}, key=str(number)))
    advance(sqlite_store, "triggers", 50)
    emptied(sqlite_store, time.time() + 1)
    database = sqlite_store.home / "ft.db"

    def size() -> int:
        sqlite_store.read("PRAGMA wal_checkpoint(TRUNCATE)")
        return database.stat().st_size

    before = size()
    sqlite_store.database.give_back()
    assert size() < before / 2
    sqlite_store.database.give_back(whole=True)
    assert len(read(sqlite_store)) == 50


def test_events_of_an_older_ft_get_their_rating(store: Store) -> None:
    ratings: list[dict[str, Any]] = [{"rating": 4}, {"tags": ["a"]}, {"rating": 2.5}]
    for number, data in enumerate(ratings):
        append(store, new_event("app", "feedback.received", "m@1", data, key=str(number)))
    append(store, new_event("app", "external.x", "", {"rating": 1}, key="other"))
    append(store, new_event("app", "feedback.received", "m@1", {}, key="damaged"))
    with store.writing() as connection:
        connection.execute("UPDATE events SET rating = NULL")
        connection.execute("UPDATE events SET data = '{broken' WHERE id = 'damaged'")
        AFTERWARDS[PRUNED](connection)
    assert [row["rating"] for row in store.read("SELECT rating FROM events ORDER BY seq")] == [4, None, 2.5, None, None]


def test_the_beginning_of_an_id_finds_its_run_and_nothing_else(store: Store) -> None:
    for id_ in ("m-12", "m-1234", "m-2", "m_1", "n-1"):
        ended(store, id_)
    assert [runs.get(store, each).id for each in ("m-2", "m-12", "m-123", "n", "m_")] == [
        "m-2", "m-12", "m-1234", "n-1", "m_1",
    ]  # fmt: skip
    for wrong, said in (("m-1", "the beginning of 2 runs"), ("m%", "no run"), ("", "no run"), ("zz", "no run")):
        with pytest.raises(NotFound, match=said):
            runs.get(store, wrong)


def test_runs_are_listed_by_every_filter(store: Store) -> None:
    for id_ in ("m-1", "m-2"):
        ended(store, id_)
    with store.writing() as connection:
        runs.submit_within(connection, "n-1", {"name": "n", "model": "n"}, "recipes/n.yaml", "d")
    listed = [[run.id for run in runs.listed(store, **given)] for given in FILTERS]
    assert listed == [["n-1", "m-2", "m-1"], ["m-2", "m-1"], ["n-1"], [], ["n-1"]]
