"""MLflow's webhooks: the signature by the book, and a real server that sends some."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.events import Event, read
from registry.project import Project
from registry.store import Store
from serving.http_messages import Refusal
from serving.mlflow_hooks import check_signature, read_delivery
from tests.mlflow_server import free_port, mlflow_server
from tests.serving.receiver_process import ReceiverProcess, post

SECRET = "of MLflow"
BODY = json.dumps({"entity": "model_version_alias", "action": "created", "timestamp": "2026-11-21T00:00:00+00:00",
                   "data": {"name": "tickets", "alias": "champion", "version": "3"}}).encode()  # fmt: skip
# The server lets webhooks reach this machine, and looks for new ones every second.
LOCAL = {
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_CACHE_TTL": "1",
    "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": base64.urlsafe_b64encode(b"k" * 32).decode(),
}  # fmt: skip


def signed(sent: float, delivery: str = "d1", secret: str = SECRET, body: bytes = BODY) -> dict[bytes, bytes]:
    timestamp = str(int(sent))
    digest = hmac.new(secret.encode(), f"{delivery}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {b"x-mlflow-delivery-id": delivery.encode(), b"x-mlflow-timestamp": timestamp.encode(),
            b"x-mlflow-signature": b"v1," + base64.b64encode(digest)}  # fmt: skip


def test_a_delivery_becomes_an_event() -> None:
    check_signature(SECRET, signed(1000), BODY, now=1299)
    check_signature(SECRET, signed(1000), BODY, now=701)
    event = read_delivery(signed(1000), BODY)
    assert (event.type, event.subject, event.id) == ("external.mlflow.model_version_alias.created", "tickets", "d1")
    assert event.data == {"name": "tickets", "alias": "champion", "version": "3"}


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "wrong_signature"),
        (signed(1000, secret="another"), "wrong_signature"),
        ({**signed(1000), b"x-mlflow-timestamp": b"1001"}, "wrong_signature"),
        ({**signed(1000), b"x-mlflow-delivery-id": b"d2"}, "wrong_signature"),
        (signed(600), "old_timestamp"),
        (signed(1400), "old_timestamp"),
    ],
)
def test_a_wrong_signature_or_an_old_timestamp_is_refused(headers: dict[bytes, bytes], code: str) -> None:
    with pytest.raises(Refusal) as refused:
        check_signature(SECRET, headers, BODY, now=1000)
    assert (refused.value.status, refused.value.code) == (401, code)


@pytest.mark.parametrize(
    "said",
    [{}, {"entity": "a b", "action": "created", "data": {}}, {"entity": "model", "action": "created", "data": []}, []],
)
def test_what_is_no_delivery_is_refused(said: Any) -> None:
    with pytest.raises(Refusal) as refused:
        read_delivery(signed(1000), json.dumps(said).encode())
    assert refused.value.status == 400


@pytest.fixture
def receiver(project: Project) -> Iterator[ReceiverProcess]:
    found = ReceiverProcess(project, {"FT_MLFLOW_WEBHOOK_SECRET": SECRET})
    found.start()
    yield found
    found.kill()


def test_an_old_delivery_is_refused_and_the_refusal_recorded(receiver: ReceiverProcess, store: Store) -> None:
    for ago, status in ((600, 401), (0, 200), (0, 200)):
        headers = {name.decode(): value.decode() for name, value in signed(time.time() - ago).items()}
        assert post(f"{receiver.url}/hooks/mlflow", BODY, headers)[0] == status
    assert receiver.stop() == 0
    assert [(each.type, each.subject) for each in read(store)] == [
        ("webhook.refused", "mlflow"), ("external.mlflow.model_version_alias.created", "tickets")
    ]  # fmt: skip
    assert "X-MLflow-Timestamp" in read(store)[0].data["reason"]


def test_a_real_server_tells_of_an_alias_that_was_moved(
    receiver: ReceiverProcess, store: Store, tmp_path: Path
) -> None:
    port = free_port()

    def call(path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/{path}", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())

    with mlflow_server(port, tmp_path / "mlflow", LOCAL):
        events = [{"entity": "MODEL_VERSION_ALIAS", "action": each} for each in ("CREATED", "DELETED")]
        call("webhooks", name="ft", url=f"{receiver.url}/hooks/mlflow", secret=SECRET, events=events)
        call("registered-models/create", name="tickets")
        call("model-versions/create", name="tickets", source="s3://bucket/tickets/1")
        call("registered-models/alias", name="tickets", alias="champion", version="1")
        found = wait_for(store, 1)
    assert [(each.type, each.subject, each.data) for each in found] == [
        ("external.mlflow.model_version_alias.created", "tickets",
         {"name": "tickets", "alias": "champion", "version": "1"})
    ]  # fmt: skip


def wait_for(store: Store, count: int) -> list[Event]:
    end = time.monotonic() + 60
    while len(found := read(store)) < count:
        assert time.monotonic() < end, "no webhook came"
        time.sleep(0.1)
    return found
