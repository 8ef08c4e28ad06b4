"""`python -m tests.bench.send_events URL SECRET FIRST LAST SEED`: one sender of the event ledger.

Posts the events numbered FIRST to LAST-1: a third one by one, a third in batches, a third as signed webhooks of GitHub.
Each webhook is posted three times, all others once (a second one would hide that the first was lost), in a random
order, and each again until it is answered with 200.
Prints one JSON line: how many requests were answered, how many had to be repeated.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import random
import sys
import time
import uuid
from collections.abc import Iterator
from urllib.parse import urlsplit

TIMES, BATCH, HOOK = 3, 25, "/hooks/github"
Delivery = tuple[str, dict[str, str], bytes]


def deliveries(secret: str, first: int, last: int) -> Iterator[Delivery]:
    """Path, headers and body of each."""
    numbers = list(range(first, last))
    single, batched, hooked = numbers[0::3], numbers[1::3], numbers[2::3]
    for n in single:
        yield "/v1/events", {"Content-Type": "application/cloudevents+json"}, json.dumps(_event(n)).encode()
    for start in range(0, len(batched), BATCH):
        body = json.dumps([_event(n) for n in batched[start : start + BATCH]]).encode()
        yield "/v1/events", {"Content-Type": "application/cloudevents-batch+json"}, body
    for n in hooked:
        yield _push(secret, n)


def number_of(type_: str, data: dict[str, object]) -> int:
    """Which of the numbered events it is that the log has."""
    return int(str(data["after"]), 16) if type_ == "external.github.push" else int(str(data["n"]))


def _event(n: int) -> dict[str, object]:
    return {"specversion": "1.0", "id": f"e{n}", "source": f"/sender/{n % 7}", "type": "external.ledger",
            "subject": f"thing {n % 100}", "data": {"n": n, "branch": "main"}}  # fmt: skip


def _push(secret: str, n: int) -> Delivery:
    commit = {"id": f"{n:040x}", "added": [], "modified": ["datasets/tickets.dvc"], "removed": []}
    said = {"ref": "refs/heads/main", "before": "0" * 40, "after": f"{n:040x}", "commits": [commit],
            "pusher": {"name": "ledger"}, "repository": {"full_name": "team/project"}}  # fmt: skip
    body = json.dumps(said).encode()
    headers = {
        "Content-Type": "application/json",
        "X-GitHub-Event": "push",
        "X-GitHub-Delivery": str(uuid.UUID(int=n)),
        "X-Hub-Signature-256": "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest(),
    }
    return HOOK, headers, body


def send_all(url: str, secret: str, first: int, last: int, seed: int) -> dict[str, int]:
    todo = [each for each in deliveries(secret, first, last) for _ in range(TIMES if each[0] == HOOK else 1)]
    random.Random(seed).shuffle(todo)
    connection, repeated = _connect(url), 0
    for each in todo:
        while not _post(connection, each):
            repeated += 1
            connection.close()
            time.sleep(0.05)
            connection = _connect(url)
    connection.close()
    return {"answered": len(todo), "repeated": repeated}


def _connect(url: str) -> http.client.HTTPConnection:
    found = urlsplit(url)
    return http.client.HTTPConnection(found.hostname or "", found.port, timeout=30)


def _post(connection: http.client.HTTPConnection, delivery: Delivery) -> bool:
    """Is it in the log? False: nobody knows, so it is to be sent again."""
    path, headers, body = delivery
    try:
        connection.request("POST", path, body, headers)
        reply = connection.getresponse()
        said = reply.read()
    except (OSError, http.client.HTTPException):
        return False
    if reply.status not in (200, 503):
        raise SystemExit(f"{reply.status}: {said!r}")
    return reply.status == 200


if __name__ == "__main__":
    _, url, secret, first, last, seed = sys.argv
    print(json.dumps(send_all(url, secret, int(first), int(last), int(seed))))
