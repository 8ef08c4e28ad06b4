"""Many requests, few transactions; every one of them gets its own answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from registry.events import Event, append, new_event, read
from registry.store import Store
from serving.http_messages import Refusal
from serving.inbox import MOST_WAITING, Inbox


def event(key: str, value: str = "") -> Event:
    return new_event("/a", "external.go", "", {"value": value}, key=key)


def test_each_request_hears_which_of_its_events_were_new(store: Store) -> None:
    append(store, event("old"))

    async def post() -> list[list[bool]]:
        wanted = [[event("old"), event(f"own {n}"), event("shared")] for n in range(200)]
        return await asyncio.gather(*(inbox.append(each) for each in wanted))

    inbox = Inbox(store)
    answers = asyncio.run(post())
    inbox.close()
    assert [each[:2] for each in answers] == [[False, True]] * 200
    assert [each[2] for each in answers] == [True, *[False] * 199]
    assert [each.id for each in read(store)][:3] == ["old", "own 0", "shared"]
    assert len(read(store)) == 202


def test_an_event_that_the_database_cannot_take_keeps_no_other_out(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    async def post() -> list[list[bool] | BaseException]:
        wanted = [event("1"), event("2", "\ud800"), event("3")]
        return await asyncio.gather(*(inbox.append([each]) for each in wanted), return_exceptions=True)

    inbox = Inbox(store)
    one, two, three = asyncio.run(post())
    inbox.close()
    assert (one, three) == ([True], [True])
    assert isinstance(two, Refusal)
    assert (two.status, two.retry_after) == (503, 5)
    assert "UnicodeEncodeError" in capsys.readouterr().err
    assert [each.id for each in read(store)] == ["1", "3"]


def test_more_than_it_can_hold_is_refused_at_once(store: Store) -> None:
    async def post() -> None:
        await inbox.append([event(str(n)) for n in range(MOST_WAITING + 1)])

    inbox = Inbox(store)
    with pytest.raises(Refusal, match="0 events wait for the store already"):
        asyncio.run(post())
    inbox.close()
    with pytest.raises(Refusal, match="it is ending"):
        asyncio.run(inbox.append([event("late")]))
    assert read(store) == []


def test_a_store_that_is_gone_is_said_and_one_that_is_back_is_used(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    database = store.home / "ft.db"
    inbox = Inbox(store)
    aside = database.rename(database.with_suffix(".away"))
    database.mkdir()
    with pytest.raises(Refusal, match="cannot be written to"):
        asyncio.run(inbox.append([event("1")]))
    assert "unable to open database file" in inbox.failure
    assert "nothing is appended" in capsys.readouterr().err
    database.rmdir()
    aside.rename(Path(database))
    assert asyncio.run(inbox.append([event("1")])) == [True]
    assert inbox.failure == ""
    inbox.close()
