"""`python -m registry.mlflow_webhook SERVER RECEIVER`: MLflow tells the receiver of aliases that somebody moves.

Repeating it changes nothing. The secret comes by FT_MLFLOW_WEBHOOK_SECRET, because command lines can be read by all.
Standard library only: to import mlflow would take longer than the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

from registry.errors import FtError, TrackerError

NAME = "ft"
EVENTS = [{"entity": "MODEL_VERSION_ALIAS", "action": "CREATED"}]
WAIT_SECONDS = 30.0


def register_webhook(server: str, receiver: str, secret: str) -> str:
    """Make it so; says what was done: 'made', 'changed' or 'there'. Raises TrackerError."""
    # MLflow never tells a secret again, so what it was made with is kept in its description.
    digest = hashlib.sha256(f"{receiver}\n{secret}".encode()).hexdigest()[:16]
    wanted = {"name": NAME, "url": receiver, "events": EVENTS, "description": f"made by ft up ({digest})"}
    found = [each for each in _call(server, "GET", "?max_results=100").get("webhooks", []) if each["name"] == NAME]
    for spare in found[1:]:
        _call(server, "DELETE", f"/{spare['webhook_id']}")
    if not found:
        _call(server, "POST", "", {**wanted, "secret": secret, "status": "ACTIVE"})
        return "made"
    if all(found[0].get(name) == value for name, value in wanted.items()):
        return "there"
    _call(server, "PATCH", f"/{found[0]['webhook_id']}", {**wanted, "secret": secret})
    return "changed"


def _call(server: str, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    url = f"{server}/api/2.0/mlflow/webhooks{path}"
    request = urllib.request.Request(url, method=method, headers={"Content-Type": "application/json"})
    if body is not None:
        request.data = json.dumps(body).encode()
    # The server is on loopback: a proxy that is set for the web must not get it.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=WAIT_SECONDS) as reply:
            return dict(json.loads(reply.read() or b"{}"))
    except (OSError, ValueError) as error:
        raise TrackerError(f"MLflow: its webhook cannot be registered: {_reason(error)}", place=url,
                           fix="ft hears of aliases moved in MLflow only when it looks itself") from error  # fmt: skip


def _reason(error: Exception) -> str:
    if not isinstance(error, urllib.error.HTTPError):
        return str(error)
    said = error.read()[:300].decode("utf-8", "replace")
    hint = " (was .ft/mlflow_keys.json removed? it has the key of the webhooks there)" if error.code >= 500 else ""
    return f"HTTP {error.code}: {said}{hint}"


def main() -> None:
    try:
        done = register_webhook(sys.argv[1], sys.argv[2], os.environ["FT_MLFLOW_WEBHOOK_SECRET"])
    except FtError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    print(f"webhook to {sys.argv[2]}: {done}", flush=True)


if __name__ == "__main__":
    main()
