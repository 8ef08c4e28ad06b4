"""The client of RunPod against the stand-in: each documented answer, and each way in which an answer may be lost."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from registry.errors import AnswerLost, CloudError, NoCapacity, NoCredit, WrongKey
from registry.runpod_api import EndpointOrder, PodOrder, RunPod, open_runpod
from registry.runpod_shapes import billed, endpoint_of, offer_of, pod_of, unix_time
from registry.settings import Settings
from tests.fakes.runpod.started import Standin, standin

A40 = "NVIDIA A40"
CREATE = "POST /v2/pods"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standin]:
    with standin(tmp_path_factory.mktemp("runpod"), provision=0.02, start=0.02, grace=0.2) as started:
        yield started


@pytest.fixture
def cloud(running: Standin) -> Iterator[Standin]:
    """Without pods, endpoints and faults of the test before."""
    yield running
    running.faults()
    running.account(left=1000)
    for pod in running.alive():
        running.fate(pod["id"], "end")


@pytest.fixture
def runpod(cloud: Standin) -> Iterator[RunPod]:
    with RunPod(cloud.url, cloud.key, patience_s=5, timeout_s=5) as client:
        yield client


def order(name: str = "ft-0a1b2c-tickets-a1", **more: Any) -> PodOrder:
    given: dict[str, Any] = {
        "name": name, "image": "ft:1", "gpu": A40, "cloud": "secure", "env": {"FT_JOB": "tickets"},
        "args": "sleep 60", "disk_gb": 20,
    }  # fmt: skip
    return PodOrder(**given | more)


def named(cloud: Standin, name: str) -> list[dict[str, Any]]:
    return [each for each in cloud.truth()["pods"] if each["name"] == name]


def sent(cloud: Standin, since: float) -> list[dict[str, Any]]:
    return [each for each in cloud.requests("POST", "/v2/pods") if each["at"] >= since]


def test_an_order_becomes_a_pod(cloud: Standin, runpod: RunPod) -> None:
    made = runpod.create(order("ft-made", data_centers=("US-TX-3",)))
    assert (made.name, made.status, made.gpu, made.cloud) == ("ft-made", "PROVISIONING", A40, "secure")
    assert made.usd_per_hour == 0.4
    assert made.created == pytest.approx(time.time(), abs=5)
    assert (made.uptime_s, made.utilisation) == (None, None)
    cloud.until(lambda truth: truth["pods"][-1]["status"] == "RUNNING")
    now = runpod.pod(made.id)
    assert now is not None
    assert (now.status, now.utilisation) == ("RUNNING", 90.0)
    assert now.uptime_s is not None
    assert runpod.pods() == [now]
    assert named(cloud, "ft-made")[0]["data_center"] == "US-TX-3"


def test_community_pods_cost_what_the_catalogue_says(runpod: RunPod) -> None:
    offers = {each.id: each for each in runpod.gpus("community")}
    made = runpod.create(order(cloud="community"))
    assert (made.cloud, made.usd_per_hour) == ("community", offers[A40].community_usd)


def test_the_catalogue_tells_prices_memory_and_what_is_free(cloud: Standin, runpod: RunPod) -> None:
    cloud.faults({"fault": "sold_out", "gpu": "*RTX 4090"})
    offers = {each.id: each for each in runpod.gpus()}
    a40, l4, ada = offers[A40], offers["NVIDIA L4"], offers["NVIDIA GeForce RTX 4090"]
    assert (a40.name, a40.memory_gb, a40.secure_usd, a40.availability) == ("A40", 48, 0.4, "HIGH")
    assert "EU-RO-1" in a40.data_centers
    assert (l4.secure_usd, l4.community_usd) == (0.44, None)
    assert (ada.availability, ada.data_centers) == ("NONE", ())


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        ({"fault": "no_capacity", "detail": "no machine with this GPU"}, NoCapacity),
        ({"fault": "error", "status": 400, "detail": "no machine with this GPU"}, NoCapacity),
        ({"fault": "error", "status": 403, "detail": "no machine with this GPU"}, NoCapacity),
        ({"fault": "error", "status": 402, "detail": "no machine with this GPU"}, NoCredit),
        ({"fault": "error", "status": 401, "detail": "no machine with this GPU"}, WrongKey),
        ({"fault": "error", "status": 409, "detail": "no machine with this GPU"}, CloudError),
    ],
)
def test_a_refused_create_is_sent_once_and_says_why(
    cloud: Standin, runpod: RunPod, rule: dict[str, Any], error: type[CloudError]
) -> None:
    cloud.faults({"match": CREATE} | rule)
    begun = time.time()
    with pytest.raises(CloudError, match="no machine with this GPU") as caught:
        runpod.create(order())
    assert type(caught.value) is error
    assert len(sent(cloud, begun)) == 1
    assert cloud.alive() == []


def test_a_body_that_breaks_the_contract_names_each_violation(cloud: Standin, runpod: RunPod) -> None:
    begun = time.time()
    with pytest.raises(CloudError, match=r"422.*\$\.disk") as caught:
        runpod.create(order(disk_gb=0))
    assert type(caught.value) is CloudError
    assert len(sent(cloud, begun)) == 1


def test_an_account_without_credit_gets_nothing(cloud: Standin, runpod: RunPod) -> None:
    cloud.account(left=0.0)
    with pytest.raises(NoCredit, match="insufficient balance"):
        runpod.create(order())


def test_a_rate_limited_create_waits_as_told_and_is_done_once(cloud: Standin, runpod: RunPod) -> None:
    cloud.faults({"match": CREATE, "fault": "rate_limit", "seconds": 1, "times": 2})
    begun = time.time()
    made = runpod.create(order("ft-limited"))
    assert time.time() - begun >= 2
    assert [each["status"] for each in sent(cloud, begun)] == [429, 429, 201]
    assert [each["id"] for each in named(cloud, "ft-limited")] == [made.id]


def test_nobody_waits_longer_than_the_patience(cloud: Standin, runpod: RunPod) -> None:
    cloud.faults({"match": CREATE, "fault": "rate_limit", "seconds": 60})
    begun = time.monotonic()
    with pytest.raises(CloudError, match="too many requests"):
        runpod.create(order())
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    ("fault", "made"),
    [("timeout_after", 1), ("error_after", 1), ("reset_after", 1), ("garbage", 1), ("timeout", 0), ("error", 0),
     ("reset", 0)],
)  # fmt: skip
def test_a_create_without_a_clear_answer_is_lost_and_never_sent_again(cloud: Standin, fault: str, made: int) -> None:
    cloud.faults({"match": CREATE, "fault": fault, "seconds": 2})
    begun, name = time.time(), f"ft-{fault}"
    with RunPod(cloud.url, cloud.key, patience_s=5, timeout_s=0.5) as client:
        with pytest.raises(AnswerLost) as caught:
            client.create(order(name))
        assert "ft pods" in str(caught.value)
        assert [each.name for each in client.pods()] == [name] * made
    assert len(sent(cloud, begun)) <= 1  # one that still hangs is not told yet


def test_a_create_that_was_never_sent_is_no_lost_one() -> None:
    with RunPod(f"http://127.0.0.1:{_closed_port()}", "rpa_x", patience_s=0, timeout_s=2) as client:
        with pytest.raises(CloudError, match="cannot be reached") as caught:
            client.create(order())
        assert not isinstance(caught.value, AnswerLost)
        with pytest.raises(CloudError, match="cannot be reached"):
            client.pods()


@pytest.mark.parametrize("fault", ["error", "rate_limit", "reset", "error_after", "reset_after"])
def test_questions_are_asked_again(cloud: Standin, runpod: RunPod, fault: str) -> None:
    cloud.faults({"match": "GET /v2/pods", "fault": fault, "times": 2, "seconds": 0.1, "status": 503})
    assert runpod.pods() == []
    assert cloud.truth()["faults"][0]["fired"] == 2


def test_questions_end_with_the_patience(cloud: Standin) -> None:
    cloud.faults({"match": "GET /v2/pods", "fault": "error", "status": 502, "detail": "bad day"})
    begun = time.monotonic()
    with RunPod(cloud.url, cloud.key, patience_s=0.5, timeout_s=2) as client, pytest.raises(CloudError, match="502: b"):
        client.pods()
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("fault", ["error", "reset", "error_after", "reset_after"])
def test_an_end_is_asked_for_until_it_is_answered(cloud: Standin, runpod: RunPod, fault: str) -> None:
    """After one that was done without a word the pod is gone: 404 is what was wanted."""
    made = runpod.create(order())
    cloud.faults({"match": "DELETE /v2/pods/*", "fault": fault, "times": 1})
    runpod.terminate(made.id)
    assert cloud.alive() == []


def test_who_is_gone_is_not_missed(runpod: RunPod) -> None:
    made = runpod.create(order())
    runpod.terminate(made.id)
    runpod.terminate(made.id)
    runpod.terminate("never/was")
    assert runpod.pod(made.id) is None
    assert runpod.pods() == []


def test_a_refused_end_is_an_error_and_an_ignored_one_is_none(cloud: Standin, runpod: RunPod) -> None:
    made = runpod.create(order())
    refused = {"match": "DELETE *", "fault": "error", "status": 409, "times": 1}
    cloud.faults(refused, {"match": "DELETE *", "fault": "ignore", "after": 1, "times": 1})
    with pytest.raises(CloudError, match="409"):
        runpod.terminate(made.id)
    runpod.terminate(made.id)
    assert [each["id"] for each in cloud.alive()] == [made.id]
    runpod.terminate(made.id)
    assert cloud.alive() == []


def test_a_doubled_pod_shows_in_the_list(cloud: Standin, runpod: RunPod) -> None:
    cloud.faults({"match": CREATE, "fault": "duplicate", "times": 1})
    made = runpod.create(order("ft-twice"))
    found = runpod.pods()
    assert [each.name for each in found] == ["ft-twice", "ft-twice"]
    assert made.id in {each.id for each in found}


def test_a_dearer_pod_says_so(cloud: Standin, runpod: RunPod) -> None:
    cloud.faults({"match": CREATE, "fault": "price", "factor": 3})
    assert runpod.create(order()).usd_per_hour == pytest.approx(1.2)


def test_a_new_pod_may_not_be_listed_yet(cloud: Standin, runpod: RunPod) -> None:
    cloud.faults({"fault": "list_lag", "seconds": 1.0})
    made = runpod.create(order("ft-new"))
    assert "ft-new" not in [each.name for each in runpod.pods()]
    assert runpod.pod(made.id) is not None
    time.sleep(1.0)
    assert made.id in [each.id for each in runpod.pods()]


def test_an_ended_pod_may_stay_in_the_list(cloud: Standin, runpod: RunPod) -> None:
    made = runpod.create(order())
    time.sleep(1.0)
    cloud.faults({"fault": "list_lag", "seconds": 0.9})
    runpod.terminate(made.id)
    assert (made.id, "RUNNING") in [(each.id, each.status) for each in runpod.pods()]
    assert runpod.pod(made.id) is None
    time.sleep(1.0)
    assert runpod.pods() == []


def test_bills_are_what_was_used_and_come_later(cloud: Standin, runpod: RunPod) -> None:
    made = runpod.create(order(disk_gb=730))
    time.sleep(1.2)
    runpod.terminate(made.id)
    truth = named(cloud, made.name)[-1]
    assert truth["usd"] == pytest.approx(2 * (0.4 + 0.1) / 3600)
    assert runpod.billing(time.time() - 60)[made.id] == pytest.approx(truth["usd"])
    assert runpod.billing(pod=made.id) == {made.id: pytest.approx(truth["usd"])}
    cloud.faults({"fault": "billing_lag", "seconds": 600})
    assert made.id not in runpod.billing()


def test_the_log_is_read_once_by_its_cursor(cloud: Standin, runpod: RunPod) -> None:
    made = runpod.create(order(args="sh -c 'for i in 1 2 3; do echo 줄 $i; done; sleep 1; echo last; sleep 60'"))
    cloud.until(lambda truth: truth["pods"][-1]["status"] == "RUNNING")
    time.sleep(0.3)
    first = runpod.logs(made.id, quiet_s=0.3)
    assert [each.text for each in first] == ["줄 1", "줄 2", "줄 3"]
    assert {each.source for each in first} == {"container"}
    time.sleep(1)
    assert [each.text for each in runpod.logs(made.id, cursor=first[-1].cursor, quiet_s=0.3)] == ["last"]
    assert [each.text for each in runpod.logs(made.id, tail=2, quiet_s=0.3)] == ["줄 3", "last"]
    assert any("start container" in each.text for each in runpod.logs(made.id, source="system", quiet_s=0.3))
    with pytest.raises(CloudError, match="404"):
        runpod.logs("nobody")


def test_a_wrong_key_is_named_and_not_shown(cloud: Standin) -> None:
    with RunPod(cloud.url, "rpa_stolen", patience_s=1) as client:
        for call in (client.pods, client.gpus, lambda: client.create(order())):
            with pytest.raises(WrongKey) as caught:
                call()
            assert "RUNPOD_API_KEY" in str(caught.value)
            assert "rpa_stolen" not in str(caught.value)


def test_an_answer_that_quotes_the_key_is_not_printed_so(cloud: Standin, runpod: RunPod) -> None:
    cloud.faults({"match": "GET *", "fault": "error", "status": 418, "detail": f"you sent Bearer {cloud.key}"})
    with pytest.raises(CloudError) as caught:
        runpod.pods()
    assert cloud.key not in str(caught.value)
    assert "Bearer ***" in str(caught.value)


@pytest.mark.parametrize("key", ["", "rpa_a\nb", "rpa_ключ", "rpa a"])
def test_a_key_that_is_none_is_refused_before_anything_is_sent(key: str) -> None:
    with pytest.raises(WrongKey) as caught:
        open_runpod(Settings(runpod_api_key=key))
    assert not key or key not in str(caught.value)


def test_the_key_is_taken_from_either_variable(monkeypatch: pytest.MonkeyPatch, cloud: Standin) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", f"{cloud.key}\n")
    with open_runpod(Settings(runpod_url=cloud.url + "/")) as client:
        assert client.pods() == []
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_other")
    with open_runpod(Settings(runpod_url=cloud.url, runpod_api_key=cloud.key)) as client:
        assert client.pods() == []


def test_a_pods_own_key_reaches_that_pod_alone(cloud: Standin, runpod: RunPod) -> None:
    mine, other = (runpod.create(order(args="sh -c 'echo $RUNPOD_API_KEY; sleep 60'")) for _ in range(2))
    cloud.until(lambda truth: all(each["processes"] for each in truth["pods"][-2:]))
    time.sleep(0.3)
    key = runpod.logs(mine.id, quiet_s=0.3)[0].text
    with RunPod(cloud.url, key, patience_s=1) as within:
        for call in (within.pods, lambda: within.pod(other.id), lambda: within.terminate(other.id)):
            with pytest.raises(WrongKey):
                call()
        assert within.pod(mine.id) is not None
        within.terminate(mine.id)
    assert [each["id"] for each in cloud.alive()] == [other.id]


def test_an_address_that_is_not_runpods_is_said_so(cloud: Standin) -> None:
    with RunPod(f"{cloud.url}/nothing", cloud.key, patience_s=0) as client:
        with pytest.raises(CloudError, match="404"):
            client.pods()
        with pytest.raises(CloudError, match="404"):
            client.create(order())


@pytest.mark.parametrize("url", ["", "api.runpod.io", "ftp://api.runpod.io", "http://", "http://[::", "https://a:b"])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(CloudError, match="no address"):
        RunPod(url, "rpa_x")


def test_a_proxy_for_the_internet_is_not_asked_for_this_machine(
    cloud: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{_closed_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with RunPod(cloud.url, cloud.key, patience_s=0) as client:
        assert client.pods() == []


def test_an_endpoint_lives_from_order_to_bill(cloud: Standin, runpod: RunPod) -> None:
    wanted = EndpointOrder("support", "worker:1", ("AMPERE_48",), {"MODEL_NAME": "base"}, workers_max=2)
    made = runpod.create_endpoint(wanted)
    assert (made.name, made.kind, made.workers_min, made.workers_max) == ("support", "QUEUE", 0, 2)
    assert (made.pools, made.url) == (("AMPERE_48",), f"{cloud.url}/v2/{made.id}")
    changed = runpod.update_endpoint(made.id, env={"LORA_MODULES": "[]"}, workers_min=1)
    assert (changed.env, changed.workers_min, changed.workers_max) == ({"LORA_MODULES": "[]"}, 1, 2)
    assert changed.image == "worker:1"
    assert [each.id for each in runpod.endpoints()] == [made.id]
    time.sleep(0.1)
    assert runpod.endpoint_billing()[made.id] == pytest.approx(1.22 / 3600, rel=0.01)
    runpod.delete_endpoint(made.id)
    runpod.delete_endpoint(made.id)
    assert (runpod.endpoint(made.id), runpod.endpoints()) == (None, [])
    with pytest.raises(CloudError, match="404"):
        runpod.update_endpoint(made.id, workers_min=0)


def test_an_endpoint_whose_answer_was_lost_is_there(cloud: Standin, runpod: RunPod) -> None:
    cloud.faults({"match": "POST /v2/serverless", "fault": "error_after", "times": 1})
    with pytest.raises(AnswerLost):
        runpod.create_endpoint(EndpointOrder("lost", "worker:1", ("ADA_24",), {}))
    [there] = runpod.endpoints()
    assert there.name == "lost"
    runpod.delete_endpoint(there.id)


def test_load_balancers_and_queues_by_requests_are_ordered_as_documented(runpod: RunPod) -> None:
    balancer = EndpointOrder("lb", "vllm:1", ("ADA_24",), {}, kind="LOAD_BALANCER", ports=("8000/http",))
    by_requests = EndpointOrder("queue", "vllm:1", ("ADA_24",), {}, requests_per_worker=8)
    assert "idleTimeout" not in by_requests.body()["workers"]
    for wanted in (balancer, by_requests):
        made = runpod.create_endpoint(wanted)
        assert made.kind == wanted.kind
        runpod.delete_endpoint(made.id)


POD = {"id": "a", "name": "n", "status": "RUNNING", "cost": 0.4}


def test_unknown_fields_are_ignored_and_missing_ones_are_named() -> None:
    assert pod_of(POD | {"news": [1], "runtime": {"gpus": [{"util": 3}, {"util": 70}, {}]}}).utilisation == 70
    assert pod_of(POD | {"createdAt": "2026-06-01T12:00:00Z"}).created == 1780315200
    for name in POD:
        with pytest.raises(CloudError, match=f"`{name}`"):
            pod_of({key: value for key, value in POD.items() if key != name})
    for broken in (None, ["x"], "x", POD | {"cost": "dear"}):
        with pytest.raises(CloudError):
            pod_of(broken)
    with pytest.raises(CloudError, match="`price`"):
        offer_of({"id": "x", "memory": 24})
    with pytest.raises(CloudError, match="`min`"):
        endpoint_of({"id": "x", "name": "y"})
    with pytest.raises(CloudError, match="`records`"):
        billed({}, "podId")


def test_empty_parts_of_an_answer_are_no_crash() -> None:
    """As the documented examples have them: `runtime` {} while it is provisioned, no `gpu` of a CPU pod."""
    assert pod_of(POD | {"runtime": {}, "gpu": None, "createdAt": None}).utilisation is None
    assert unix_time("soon") is None
    assert unix_time("2026-06-01T12:00:00") == 1780315200


def _closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
