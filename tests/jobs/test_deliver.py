"""What happens is sent: at least once, in order where nothing fails, and whatever the receiver does."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from jobs.deliver import Deliverer, send_next
from jobs.sink_answer import Answer, backoff, judge_answer
from registry import outbox
from registry.events import append, new_event, read
from registry.project import Project
from registry.sink_message import webhook_id
from registry.store import Store
from tests.conftest import started
from tests.fakes.sink_receiver import CLOSE, CUT, HANG, Receiver, sink_receiver
from tests.mlflow_server import free_port

WORK = """
import time
from jobs.deliver import Deliverer
from registry.project import find_project
from registry.store import open_store
project = find_project()
Deliverer(project, open_store(project)).start()
print("on", flush=True)
time.sleep(600)
"""


@pytest.fixture
def store(either_store: Store) -> Store:
    return either_store


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with sink_receiver() as receiver:
        yield receiver


def sinks(project: Project, *written: dict[str, Any]) -> None:
    (project.root / "ft.yaml").write_text(yaml.safe_dump({"sinks": list(written)}))


def chat(receiver: Receiver, **more: Any) -> dict[str, Any]:
    return {"name": "chat", "url": receiver.url, "types": ["external.*"], "timeout": 2, **more}


def known(project: Project, store: Store) -> Deliverer:
    """The sinks of ft.yaml, known from now on; nothing is sent by itself."""
    found = Deliverer(project, store)
    found._read_file()
    for sink in found.sinks:
        outbox.begin(store, sink.name)
    return found


def post(store: Store, *ids: str, **data: Any) -> None:
    for id_ in ids:
        append(store, new_event("test", "external.go", f"s{id_}", {"n": id_, **data}, key=id_))


def send(deliverer: Deliverer) -> None:
    """All that is due now, by this thread."""
    for sink in deliverer.sinks:
        while outbox.fill(deliverer.store, sink.name, lambda event: event.type.startswith(("external.", "sink."))):
            pass
        while send_next(deliverer.store, sink):
            pass


def state(store: Store, sink: str = "chat") -> dict[str, Any]:
    return outbox.states(store)[sink]


def come_due(store: Store, seconds: float = 1e6) -> None:
    """So many seconds have passed for what waits, though not since its first attempt."""
    with store.writing() as connection:
        connection.execute("UPDATE outbox SET due = due - ?, leased_until = leased_until - ?", (seconds, seconds))
        connection.execute("UPDATE sinks SET paused_until = NULL")


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def numbers(receiver: Receiver) -> list[str]:
    return [json.loads(each.body)["data"]["n"] for each in receiver.received]


def test_what_happens_is_sent_in_order_and_what_was_before_is_not(
    project: Project, store: Store, receiver: Receiver
) -> None:
    post(store, "before")
    sinks(project, chat(receiver))
    deliverer = known(project, store)
    deliverer.start()
    append(store, new_event("test", "dataset.versioned", "d", {"hash": "x"}))
    post(store, *(str(n) for n in range(30)))
    receiver.wait_for(30)
    wait_until(lambda: not deliverer.busy())
    assert numbers(receiver) == [str(n) for n in range(30)]
    assert (state(store)["delivered"], state(store)["waiting"], state(store)["error"]) == (30, 0, None)
    event = read(store, subject="s7")[0]
    assert receiver.received[7].headers["webhook-id"] == webhook_id(event)
    assert json.loads(receiver.received[7].body) == event.as_dict()


def test_a_sink_that_is_written_into_the_file_meanwhile_is_seen(
    project: Project, store: Store, receiver: Receiver, capfd: pytest.CaptureFixture[str]
) -> None:
    deliverer = known(project, store)
    deliverer.start()
    sinks(project, chat(receiver, template={"text": "{subject}"}))
    wait_until(lambda: "chat" in outbox.states(store))
    post(store, "1")
    assert json.loads(receiver.wait_for(1)[0].body) == {"text": "s1"}
    (project.root / "ft.yaml").write_text("sinks: [{name: chat}]\n")
    wait_until(lambda: "stay as they were" in capfd.readouterr().err)
    post(store, "2")
    receiver.wait_for(2)
    (project.root / "ft.yaml").unlink()
    wait_until(lambda: not deliverer.sinks)


@pytest.mark.parametrize("answer", [500, 408, (429, {}), CUT, CLOSE, HANG])
def test_what_may_pass_is_tried_again(answer: Any, project: Project, store: Store, receiver: Receiver) -> None:
    sinks(project, chat(receiver, timeout=0.3))
    deliverer = known(project, store)
    receiver.answer = lambda _: answer if len(receiver.received) == 1 else 200
    post(store, "1")
    send(deliverer)
    assert (state(store)["waiting"], state(store)["given_up"], len(receiver.received)) == (1, 0, 1)
    assert 0.4 < state(store)["due"] - time.time() + 0.2 < 2
    come_due(store)
    send(deliverer)
    first, again = receiver.received
    assert (first.body, first.headers["webhook-id"]) == (again.body, again.headers["webhook-id"])
    assert (state(store)["waiting"], state(store)["delivered"]) == (0, 1)


def test_nobody_listens_until_somebody_does(project: Project, store: Store) -> None:
    port = free_port()
    sinks(project, chat(Receiver(port)))
    deliverer = known(project, store)
    post(store, "1", "2")
    send(deliverer)
    assert "Cannot connect to host 127.0.0.1" in state(store)["error"]
    assert "very-secret" not in state(store)["error"]
    assert state(store)["paused_until"] > time.time(), "the second is not tried in vain at once"
    assert not send_next(store, deliverer.sinks[0])
    deliverer.start()
    with sink_receiver(port) as receiver:
        receiver.wait_for(2)
        assert sorted(numbers(receiver)) == ["1", "2"]


def test_retry_after_holds_for_the_whole_sink(project: Project, store: Store, receiver: Receiver) -> None:
    sinks(project, chat(receiver))
    deliverer = known(project, store)
    receiver.answer = lambda _: (429, {"Retry-After": "2"}) if len(receiver.received) == 1 else 200
    deliverer.start()
    post(store, "1", "2")
    receiver.wait_for(3)
    assert numbers(receiver) == ["1", "1", "2"]
    assert receiver.received[1].at - receiver.received[0].at >= 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [(404, "404"), (400, "400 no_text *** here"), ((302, {"Location": "/elsewhere"}), "redirects are not followed")],
)
def test_what_cannot_pass_is_given_up_and_told_once(
    answer: Any, said: str, project: Project, store: Store, receiver: Receiver
) -> None:
    sinks(project, chat(receiver, types=["external.*", "sink.*"]))
    deliverer = known(project, store)
    receiver.answer, receiver.text = lambda _: answer, b"no_text /services/T0/very-secret here"
    post(store, "1", "2")
    send(deliverer)
    assert numbers(receiver) == ["1", "2"]
    assert (state(store)["waiting"], state(store)["given_up"]) == (0, 2)
    [told] = read(store, type_="sink.gave_up")
    assert (told.subject, told.data["event"], told.cause) == ("chat", "test 1", "test 1")
    assert said in told.data["reason"]
    assert "very-secret" not in told.data["reason"]
    receiver.answer = lambda _: 200
    assert outbox.retry(store, "chat") == 2
    deliverer.start()
    receiver.wait_for(4)
    wait_until(lambda: state(store)["delivered"] == 2)
    assert len(read(store, type_="sink.gave_up")) == 1


def test_two_sinks_that_fail_and_hear_of_it_come_to_an_end(project: Project, store: Store, receiver: Receiver) -> None:
    both = ["external.*", "sink.*"]
    sinks(project, chat(receiver, types=both), chat(receiver, types=both, name="other"))
    deliverer = known(project, store)
    receiver.answer = lambda _: 404
    deliverer.start()
    post(store, "1")
    receiver.wait_for(4)  # the event and the other's failure, each
    wait_until(lambda: not deliverer.busy())
    time.sleep(0.5)
    assert len(receiver.received) == 4
    assert len(read(store, type_="sink.gave_up")) == 2


def test_gone_switches_the_sink_off_until_its_address_changes(
    project: Project, store: Store, receiver: Receiver
) -> None:
    sinks(project, chat(receiver))
    deliverer = known(project, store)
    receiver.answer = lambda _: 410
    deliverer.start()
    post(store, "1")
    wait_until(lambda: bool(state(store)["disabled"]))
    post(store, "2")
    time.sleep(0.5)
    assert (len(receiver.received), deliverer.busy()) == (1, False)
    receiver.answer = lambda _: 200
    sinks(project, chat(receiver, url=receiver.url + "/new"))
    assert receiver.wait_for(2)[1].path.endswith("/new")
    assert numbers(receiver) == ["1", "2"]


def test_one_that_fails_keeps_neither_other_events_nor_other_sinks(
    project: Project, store: Store, receiver: Receiver
) -> None:
    with sink_receiver() as slow:
        slow.answer = lambda _: HANG
        sinks(project, chat(receiver), chat(slow, name="slow", timeout=20))
        deliverer = known(project, store)
        receiver.answer = lambda each: 500 if json.loads(each.body)["data"]["n"] == "bad" else 200
        deliverer.start()
        post(store, "1", "bad", "2", "3")
        wait_until(lambda: state(store)["delivered"] == 3)
        assert [each for each in numbers(receiver) if each != "bad"] == ["1", "2", "3"]
        assert state(store)["waiting"] == 1


def test_of_a_message_on_its_way_nobody_else_sends_anything(project: Project, store: Store, receiver: Receiver) -> None:
    sinks(project, chat(receiver))
    deliverer = known(project, store)
    post(store, "1", "2")
    outbox.fill(store, "chat", lambda _: True)
    mine = outbox.claim(store, "chat", 60)
    assert mine is not None
    assert not send_next(store, deliverer.sinks[0])
    with store.writing() as connection:  # it took too long, and another host has it now
        connection.execute("UPDATE outbox SET leased_until = 1 WHERE seq = ?", (mine.seq,))
    send(deliverer)
    outbox.delivered(store, mine)
    outbox.give_up(store, mine, None, "late")
    assert (numbers(receiver), state(store)["delivered"], state(store)["given_up"]) == (["1", "2"], 2, 0)


def test_killed_between_sending_and_marking_it_is_sent_again(
    project: Project, store: Store, receiver: Receiver
) -> None:
    sinks(project, chat(receiver, timeout=30))
    known(project, store)
    with started([sys.executable, "-c", WORK], cwd=project.root) as worker:

        def kill(_: Any) -> Any:
            worker.kill()
            worker.wait()
            return 200

        receiver.answer = kill
        post(store, "1", "2")
        receiver.wait_for(1)
        wait_until(lambda: worker.poll() is not None)
    assert state(store)["delivered"] == 0
    receiver.answer = lambda _: 200
    with started([sys.executable, "-c", WORK], cwd=project.root):
        wait_until(lambda: state(store)["delivered"] == 2)
    assert numbers(receiver) == ["1", "1", "2"]
    assert len({each.headers["webhook-id"] for each in receiver.received}) == 2


def test_several_workers_send_each_event_once_and_in_order(project: Project, store: Store, receiver: Receiver) -> None:
    sinks(project, chat(receiver))
    known(project, store)
    command = [sys.executable, "-c", WORK]
    with started(command, cwd=project.root) as one, started(command, cwd=project.root) as two:
        for each in (one, two):
            assert each.stdout is not None
            assert each.stdout.readline() == "on\n"
        post(store, *(str(n) for n in range(100)))
        wait_until(lambda: state(store)["delivered"] == 100, 60)
    assert numbers(receiver) == [str(n) for n in range(100)]


def test_what_the_environment_lacks_is_said_and_everything_waits(
    project: Project, store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks(project, chat(receiver, url=None, url_env="FT_HOOK"))
    deliverer = known(project, store)
    deliverer.start()
    post(store, "1")
    wait_until(lambda: "FT_HOOK: is not set" in (state(store)["error"] or ""))
    assert not deliverer.busy()
    monkeypatch.setenv("FT_HOOK", receiver.url)
    receiver.wait_for(1)


def test_an_event_that_cannot_be_sent_is_given_up(project: Project, store: Store, receiver: Receiver) -> None:
    sinks(project, chat(receiver))
    deliverer = known(project, store)
    post(store, "1", bad=float("nan"))
    post(store, "2", "3")
    outbox.fill(store, "chat", lambda _: True)
    with store.writing() as connection:
        connection.execute("DELETE FROM events WHERE subject = 's2'")
    send(deliverer)
    assert (numbers(receiver), state(store)["given_up"]) == (["3"], 2)


def test_a_clock_that_was_wrong_blocks_nothing(project: Project, store: Store, receiver: Receiver) -> None:
    sinks(project, chat(receiver))
    deliverer = known(project, store)
    post(store, "1")
    outbox.fill(store, "chat", lambda _: True)
    with store.writing() as connection:
        connection.execute("UPDATE outbox SET due = 1e10, leased_until = 1e10, lease = 'elsewhere 1 x'")
        connection.execute("UPDATE sinks SET paused_until = 1e10")
    assert deliverer.busy()
    send(deliverer)
    assert numbers(receiver) == ["1"]


NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("status", "wait", "first", "due"),
    [
        (500, "", NOW, NOW + 4),
        (503, "100", NOW, NOW + 100),
        (429, "0", NOW, NOW + 1),
        (429, "Fri, 15 Jan 2027 08:01:00 GMT", NOW, NOW + 60),
        (429, "soon", NOW, NOW + 4),
        (500, "100", NOW, NOW + 4),
        (None, "", NOW, NOW + 4),
        (500, "", NOW - 86399, None),
        (429, "99999999999999999999", NOW, None),
        (401, "", NOW, None),
        (301, "", NOW, None),
        (410, "", NOW, None),
    ],
)
def test_when_it_is_tried_again(status: int | None, wait: str, first: float, due: float | None) -> None:
    found = judge_answer(Answer(status, "", wait, 0.0), 3, first, NOW, away=0, luck=0.0)
    assert (found.done, found.due, found.disable) == (False, due, status == 410)


def test_back_off_grows_to_an_hour() -> None:
    assert [backoff(n, 0.0) for n in (1, 2, 3, 12, 13, 999)] == [1, 2, 4, 2048, 3600, 3600]
    assert backoff(3, 1.0) == 2
