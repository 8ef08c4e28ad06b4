"""What is kept of GitHub's deliveries, however odd they are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from registry.event_types import check_event
from registry.events import Event
from registry.triggers import Subscriber, Triggers, listens
from serving.github_hooks import LONGEST, MOST_PATHS, check_signature, read_delivery
from serving.http_messages import Refusal

# Of GitHub's documentation, "Validating webhook deliveries".
DOCUMENTED = b"sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"


def deliver(name: str, said: Any) -> Event:
    headers = {b"x-github-event": name.encode(), b"x-github-delivery": b"d1"}
    event = read_delivery(headers, json.dumps(said).encode())
    assert event is not None
    check_event(event)
    return event


def test_the_signature_is_githubs() -> None:
    secret, body = "It's a Secret to Everybody", b"Hello, World!"
    check_signature(secret, {b"x-hub-signature-256": DOCUMENTED}, body)
    for wrong in (b"", b"sha256=", DOCUMENTED[:-1], DOCUMENTED.upper(), b"\xff", DOCUMENTED.replace(b"256", b"1")):
        with pytest.raises(Refusal) as refused:
            check_signature(secret, {b"x-hub-signature-256": wrong}, body)
        assert refused.value.status == 401
    with pytest.raises(Refusal):
        check_signature(secret, {b"x-hub-signature-256": DOCUMENTED}, body + b" ")


def test_a_push_starts_what_waits_for_its_branch() -> None:
    on = Triggers.model_validate({"event": [{"type": "external.github.push", "where": {"branch": "main"}}]})
    waiting = Subscriber("tickets", "tickets", "datasets/tickets", on)
    assert listens(waiting, deliver("push", {"ref": "refs/heads/main", "repository": {"full_name": "a/b"}}))
    assert not listens(waiting, deliver("push", {"ref": "refs/heads/dev"}))


def test_a_tag_has_no_branch() -> None:
    data = deliver("push", {"ref": "refs/tags/v1", "deleted": True}).data
    assert data == {"tag": "v1", "ref": "refs/tags/v1", "deleted": True, "commits": 0, "added": [], "modified": [],
                    "removed": []}  # fmt: skip


def test_a_large_push_is_cut_and_says_so() -> None:
    commits = [{"added": [f"{n}/{m}" + "x" * 1000 for m in range(100)]} for n in range(100)]
    data = deliver("push", {"ref": "refs/heads/main", "commits": commits}).data
    assert (len(data["added"]), data["commits"], data["cut"]) == (MOST_PATHS, 100, True)
    assert max(map(len, data["added"])) == LONGEST


@pytest.mark.parametrize(
    ("name", "said", "branch"),
    [
        ("pull_request", {"action": "closed", "pull_request": {"merged": True, "base": {"ref": "main"}}}, "main"),
        ("workflow_run", {"action": "completed", "workflow_run": {"head_branch": "dev"}}, "dev"),
        ("create", {"ref": "refs/heads/x", "ref_type": "branch"}, "x"),
        ("release", {"action": "published", "release": {"tag_name": "v1"}}, None),
    ],
)
def test_other_events_say_their_branch(name: str, said: dict[str, Any], branch: str | None) -> None:
    event = deliver(name, {**said, "repository": {"full_name": "team/project", "private": True}})
    assert (event.type, event.subject, event.data.get("branch")) == (f"external.github.{name}", "team/project", branch)
    assert event.data["repository"] == {"full_name": "team/project"}


def test_a_large_delivery_is_kept_small() -> None:
    said = {f"object {n}": {"title": "x" * 10_000, "body": "y" * 10_000} for n in range(1000)}
    assert len(json.dumps(deliver("issues", said).data)) < 10_000


ODD: list[Any] = [None, True, -1, 10**400, 1.5, "", "\0", "x" * 1000, [], [[]], ["a", 1, {}], {},
                  {"ref": {}, "name": []}, {"base": 1}, [{"added": 1}, {"removed": [None, "p"]}]]  # fmt: skip
KNOWN = ("ref", "commits", "pusher", "repository", "organization", "pull_request", "workflow_run", "action")


@pytest.mark.parametrize("name", ["push", "pull_request"])
def test_no_delivery_is_too_odd(name: str) -> None:
    headers = {b"x-github-event": name.encode(), b"x-github-delivery": b"d1"}
    for said in [{key: odd} for key in KNOWN for odd in ODD] + [dict.fromkeys(KNOWN, odd) for odd in ODD]:
        event = read_delivery(headers, json.dumps(said).encode())
        assert event is not None
        assert len(json.dumps(event.data, allow_nan=False)) < 10_000
