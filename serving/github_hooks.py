"""GitHub's webhooks as events: signature, delivery id, and a bounded selection of what a delivery says. Pure."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs

from registry.events import Event, new_event
from serving.http_messages import Refusal
from serving.posted_json import read_object

SOURCE = "ft/hooks/github"
DELIVERY = b"x-github-delivery"
NAME = re.compile("[a-z_]{1,64}")
MOST_PATHS, LONGEST = 500, 256
# Of the objects in a delivery (pull_request, release, workflow_run...) these, where they are text, numbers or booleans.
KEPT = ("id", "number", "name", "full_name", "login", "title", "state", "status", "conclusion", "merged", "draft",
        "ref", "sha", "tag_name", "prerelease", "head_branch", "head_sha", "html_url")  # fmt: skip
MOST_OBJECTS = 16


def check_signature(secret: str, headers: Mapping[bytes, bytes], body: bytes) -> None:
    """Raises Refusal (401). Only the body is signed: neither the delivery's id nor a time is."""
    right = "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(right.encode(), headers.get(b"x-hub-signature-256", b"")):
        raise Refusal(401, "X-Hub-Signature-256 is missing or wrong: is the secret the same?", "wrong_signature")


def read_delivery(headers: Mapping[bytes, bytes], body: bytes) -> Event | None:
    """The event; None for a ping. Raises Refusal (400)."""
    name = headers.get(b"x-github-event", b"").decode("latin-1")
    delivery = headers.get(DELIVERY, b"").decode("latin-1")
    if not NAME.fullmatch(name) or not delivery:
        raise Refusal(400, "X-GitHub-Event and X-GitHub-Delivery say what this is", "invalid_event")
    said = read_object(_payload(headers, body))
    if name == "ping":
        return None
    repository = _part(said, "repository").get("full_name") or _part(said, "organization").get("login") or ""
    data = _push(said) if name == "push" else _selection(said)
    return new_event(SOURCE, f"external.github.{name}", str(repository), data, key=delivery)


def _payload(headers: Mapping[bytes, bytes], body: bytes) -> bytes:
    """GitHub sends a form unless it is told to send JSON."""
    if not headers.get(b"content-type", b"").lower().startswith(b"application/x-www-form-urlencoded"):
        return body
    try:
        return parse_qs(body.decode("ascii"), strict_parsing=True, max_num_fields=4)["payload"][0].encode()
    except (ValueError, KeyError):
        raise Refusal(400, "the form has no payload", "invalid_event") from None


def _push(said: dict[str, Any]) -> dict[str, Any]:
    commits = [each for each in _list(said.get("commits")) if isinstance(each, dict)]
    changed = {kind: _paths(commits, kind) for kind in ("added", "modified", "removed")}
    data = {
        **_branch_or_tag(said.get("ref")),
        **{name: _short(said.get(name)) for name in ("ref", "before", "after", "created", "deleted", "forced")},
        "pusher": _short(_part(said, "pusher").get("name")),
        "commits": len(commits),
        **{kind: paths[:MOST_PATHS] for kind, paths in changed.items()},
    }
    if any(len(paths) > MOST_PATHS for paths in changed.values()):
        data["cut"] = True
    return {name: value for name, value in data.items() if value is not None}


def _branch_or_tag(ref: Any) -> dict[str, str]:
    text = ref if isinstance(ref, str) else ""
    for prefix, name in (("refs/heads/", "branch"), ("refs/tags/", "tag")):
        if text.startswith(prefix):
            return {name: text.removeprefix(prefix)[:LONGEST]}
    return {}


def _paths(commits: Iterable[dict[str, Any]], kind: str) -> list[str]:
    """One more than are kept, if there are more."""
    found: dict[str, None] = {}
    for each in commits:
        for path in _list(each.get(kind)):
            if isinstance(path, str):
                found[path[:LONGEST]] = None
            if len(found) > MOST_PATHS:
                return list(found)
    return list(found)


def _selection(said: dict[str, Any]) -> dict[str, Any]:
    """Plain values at the top, and the best known ones of the objects below it."""
    data: dict[str, Any] = {}
    objects = [name for name, value in said.items() if isinstance(value, dict)][:MOST_OBJECTS]
    plain = [name for name in said if name in ("action", "ref", "ref_type", "number", "state", "sha")]
    for name in plain:
        data[name] = _short(said[name])
    for name in objects:
        data[name[:64]] = {key: _short(said[name][key]) for key in KEPT if _short(said[name].get(key)) is not None}
    data.update(_branch_of(said))
    return {name: value for name, value in data.items() if value not in (None, {})}


def _branch_of(said: dict[str, Any]) -> dict[str, str]:
    """The branch that it is about, for `branches:` and `where:`: of a pull request the one that it goes into."""
    base = _part(_part(said, "pull_request"), "base").get("ref")
    heads = [_part(said, name).get("head_branch") for name in ("workflow_run", "check_suite", "workflow_job")]
    found = next((each for each in [base, *heads] if isinstance(each, str) and each), "")
    return {"branch": found[:LONGEST]} if found else _branch_or_tag(said.get("ref"))


def _short(value: Any) -> str | int | float | None:
    return value[:LONGEST] if isinstance(value, str) else value if isinstance(value, int | float) else None


def _part(said: dict[str, Any], name: str) -> dict[str, Any]:
    found = said.get(name)
    return found if isinstance(found, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
