"""MLflow's registry webhooks as events: signature, delivery id, and a window against replays. Pure.

They are a hint that something changed: MLflow sends from memory, and a server that dies loses what it had to send.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping

from registry.events import Event, new_event
from serving.http_messages import Refusal
from serving.posted_json import read_object

SOURCE = "ft/hooks/mlflow"
DELIVERY, TIMESTAMP = b"x-mlflow-delivery-id", b"x-mlflow-timestamp"
NAME = re.compile("[a-z_]{1,64}")
WINDOW_SECONDS = 300.0


def check_signature(secret: str, headers: Mapping[bytes, bytes], body: bytes, now: float) -> None:
    """Raises Refusal (401) for a wrong signature, and for a right one of more than five minutes ago, or ahead."""
    delivery, timestamp = headers.get(DELIVERY, b""), headers.get(TIMESTAMP, b"")
    signed = b".".join((delivery, timestamp, body))
    right = b"v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest())
    if not hmac.compare_digest(right, headers.get(b"x-mlflow-signature", b"")):
        raise Refusal(401, "X-MLflow-Signature is missing or wrong: is the secret the same?", "wrong_signature")
    if not timestamp.isdigit() or len(timestamp) > 12 or abs(now - int(timestamp)) > WINDOW_SECONDS:
        raise Refusal(401, f"X-MLflow-Timestamp is not within {WINDOW_SECONDS:.0f} s of now: is a clock wrong, or is "
                      "this a replay?", "old_timestamp")  # fmt: skip


def read_delivery(headers: Mapping[bytes, bytes], body: bytes) -> Event:
    """`external.mlflow.<entity>.<action>` with MLflow's data. Raises Refusal (400)."""
    said = read_object(body)
    entity, action, data = said.get("entity"), said.get("action"), said.get("data")
    named = isinstance(entity, str) and isinstance(action, str) and NAME.fullmatch(entity) and NAME.fullmatch(action)
    delivery = headers.get(DELIVERY, b"").decode("latin-1")
    if not named or not isinstance(data, dict) or not delivery:
        raise Refusal(400, "no delivery of MLflow: it has an id, entity, action and data", "invalid_event")
    name = data.get("name")
    subject = name if isinstance(name, str) else ""
    return new_event(SOURCE, f"external.mlflow.{entity}.{action}", subject, data, key=delivery)
