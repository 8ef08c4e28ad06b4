"""The receiver as a real process: what gets in, what is refused, and what happens when its store or itself is away."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import socket
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from registry.events import Event, newest, read
from registry.project import Project
from registry.store import Store, open_store
from tests.conftest import run_bounded, started
from tests.postgres_server import postgres_server
from tests.serving.receiver_process import ReceiverProcess, post

SECRET, TOKEN = "of GitHub, ü", "a token"
EVENT = {"Content-Type": "application/cloudevents+json"}
BATCH = {"Content-Type": "application/cloudevents-batch+json"}
JSON = {"Content-Type": "application/json"}


def event(id_: str, **more: Any) -> dict[str, Any]:
    return {"specversion": "1.0", "id": id_, "source": "/a", "type": "external.go", **more}


def raw(value: Any) -> bytes:
    return json.dumps(value).encode()


def signed(body: bytes, secret: str = SECRET, name: str = "push", delivery: str = "", **more: str) -> dict[str, str]:
    signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return {"X-Hub-Signature-256": f"sha256={signature}", "X-GitHub-Event": name,
            "X-GitHub-Delivery": delivery or uuid.uuid4().hex, **JSON, **more}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReceiverProcess]:
    """One receiver without a token, with GitHub's secret, for all tests that leave it running."""
    root = tmp_path_factory.mktemp("received")
    (root / "recipes").mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    project = Project(root=root, home=root / ".ft", cache=root / "cache")
    receiver = ReceiverProcess(project, {"FT_HOME": str(project.home), "FT_GITHUB_SECRET": SECRET})
    receiver.start()
    yield receiver
    receiver.kill()


@pytest.fixture
def mine(project: Project) -> Iterator[ReceiverProcess]:
    """A receiver that is not started yet, of a project of one test."""
    receiver = ReceiverProcess(project, {"FT_GITHUB_SECRET": SECRET})
    yield receiver
    receiver._running.close()


@contextmanager
def held(store: Store) -> Iterator[None]:
    """The store's write lock is held for the time of the block."""
    with closing(sqlite3.connect(store.home / "ft.db", isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def log(receiver: ReceiverProcess) -> list[Event]:
    return read(open_store(receiver.project), limit=100_000)


def found(receiver: ReceiverProcess, id_: str) -> list[Event]:
    return [each for each in log(receiver) if each.id == id_]


def test_an_event_comes_in_structured_binary_or_in_a_batch_and_once(here: ReceiverProcess) -> None:
    url = f"{here.url}/v1/events"
    one = event("s1", subject="it", time="2026-11-21T09:30:00+09:00", data={"branch": "main", "n": [1, None]})
    assert post(url, raw(one), EVENT)[0] == 200
    again = post(url, raw(one), EVENT)[1]
    assert (again["appended"], again["known"]) == (0, 1)
    binary = {**JSON, "ce-specversion": "1.0", "ce-id": "b%201%C3%BC", "ce-source": "/a", "ce-type": "external.go"}
    assert post(url, b'{"branch": "dev"}', binary)[1]["appended"] == 1
    assert post(url, b"", {**binary, "ce-id": "b2"})[1]["appended"] == 1
    many = post(url, raw([event("t1"), event("t2"), event("t1"), one]), BATCH)[1]
    assert (many["appended"], many["known"]) == (2, 2)
    assert post(url, b"[]", BATCH)[0] == 200
    kept = found(here, "s1")
    assert [(each.source, each.type, each.subject, each.data) for each in kept] == [
        ("/a", "external.go", "it", {"branch": "main", "n": [1, None]})
    ]
    assert kept[0].as_dict()["time"] == "2026-11-21T00:30:00.000Z"
    assert found(here, "b 1ü")[0].data == {"branch": "dev"}
    assert [len(found(here, each)) for each in ("b2", "t1", "t2")] == [1, 1, 1]


def test_what_the_log_has_no_place_for_is_said(here: ReceiverProcess) -> None:
    said = post(f"{here.url}/v1/events", raw(event("x1", traceparent="00-1", dataschema="/s")), EVENT)[1]
    assert said["not_kept"] == ["dataschema", "traceparent"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (event("", data={}), "id must be text"),
        (event("i" * 10_000), "id is at most 256 printable characters"),
        (event("a\0b"), "id is at most 256 printable characters"),
        (event("i", source="ft/runs"), "does not begin with ft/"),
        (event("i", source="a b"), "source must be"),
        (event("i", source="a\0"), "source must be"),
        (event("i", specversion="0.3"), "specversion"),
        (event("i", subject="a\nb"), "subject is at most"),
        (event("i", type="external.go\0"), "type is at most"),
        (event("i", type="dataset.versionned", data={"hash": "x"}), "did you mean dataset.versioned?"),
        (event("i", type="adapter.promoted", data={}), "only ft itself appends events of this type"),
        (event("i", type="webhook.refused", data={}), "only ft itself appends events of this type"),
        (event("i", type="dataset.versioned", data={"hash": 1}), "data.hash: 1 is not of type 'string'"),
        (event("i", data=[1]), "data must be a JSON object"),
        (event("i", data_base64="e30="), "data_base64 is not taken"),
        (event("i", time="2026-11-21"), "time must be RFC 3339"),
        (event("i", time="0001-01-01T00:00:00+23:59"), "time must be RFC 3339"),
        (event("i", time=12), "time must be RFC 3339"),
        (event("i", time="9999-12-31T23:59:59Z"), "more than a day ahead"),
        ("text", "the body must be a JSON object"),
    ],
)  # fmt: skip
def test_a_wrong_event_is_refused_with_the_reason(here: ReceiverProcess, wrong: Any, says: str) -> None:
    before = newest(open_store(here.project), 1)
    status, said = post(f"{here.url}/v1/events", raw(wrong), EVENT)
    assert (status, said["error"]["type"]) == (400, "invalid_request_error")
    assert says in said["error"]["message"]
    assert newest(open_store(here.project), 1) == before


def test_all_that_is_wrong_with_a_batch_is_said_and_none_of_it_taken(here: ReceiverProcess) -> None:
    batch = [event("good"), event("i", type="nothing"), event("good2"), 7]
    status, said = post(f"{here.url}/v1/events", raw(batch), BATCH)
    assert status == 400
    assert "event 1: nothing: no such type of event" in said["error"]["message"]
    assert "event 3: an event is a JSON object" in said["error"]["message"]
    assert found(here, "good") == found(here, "good2") == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b'{"data": NaN}', "NaN is no number"),
        (b'{"data": 1e999}', "1e999 is too large a number"),
        (b'{"data": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b'{"data": "\\ud800"}', "half of a surrogate pair"),
        (b'{"data": "\xff"}', "not UTF-8 at byte 10"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8 at byte 0"),
        (b'{"data": ' + b'{"a":' * 70 + b"1" + b"}" * 70 + b"}", "more than 64 levels deep"),
        (b"[" * 500_000, "more than 64 levels deep"),
    ],
)
def test_what_is_no_json_that_can_be_kept_is_refused(here: ReceiverProcess, body: bytes, says: str) -> None:
    status, said = post(f"{here.url}/v1/events", body, EVENT)
    assert status == 400
    assert says in said["error"]["message"]


