"""The last of the tests that share one server with a real vLLM: it kills that server."""

from __future__ import annotations

import os
import signal

import pytest

from registry.cards import try_lock
from serving.control import server_status, stop_server
from serving.server_record import is_gone
from tests.serving.conftest import Served
from tests.serving.test_swap import members, wait_until

pytestmark = pytest.mark.engine


def test_no_engine_outlives_a_killed_server(served: Served) -> None:
    status = served.status
    assert status.engine_pid is not None
    os.kill(status.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(served.store), 10, "the server's lock is free")
    assert server_status(served.store) is None
    assert not stop_server(served.store, served.settings)
    wait_until(lambda: not members(status.engine_pid), 30, "its engine has ended")
    lock = try_lock(served.project, served.card, "next")
    assert lock is not None
    lock.release()
