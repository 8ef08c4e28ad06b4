"""Who calls: the gateway's keys in memory, read again from the store now and then, and how often each may ask."""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from registry.api_keys import ApiKey, api_keys
from registry.store import Store
from serving.http_messages import Refusal

BEARER = b"bearer "


@dataclass(frozen=True)
class Caller:
    """`name` of the key, '' for nobody in particular; `routes` that it may ask, all where None."""

    name: str = ""
    internal: bool = False
    routes: frozenset[str] | None = None

    def may(self, route: str) -> bool:
        return self.routes is None or route in self.routes


ANYBODY, INTERNAL = Caller(), Caller("internal", internal=True)


class Callers:
    """`required`: a key is wanted of everybody; else once there is or was one: revoking the last opens nothing."""

    def __init__(self, internal_key: str, *, required: bool = False, now: Callable[[], float] = time.monotonic) -> None:
        self.required, self._now = required, now
        self._internal = hashlib.sha256(internal_key.encode()).digest()
        self._known: Mapping[bytes, Caller] = {}
        self._has_keys = False
        self._buckets: dict[str, Bucket] = {}

    def refresh(self, store: Store) -> None:
        """Take the store's keys. Reads the store, so off the event loop; raises StoreError, and nothing changes."""
        self.take(api_keys(store))

    def take(self, keys: Iterable[ApiKey]) -> None:
        found = list(keys)
        live = [each for each in found if each.revoked is None]
        buckets = {}
        for each in (each for each in live if each.rate):
            old = self._buckets.get(each.name)
            same = old is not None and (old.rate, old.burst) == (each.rate, each.burst)
            buckets[each.name] = old if old and same else Bucket(each.rate or 1.0, each.burst, self._now())
        self._buckets = buckets
        self._known = {
            bytes.fromhex(each.digest): Caller(
                each.name, routes=None if each.routes is None else frozenset(each.routes)
            )
            for each in live
        }
        self._has_keys = bool(found)

    @property
    def names(self) -> list[str]:
        return sorted(each.name for each in self._known.values())

    def who(self, authorization: bytes, *, required: bool = False) -> Caller:
        """Raises Refusal (401) for a wrong key, and for none where one is wanted."""
        given = authorization[len(BEARER) :].strip() if authorization[: len(BEARER)].lower() == BEARER else b""
        if given:
            # A digest is looked up, never a key: how long that takes says nothing of any key.
            digest = hashlib.sha256(given).digest()
            found = self._known.get(digest)
            if found is not None:
                return found
            if secrets.compare_digest(digest, self._internal):
                return INTERNAL
        if self._has_keys or self.required or required:
            said = "this key is not known" if given else "a key is needed: Authorization: Bearer ft-..."
            raise Refusal(401, said, "invalid_api_key")
        return ANYBODY  # some clients always send a key, were it an empty word

    def is_internal(self, authorization: bytes) -> bool:
        """Never raises."""
        given = authorization[len(BEARER) :].strip()
        return secrets.compare_digest(hashlib.sha256(given).digest(), self._internal)

    def charge(self, caller: Caller) -> None:
        """One request of it. Raises Refusal (429) beyond its rate."""
        bucket = self._buckets.get(caller.name)
        if bucket is not None and not caller.internal:
            wait = bucket.take(self._now())
            if wait > 0:
                raise Refusal(429, f"key '{caller.name}' may ask {bucket.said}", "rate_limit_exceeded",
                              retry_after=math.ceil(wait))  # fmt: skip


class Bucket:
    """Fills with `rate` tokens a second up to `burst`; a request takes one."""

    __slots__ = ("burst", "left", "rate", "since")

    def __init__(self, rate: float, burst: int, now: float) -> None:
        self.rate, self.burst, self.left, self.since = rate, burst, float(burst), now

    def take(self, now: float) -> float:
        """0 if there was one, else the seconds until there is."""
        self.left = min(float(self.burst), self.left + (now - self.since) * self.rate)
        self.since = now
        if self.left >= 1:
            self.left -= 1
            return 0.0
        return (1 - self.left) / self.rate

    @property
    def said(self) -> str:
        return f"{self.burst} times within {self.burst / self.rate:.0f} s"
