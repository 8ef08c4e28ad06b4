"""Keys of callers: shown once, kept as digests, rotated, revoked."""

from __future__ import annotations

import hashlib

import pytest

from registry.api_keys import add_key, api_keys, forget_key, parse_rate, revoke_key, rotate_key
from registry.errors import Conflict, NotFound, WrongInput
from registry.store import Store


def test_a_key_is_nowhere_in_the_store(either_store: Store) -> None:
    key = add_key(either_store, "shop", routes=("support", "auto"), rate=(60, 60.0), by_whom="kim")
    [found] = api_keys(either_store)
    assert key.startswith("ft-")
    assert len(key) >= 3 + 43  # 256 bits
    assert found.digest == hashlib.sha256(key.encode()).hexdigest()
    assert (found.routes, found.rate, found.burst, found.by_whom) == (("support", "auto"), 1.0, 60, "kim")
    assert key not in str(either_store.read("SELECT * FROM api_keys"))


def test_a_name_is_one_key_until_it_is_revoked(either_store: Store) -> None:
    first = add_key(either_store, "shop", routes=None, rate=None, by_whom="kim")
    with pytest.raises(Conflict, match="rotate"):
        add_key(either_store, "shop", routes=None, rate=None, by_whom="kim")
    second = rotate_key(either_store, "shop", by_whom="lee")
    assert first != second
    [found] = api_keys(either_store)
    assert (found.digest, found.by_whom) == (hashlib.sha256(second.encode()).hexdigest(), "lee")
    revoke_key(either_store, "shop")
    assert [each.revoked is None for each in api_keys(either_store)] == [False]
    for change in (lambda: revoke_key(either_store, "shop"), lambda: rotate_key(either_store, "shop", by_whom="lee")):
        with pytest.raises(NotFound):
            change()
    add_key(either_store, "shop", routes=None, rate=None, by_whom="kim")
    assert [each.revoked for each in api_keys(either_store)] == [None]


def test_a_forgotten_key_has_never_been(store: Store) -> None:
    add_key(store, "shop", routes=None, rate=None, by_whom="kim")
    revoke_key(store, "shop")
    forget_key(store, "shop")
    assert api_keys(store) == []
    with pytest.raises(NotFound):
        forget_key(store, "shop")


@pytest.mark.parametrize("name", ["", "Two Words", "a/b", "ü", "a" * 300, "x\ny", "internal"])
def test_a_name_is_a_plain_one(store: Store, name: str) -> None:
    with pytest.raises(WrongInput):
        add_key(store, name, routes=None, rate=None, by_whom="kim")
    assert api_keys(store) == []


def test_rates() -> None:
    assert [parse_rate(each) for each in ("5/s", "60/m", "1000/h")] == [(5, 1.0), (60, 60.0), (1000, 3600.0)]
    for wrong in ("", "5", "0/s", "5/d", "-1/s", "1.5/s", "5 / s", "9" * 9 + "/s"):
        with pytest.raises(WrongInput, match="not a rate"):
            parse_rate(wrong)