def test_odd_but_right_data_comes_back_as_it_was(here: ReceiverProcess) -> None:
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    data = {"nul": "a\0b", "emoji": "🙂", "big": 10**300, "deep": deep, "": {"quote": "'\"%s?"}}
    assert post(f"{here.url}/v1/events", raw(event("odd", data=data)), EVENT)[0] == 200
    assert found(here, "odd")[0].data == data


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/events", JSON, 415),
        ("/v1/events", {"Content-Type": "text/plain"}, 415),
        ("/v1/events", {"Content-Type": "application/cloudevents+json; charset=euc-kr"}, 415),
        ("/v1/events", {"Content-Type": "application/xml", "ce-specversion": "1.0"}, 415),
        ("/v1/events", {**JSON, "ce-specversion": "1.0", "ce-id": "%ff"}, 400),
        ("/v1/events", {**EVENT, "Host": "evil.example"}, 403),
        ("/v1/feedback", {"Content-Type": "text/plain"}, 415),
        ("/v1/nothing", JSON, 404),
        ("/healthz", JSON, 405),
        ("/hooks/mlflow", JSON, 403),
    ],
)
def test_a_request_that_is_not_meant_for_it(
    here: ReceiverProcess, path: str, headers: dict[str, str], status: int
) -> None:
    assert post(here.url + path, raw(event("never")), headers)[0] == status
    assert found(here, "never") == []


def test_feedback(here: ReceiverProcess) -> None:
    url = f"{here.url}/v1/feedback"
    said = {"adapter": "tickets@3", "rating": 4, "correction": "청구", "tags": ["late"], "request": "r1", "id": "f1"}
    assert post(url, raw(said), JSON)[1]["appended"] == 1
    assert post(url, raw(said), JSON)[1]["known"] == 1
    kept = found(here, "f1")[0]
    assert (kept.type, kept.subject) == ("feedback.received", "tickets@3")
    assert kept.data == {"rating": 4, "correction": "청구", "tags": ["late"], "request": "r1"}
    status, wrong = post(url, raw({"adapter": "tickets", "rating": True, "colour": 1}), JSON)
    assert status == 400
    assert all(each in wrong["error"]["message"] for each in ("adapter: ", "rating: ", "colour: "))
    assert "give a rating, a correction or tags" in post(url, raw({"adapter": "t@1"}), JSON)[1]["error"]["message"]


