"""A store that is away for a moment fails no run; one that stays away does."""

from __future__ import annotations

import asyncio
import time

import pytest

from jobs.outages import Outage, repeated, through_outage
from registry.errors import Conflict, StoreError


def failing(times: int, error: Exception) -> tuple[list[float], object]:
    calls: list[float] = []

    def call(word: str = "done") -> str:
        calls.append(time.monotonic())
        if len(calls) <= times:
            raise error
        return word

    return calls, call


def test_it_is_tried_again_until_the_store_is_back(capfd: pytest.CaptureFixture[str]) -> None:
    calls, call = failing(2, StoreError("away"))
    assert asyncio.run(through_outage(call, "back")) == "back"  # type: ignore[arg-type]
    assert len(calls) == 3
    assert calls[2] - calls[1] > calls[1] - calls[0] > 0.4
    assert capfd.readouterr().err.count("waits until it can be used again: away") == 1


def test_its_patience_ends() -> None:
    calls, call = failing(99, StoreError("away"))

    async def work() -> object:
        return call()  # type: ignore[operator]

    began = time.monotonic()
    with pytest.raises(StoreError, match="away"):
        asyncio.run(repeated(work, patience=1.0))
    assert 1.0 < time.monotonic() - began < 10
    assert len(calls) >= 3


def test_other_errors_come_through_at_once() -> None:
    calls, call = failing(9, Conflict("no"))
    with pytest.raises(Conflict):
        asyncio.run(through_outage(call))  # type: ignore[arg-type]
    assert len(calls) == 1


def test_a_second_outage_hours_later_has_patience_of_its_own() -> None:
    async def go() -> None:
        outage = Outage(patience=0.7)
        await outage.wait(StoreError("one"))
        await outage.wait(StoreError("one"))
        with pytest.raises(StoreError):
            await outage.wait(StoreError("one"))
        await asyncio.sleep(0.8)
        await outage.wait(StoreError("two"))

    asyncio.run(go())
