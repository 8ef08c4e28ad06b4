"""The clock of who waits for a person."""

from __future__ import annotations

import pytest

from jobs.approval import jump_between


@pytest.mark.parametrize(
    ("before", "now", "jumped"),
    [
        ((1000.0, 5.0), (1000.5, 5.5), 0.0),
        ((1000.0, 5.0), (1030.0, 5.5), 0.0),  # set right by a time server
        ((1000.0, 5.0), (87400.5, 5.5), 86400.0),  # a day ahead, or the machine slept
        ((87400.0, 5.0), (1000.5, 5.5), -86400.0),
        ((1000.0, 5.0), (1300.0, 305.0), 0.0),  # nobody looked for five minutes
    ],
)
def test_only_a_jump_of_the_wall_clock_is_one(
    before: tuple[float, float], now: tuple[float, float], jumped: float
) -> None:
    assert jump_between(before, now) == pytest.approx(jumped)