def test_a_push_to_github_is_an_event(here: ReceiverProcess) -> None:
    commits = [{"added": ["a"], "modified": ["datasets/t.dvc"], "removed": []},
               {"added": [], "modified": ["datasets/t.dvc"], "removed": ["a"]}]  # fmt: skip
    said = {"ref": "refs/heads/release/1", "before": "0" * 40, "after": "1" * 40, "forced": False, "commits": commits,
            "pusher": {"name": "kim"}, "repository": {"full_name": "team/project", "private": True}}  # fmt: skip
    body = raw(said)
    for _ in range(3):
        assert post(f"{here.url}/hooks/github", body, signed(body, delivery="d1"))[0] == 200
    kept = found(here, "d1")
    assert [(each.type, each.subject) for each in kept] == [("external.github.push", "team/project")]
    assert kept[0].data == {
        "branch": "release/1", "ref": "refs/heads/release/1", "before": "0" * 40, "after": "1" * 40, "forced": False,
        "pusher": "kim", "commits": 2, "added": ["a"], "modified": ["datasets/t.dvc"], "removed": ["a"],
    }  # fmt: skip
    form = urlencode({"payload": body.decode()}).encode()
    headers = signed(form, delivery="d2", **{"Content-Type": "application/x-www-form-urlencoded"})
    assert post(f"{here.url}/hooks/github", form, headers)[0] == 200
    assert found(here, "d2")[0].data == kept[0].data
    assert post(f"{here.url}/hooks/github", b'{"zen": "x"}', signed(b'{"zen": "x"}', name="ping"))[1]["pong"] is True


def test_a_refused_webhook_is_told_of_in_the_log_and_many_of_them_do_not_fill_it(mine: ReceiverProcess) -> None:
    url = f"{mine.start()}/hooks/github"
    for n in range(50):
        headers = signed(b"{}", secret="another", delivery=f"d{n}\xa0")
        assert post(url, b"{}", headers)[0] == 401
    assert post(url, b"{}", JSON)[0] == 401
    bad = b"\xff"
    assert post(url, bad, signed(bad))[0] == 400
    assert mine.stop() == 0
    told = [(each.type, each.subject, each.data["count"]) for each in log(mine)]
    # The first of each kind at once, and at the end those that were not told yet.
    assert told == [
        ("webhook.refused", "github", 1),
        ("webhook.refused", "github", 1),
        ("webhook.refused", "github", 50),
    ]
    assert log(mine)[0].data["delivery"] == "d0 "
    assert "X-Hub-Signature-256" in log(mine)[0].data["reason"]


def test_a_token_is_asked_for(mine: ReceiverProcess) -> None:
    mine.env["FT_RECEIVER_TOKEN"] = TOKEN
    url = f"{mine.start()}/v1/events"
    assert post(url, raw(event("a")), EVENT)[0] == 401
    assert post(url, raw(event("a")), {**EVENT, "Authorization": f"Bearer {TOKEN}x"})[0] == 401
    right = {**EVENT, "Authorization": f"Bearer {TOKEN}"}
    assert post(url, raw(event("a")), right)[0] == 200
    assert post(url, raw(event("b")), {**right, "Host": "hooks.example"})[0] == 200, "a tunnel may be used with a token"


def test_beyond_loopback_it_does_not_start_without_a_token(project: Project) -> None:
    done = run_bounded([sys.executable, "-m", "serving.receiver"], 60, {"FT_RECEIVER_HOST": "0.0.0.0"}, project.root)
    assert done.returncode == 2
    assert "set FT_RECEIVER_TOKEN" in done.stderr
    assert "receiver_host 0.0.0.0" in done.stderr


def test_only_one_of_a_project_and_sigterm_ends_it_with_0(mine: ReceiverProcess, project: Project) -> None:
    url = mine.start()
    second = run_bounded([sys.executable, "-m", "serving.receiver"], 60, {"FT_RECEIVER_PORT": "0"}, project.root)
    assert second.returncode == 2
    assert f"{url}: a receiver of this project runs already" in second.stderr
    assert mine.stop() == 0
    mine.start()
    assert mine.stop() == 0


def test_a_port_in_use_is_named(project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_bounded([sys.executable, "-m", "serving.receiver"], 60, {"FT_RECEIVER_PORT": port}, project.root)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}: the receiver cannot listen" in done.stderr
    assert "FT_RECEIVER_PORT" in done.stderr


