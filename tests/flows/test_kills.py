"""kill -9 of worker or trainer at ten random moments of one run."""

from __future__ import annotations

import json

import pytest

from tests.flows.conftest import Person
from tests.flows.kills import holds, sweep

# MLflow uses what SQLAlchemy calls deprecated.
pytestmark = pytest.mark.filterwarnings("default")

KILLS = 10


@pytest.mark.engine
@pytest.mark.training
@pytest.mark.timeout(1800)
def test_ten_kills_in_one_run(person: Person) -> None:
    figures = sweep(person, KILLS, seed=20261121)
    assert holds(figures), json.dumps(figures, indent=1)
    assert figures["kills"] >= 5, "the run ended before most of the kills: spread them closer"
