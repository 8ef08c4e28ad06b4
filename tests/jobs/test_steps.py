"""A step whose database goes away is attempted again, and not for ever."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from jobs import steps
from registry.errors import JobError, StoreError


@dataclass
class Attempts:
    """Fails so many times with `error`, then says how many attempts it took."""

    failing: int
    error: Exception
    made: int = 0

    async def __call__(self) -> int:
        self.made += 1
        if self.made <= self.failing:
            raise self.error
        return self.made


def test_a_database_that_comes_back_costs_an_attempt() -> None:
    assert asyncio.run(steps.while_store_returns(Attempts(2, StoreError("gone")))) == 3


def test_a_database_that_stays_away_ends_the_step() -> None:
    attempts = Attempts(99, StoreError("gone"))
    with pytest.raises(StoreError):
        asyncio.run(steps.while_store_returns(attempts))
    assert attempts.made == steps.LOST_STORES + 1


def test_other_errors_are_not_for_trying_again() -> None:
    attempts = Attempts(1, JobError("bad data"))
    with pytest.raises(JobError):
        asyncio.run(steps.while_store_returns(attempts))
    assert attempts.made == 1
