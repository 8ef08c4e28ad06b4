"""Who calls: keys in memory as the store has them, and how often each may ask."""

from __future__ import annotations

from typing import Any

import pytest

from registry.api_keys import add_key, forget_key, revoke_key, rotate_key
from registry.errors import WrongInput
from registry.store import Store
from serving.callers import ANYBODY, INTERNAL, Bucket, Callers
from serving.http_messages import Refusal

INTERNAL_KEY = "internal-key"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


def add(store: Store, name: str = "shop", **more: Any) -> str:
    return add_key(store, name, **{"routes": None, "rate": None, "by_whom": "test", **more})


def refused(callers: Callers, given: bytes, **more: Any) -> bool:
    try:
        callers.who(given, **more)
    except Refusal as refusal:
        return (refusal.status, refusal.code) == (401, "invalid_api_key")
    return False


def test_without_any_key_anybody_may_ask_here() -> None:
    callers = Callers(INTERNAL_KEY)
    assert callers.who(b"") is ANYBODY
    assert callers.who(bearer("whatever-a-client-sends")) is ANYBODY
    assert callers.who(bearer(INTERNAL_KEY)) is INTERNAL
    assert refused(callers, b"", required=True)
    assert refused(Callers(INTERNAL_KEY, required=True), bearer("x"))


def test_from_the_first_key_on_one_is_needed(store: Store) -> None:
    callers = Callers(INTERNAL_KEY)
    key = add(store, routes=("support",))
    callers.refresh(store)
    caller = callers.who(bearer(key))
    assert (caller.name, caller.internal, caller.may("support"), caller.may("tickets")) == ("shop", False, True, False)
    assert callers.who(key.encode().join([b"bearer ", b" "])) == caller
    assert callers.who(bearer(INTERNAL_KEY)) is INTERNAL
    for wrong in (b"", b"Bearer", b"Bearer ", bearer(key[:-1]), bearer(key + "x"), f"Basic {key}".encode(),
                  key.encode(), bearer(key.upper()), b"\xff\xfe"):  # fmt: skip
        assert refused(callers, wrong)


def test_a_key_that_was_taken_back_opens_nothing(store: Store) -> None:
    callers = Callers(INTERNAL_KEY)
    old = add(store)
    new = rotate_key(store, "shop", by_whom="test")
    callers.refresh(store)
    assert refused(callers, bearer(old))
    assert callers.who(bearer(new)).name == "shop"
    revoke_key(store, "shop")
    callers.refresh(store)
    assert refused(callers, bearer(new))
    assert refused(callers, b""), "the last key was revoked, and everybody could ask"
    forget_key(store, "shop")
    callers.refresh(store)
    assert callers.who(b"") is ANYBODY


def test_how_often_a_key_may_ask(store: Store) -> None:
    clock = Clock()
    callers = Callers(INTERNAL_KEY, now=clock)
    caller = callers_key(callers, store, rate=(3, 60.0))
    other = callers_key(callers, store, name="other")
    for _ in range(3):
        callers.charge(caller)
    with pytest.raises(Refusal) as refusal:
        callers.charge(caller)
    assert (refusal.value.status, refusal.value.code, refusal.value.retry_after) == (429, "rate_limit_exceeded", 20)
    for _ in range(100):
        callers.charge(other)
        callers.charge(INTERNAL)
        callers.charge(ANYBODY)
    clock.now += 20.1
    callers.refresh(store)  # a refresh gives nobody a new allowance
    callers.charge(caller)
    with pytest.raises(Refusal):
        callers.charge(caller)


def test_no_key_passes_for_the_internal_one(store: Store) -> None:
    """Figures and logs call that one `internal`."""
    with pytest.raises(WrongInput, match="a meaning of its own"):
        add(store, name="internal")


def callers_key(callers: Callers, store: Store, **given: Any) -> Any:
    key = add(store, **given)
    callers.refresh(store)
    return callers.who(bearer(key))


def test_a_bucket_fills_no_further_than_its_brim() -> None:
    bucket = Bucket(rate=1.0, burst=2, now=0.0)
    assert [bucket.take(1000.0) for _ in range(3)] == [0.0, 0.0, 1.0]
    assert bucket.take(1000.5) == pytest.approx(0.5)
    assert bucket.take(1001.0) == 0.0
