"""Every point of the kill sweep names a function that is there: one that was renamed would never be come to."""

from __future__ import annotations

import importlib
from functools import reduce

import pytest

from tests.flows.points import IN_POD, LENT, POINTS, Point


@pytest.mark.parametrize("place", sorted({each.place for each in (*POINTS, *LENT, *IN_POD)}))
def test_the_place_of_a_point_is_there(place: str) -> None:
    point = next(each for each in (*POINTS, *LENT, *IN_POD) if each.place == place)
    assert callable(reduce(getattr, _parts(point), importlib.import_module(point.module)))


def _parts(point: Point) -> list[str]:
    return [part for part in point.function.split(".") if part != "<locals>"]
