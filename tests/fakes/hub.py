"""A hub on loopback: as much of huggingface.co's protocol as huggingface_hub needs to read models.

Like the real one, it tells anybody about a gated model, and hands its files only to a token that may read them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class HubModel:
    """One model: its files, and who may have them (`token`: that one only)."""

    files: Mapping[str, bytes]
    licence: str = "apache-2.0"
    token: str | None = None
    tags: tuple[str, ...] = ("main", "v1")


@dataclass
class Hub:
    """The running server; `asked` is every path that was asked for."""

    url: str
    asked: list[str] = field(default_factory=list)


@contextmanager
def running_hub(models: Mapping[str, HubModel]) -> Iterator[Hub]:
    """Serve the models (by `org/name`) while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.models, server.hub = models, hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir() if not each.name.startswith("MANIFEST")}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests look at `Hub.asked`."""

    def _answer(self) -> None:
        path = urlparse(self.path).path
        self.server.hub.asked.append(path)  # type: ignore[attr-defined]
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        model: HubModel | None = self.server.models.get(name)  # type: ignore[attr-defined]
        revision = rest[1] if len(rest) > 1 else "main"
        if model is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif revision != REVISION and revision not in model.tags:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif is_api and rest[:1] == ["tree"]:
            self._send_json([_entry(file, content) for file, content in model.files.items()])
        elif is_api:
            self._send_json(_about(name, model))
        elif model.token and self.headers.get("authorization") != f"Bearer {model.token}":
            known = "authorization" in self.headers
            self._refuse(403 if known else 401, "GatedRepo", f"Access to model {name} is restricted")
        elif "/".join(rest[2:]) in model.files:
            self._send(model.files["/".join(rest[2:])], "application/octet-stream")
        else:
            self._refuse(404, "EntryNotFound", "Entry not found")

    def _send_json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_etag(body)}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _about(name: str, model: HubModel) -> dict[str, Any]:
    siblings = [{"rfilename": file} for file in model.files]
    card = {"license": model.licence}
    return {"_id": "1", "id": name, "modelId": name, "sha": REVISION, "private": False, "gated": bool(model.token),
            "siblings": siblings, "tags": [], "downloads": 1, "likes": 0, "cardData": card}  # fmt: skip


def _entry(file: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": file, "size": len(content), "oid": _etag(content)}


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
