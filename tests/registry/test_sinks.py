"""Sinks as they are written, what is sent to them, and that secrets are never shown."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from registry.errors import WrongInput
from registry.events import Event
from registry.project import Project
from registry.settings import load_settings, sources
from registry.sink_message import message, scrubbed, webhook_id
from registry.sinks import Sink, filled, masked, wants

KEY = b"0123456789abcdef0123456789abcdef"
SECRET = "whsec_" + base64.b64encode(KEY).decode()
EVENT = Event("ft/runs", "e1", "run.finished", "tickets-1", 1000.5, {"state": "succeeded", "n": {"a": 1}}, "ft/x y", 7)


def sink(**more: Any) -> Sink:
    return Sink.model_validate({"name": "chat", "url": "https://hooks.example/T0/hidden", "types": ["run.*"], **more})


def test_without_a_template_it_is_a_signed_cloud_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_KEY", SECRET)
    sent = message(sink(secret_env="FT_KEY"), EVENT, 1700000000.9)
    assert json.loads(sent.body) == EVENT.as_dict()
    assert sent.headers["Content-Type"].startswith("application/cloudevents+json")
    signed = sent.headers["webhook-id"].encode() + b".1700000000." + sent.body
    wanted = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert sent.headers["webhook-signature"] == f"v1,{wanted}"
    assert sent.headers["webhook-timestamp"] == "1700000000"


def test_the_same_event_has_the_same_id_and_body_at_every_attempt() -> None:
    first, again = message(sink(), EVENT, 1.0), message(sink(), EVENT, 99999.0)
    assert (first.body, first.headers["webhook-id"]) == (again.body, again.headers["webhook-id"])
    odd = Event("ft/cli", "e\u00fc.1 \u2028", "run.finished", "", 0.0, {})
    assert webhook_id(odd).isascii()
    assert webhook_id(odd) != webhook_id(Event("ft/cli e", "\u00fc.1 \u2028", "run.finished", "", 0.0, {}))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{type} {subject}: {data.state}", "run.finished tickets-1: succeeded"),
        ("{data.n} {data.n.a} {seq} {cause}", '{"a": 1} 1 7 ft/x y'),
        ("[{data.missing}] [{data.n.a.b}] [{data.__class__}]", "[] [] []"),
        ("{{type}} {{{type}}}", "{type} {run.finished}"),
        ("no placeholder", "no placeholder"),
    ],
)
def test_templates_are_filled(template: str, text: str) -> None:
    assert filled({"text": template}, EVENT) == {"text": text}


def test_what_an_event_says_is_only_text() -> None:
    data = {
        "state": '"}, {data.key} {0.__class__} \n <!channel> @here model@3 tickets@all',
        "key": "secret",
        "long": "x" * 9999,
    }
    event = Event("ft/cli", "e", "run.failed", "s", 0.0, data)
    body = message(sink(template={"text": "{data.state}", "more": ["{data.long}", {"n": 1}]}), event, 0.0).body
    found = json.loads(body)
    assert set(found) == {"text", "more"}
    assert '"}, {data.key} {0.__class__} \n' in found["text"]
    assert "secret" not in found["text"]
    assert "<!channel>" not in found["text"]
    assert "@here" not in found["text"]
    assert "model@3" in found["text"]
    assert (len(found["more"][0]), found["more"][1]) == (500, {"n": 1})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"template": {"text": "{0.__class__}"}}, "no placeholder: {0.__class__}"),
        ({"template": {"text": "{type!r}"}}, "no placeholder: {type!r}"),
        ({"template": {"text": "{type:>10}"}}, "no placeholder"),
        ({"template": {"text": "{data[state]}"}}, "no placeholder"),
        ({"template": {"text": "{state}"}}, "there is type, subject"),
        ({"template": {"a": {"b": ["{"]}}}, "a brace alone"),
        ({"template": "text"}, "valid dictionary"),
        ({"types": []}, "at least 1 item"),
        ({"types": ["run.finnished"]}, "did you mean run.finished?"),
        ({"url": "ftp://x/secret"}, "begins with http"),
        ({"url": "https://"}, "begins with http"),
        ({"url": "https://h:99999/secret"}, "begins with http"),
        ({"url": "https://h/two words"}, "without spaces"),
        ({"url_env": "X"}, "give url, or url_env"),
        ({"url": None}, "give url, or url_env"),
        ({"name": "Two Words"}, "pattern"),
        ({"timeout": 0}, "greater than 0"),
        ({"timeout": float("inf")}, "finite"),
        ({"headers": {"a b": "c"}}, "no header"),
        ({"headers": {"a": "c\r\nd: e"}}, "no header"),
        ({"headers": {"Webhook-Id": "1"}}, "set by ft itself"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_a_wrong_sink_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match="Sink") as caught:
        sink(**wrong)
    assert said in str(caught.value)


def test_what_is_for_a_sink() -> None:
    assert wants(sink(), EVENT)
    assert wants(sink(where={"state": "succeeded", "n.a": 1}), EVENT)
    assert not wants(sink(where={"state": "failed"}), EVENT)
    assert not wants(sink(types=["adapter.*"]), EVENT)
    own = Event("ft/sinks", "e", "sink.gave_up", "chat", 0.0, {})
    assert not wants(sink(types=["*"]), own)
    assert wants(sink(types=["*"], name="other"), own)


def test_addresses_and_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    here = sink(url=None, url_env="FT_HOOK", secret_env="FT_KEY", headers={"Authorization": "Bearer ${FT_TOKEN}"})
    with pytest.raises(WrongInput, match="sink chat: FT_HOOK: is not set"):
        message(here, EVENT, 0.0)
    monkeypatch.setenv("FT_HOOK", "hooks.example/secret")
    monkeypatch.setenv("FT_TOKEN", "t0ken")
    with pytest.raises(WrongInput, match="an address begins with") as caught:
        message(here, EVENT, 0.0)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("FT_HOOK", "https://hooks.example/secret")
    for wrong in ("plain", "whsec_", "whsec_!!!", "whsec_" + base64.b64encode(b"short").decode()):
        monkeypatch.setenv("FT_KEY", wrong)
        with pytest.raises(WrongInput, match="no signing key"):
            message(here, EVENT, 0.0)
    monkeypatch.setenv("FT_KEY", SECRET)
    sent = message(here, EVENT, 0.0)
    assert (sent.url, sent.headers["Authorization"]) == ("https://hooks.example/secret", "Bearer t0ken")
    assert scrubbed("Cannot POST /secret with Bearer t0ken\n\x1b[31m", sent) == "Cannot POST *** with *** [31m"


def test_secrets_are_never_shown(project: Project) -> None:
    assert masked("https://user:pw@hooks.example:8443/T0/secret?x=1") == "https://hooks.example:8443/***"
    path = project.root / "ft.yaml"
    written = {"name": "chat", "url": "https://hooks.example/T0/hidden", "types": ["run.*"]}
    path.write_text(yaml.safe_dump({"sinks": [written]}))
    assert load_settings(project).sinks[0].name == "chat"
    assert sources(project)["sinks"] == (["chat: https://hooks.example/***"], "ft.yaml")
    for wrong in ([{**written, "colour": 1}], [{**written, "url": "htp://x/hidden"}], [written, written], written):
        path.write_text(yaml.safe_dump({"sinks": wrong}))
        with pytest.raises(WrongInput, match="sinks") as caught:
            load_settings(project)
        assert "hidden" not in str(caught.value)