def test_what_has_come_when_it_is_asked_to_end_is_appended_and_answered(mine: ReceiverProcess, store: Store) -> None:
    url, answers = mine.start(), []
    with held(store):
        waiting = [
            threading.Thread(target=lambda n=n: answers.append(post(f"{url}/v1/events", raw(event(f"w{n}")), EVENT)[0]))
            for n in range(5)
        ]
        for each in waiting:
            each.start()
        time.sleep(0.5)
        mine.process.terminate()
        time.sleep(0.5)
    for each in waiting:
        each.join()
    assert mine.process.wait(30) == 0
    assert answers == [200] * 5
    assert sorted(each.id for each in log(mine)) == [f"w{n}" for n in range(5)]


def test_while_the_store_is_locked_it_says_503_before_github_gives_up(mine: ReceiverProcess, store: Store) -> None:
    url = mine.start()
    body = b'{"ref": "refs/heads/main", "repository": {"full_name": "a/b"}}'
    with held(store):
        status, said = post(f"{url}/hooks/github", body, signed(body, delivery="late"), timeout=10)
        assert (status, said["headers"]["retry-after"]) == (503, "5")
        assert "send it again" in said["error"]["message"]
    assert post(f"{url}/hooks/github", body, signed(body, delivery="late"))[0] == 200
    assert len(found(mine, "late")) == 1


FULL = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_full_disk_is_said_and_nothing_is_lost_silently(mine: ReceiverProcess, store: Store) -> None:
    # Files may not grow beyond this, which SQLite meets as it meets a full disk.
    url = mine.start(sys.executable, "-c", FULL)
    answers = [post(f"{url}/v1/events", raw(event(f"f{n}", data={"fill": "x" * 20_000})), EVENT)[0] for n in range(40)]
    assert set(answers) == {200, 503}
    kept = {each.id for each in log(mine)}
    assert {f"f{n}" for n, status in enumerate(answers) if status == 200} <= kept
    with urlopen(f"{url}/healthz", timeout=10) as reply:
        assert json.load(reply) == {"status": "ok", "store": "failing"}


def test_a_restarted_postgres_loses_nothing(
    project: Project, mine: ReceiverProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgres_server() as server:
        monkeypatch.setenv("FT_DATABASE_URL", server.new_database("received"))
        url = f"{mine.start()}/v1/events"
        assert post(url, raw([event("p1", data={"nul": "a\0b"}), event("p2"), event("p1")]), BATCH)[1]["known"] == 1
        server.stop("immediate")
        assert post(url, raw(event("p3")), EVENT)[0] == 503
        server.start()
        end = time.monotonic() + 60
        while post(url, raw(event("p3")), EVENT)[0] != 200:
            assert time.monotonic() < end
        assert [each.id for each in log(mine)] == ["p1", "p2", "p3"]
        assert log(mine)[0].data == {"nul": "a\0b"}
        assert mine.stop() == 0


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_of_fifty_megabytes_is_refused_and_not_held(mine: ReceiverProcess, announced: bool) -> None:
    url = mine.start().removeprefix("http://")
    before = memory(mine.process.pid)
    connection = http.client.HTTPConnection(url, timeout=30)
    parts = (b" " * (1 << 20) for _ in range(50))
    length = {"Content-Length": str(50 << 20)} if announced else {}
    connection.request("POST", "/v1/events", parts, {**EVENT, **length}, encode_chunked=not announced)
    reply = connection.getresponse()
    assert reply.status == 413
    assert "larger than 1 MiB" in json.loads(reply.read())["error"]["message"]
    connection.close()
    assert memory(mine.process.pid) - before < 20 << 20
    assert post(f"http://{url}/v1/events", raw(event("after")), EVENT)[0] == 200


@pytest.mark.parametrize("line", [b"X: " + b"a" * (1 << 20), b"X: a\r\n" * (1 << 17)])
def test_headers_without_end_are_not_held(mine: ReceiverProcess, line: bytes) -> None:
    url = mine.start()
    before = memory(mine.process.pid)
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=30) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        with suppress(ConnectionError):
            connection.sendall(b"POST /v1/events HTTP/1.1\r\n")
            for _ in range(50):
                connection.sendall(line)
            assert connection.recv(4096).startswith(b"HTTP/1.1 431")
    assert memory(mine.process.pid) - before < 20 << 20
    assert post(f"{url}/v1/events", raw(event("after")), {**EVENT, "X-Long": "a" * 60_000})[0] == 200


def memory(pid: int) -> int:
    """The most that it has held, in bytes."""
    line = next(each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def test_the_command_line_does_the_same(project: Project) -> None:
    command = [sys.executable, "-m", "cli.main", "events", "receive"]
    with started(command, env={"FT_RECEIVER_PORT": "0"}, cwd=project.root) as process:
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("receiving at ").strip()
        assert post(f"{url}/v1/events", raw(event("c1")), EVENT)[0] == 200
        process.terminate()
        assert process.wait(30) == 0
