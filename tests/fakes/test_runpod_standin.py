"""The stand-in itself: money to the cent, faults that come as ordered, and pods that end when they shall."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.fakes.runpod.billing import DISK_USD_PER_GB_HOUR, Period, Span, floor, following, period_of, records
from tests.fakes.runpod.contract import Problem
from tests.fakes.runpod.faults import Faults
from tests.fakes.runpod.started import Standin, standin

NOON = 1780315200.0  # 2026-06-01T12:00:00Z, a Monday
BODY: dict[str, Any] = {
    "name": "ft-x", "image": "ft:1", "gpu": {"id": "NVIDIA A40", "count": 1}, "args": "sleep 60", "disk": 20,
}  # fmt: skip


ENDS_ITSELF = """
import os, sys, time, urllib.request
url = f"{sys.argv[1]}/v2/pods/{os.environ['RUNPOD_POD_ID']}/action"
key = {"Authorization": f"Bearer {os.environ['RUNPOD_API_KEY']}"}
with urllib.request.urlopen(urllib.request.Request(url, b'{"action": "terminate"}', key)) as answer:
    print("said", answer.status, flush=True)
time.sleep(60)
"""


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Standin]:
    with standin(tmp_path / "cloud", provision=0.02, start=0.02, again=0.05, grace=0.5) as started:
        yield started


@pytest.fixture
def api(cloud: Standin) -> Iterator[httpx2.Client]:
    with asking(cloud) as client:
        yield client


def asking(cloud: Standin) -> httpx2.Client:
    headers = {"Authorization": f"Bearer {cloud.key}"}
    return httpx2.Client(base_url=cloud.url, headers=headers, timeout=20, trust_env=False)


def started(cloud: Standin, api: httpx2.Client, args: str = "sleep 60", **more: Any) -> str:
    """A pod's id, once its program runs."""
    id = created(api, args, **more)
    cloud.until(lambda truth: pod(truth, id)["starts"])
    return id


def created(api: httpx2.Client, args: str = "sleep 60", **more: Any) -> str:
    answer = api.post("/v2/pods", json=BODY | {"args": args} | more)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def pod(truth: dict[str, Any], id: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in truth["pods"] if each["id"] == id)
    return found


def log(cloud: Standin, id: str) -> str:
    return Path(pod(cloud.truth(), id)["log"]).read_text(encoding="utf-8")


def until_said(cloud: Standin, id: str, text: str) -> str:
    end = time.monotonic() + 20
    while text not in (said := log(cloud, id)):
        assert time.monotonic() < end, said
        time.sleep(0.05)
    return said


def of_pod(id: str) -> list[int]:
    """Every process that has the pod's environment, wherever it hangs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"RUNPOD_POD_ID={id}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def until_gone(id: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while found := of_pod(id):
        assert time.monotonic() < end, found
        time.sleep(0.05)


def test_every_second_that_began_is_charged() -> None:
    span = Span(NOON, 3.6, 0.36, end=NOON + 10.2)
    assert span.seconds(NOON + 99) == 11
    assert span.usd(NOON + 99) == pytest.approx(11 * 3.96 / 3600)
    assert span.seconds(NOON + 4) == 4
    assert Span(NOON, 3.6).seconds(NOON + 0.1) == 1


def test_a_bill_over_midnight_is_two_records_that_are_the_whole() -> None:
    span = Span(NOON + 11 * 3600, 1.0, 0.5, end=NOON + 14 * 3600)
    period = Period(floor(NOON, "day"), following(floor(NOON, "day"), "day") + 86400, "day")
    found = records("a", [span], period, NOON + 86400)
    assert [(each["startTime"], each["gpuAmount"], each["diskAmount"]) for each in found] == [
        ("2026-06-01T00:00:00Z", pytest.approx(1.0), pytest.approx(0.5)),
        ("2026-06-02T00:00:00Z", pytest.approx(2.0), pytest.approx(1.0)),
    ]
    late = records("a", [span], period, NOON + 11.5 * 3600)
    assert sum(each["totalAmount"] for each in late) == pytest.approx(0.75)


@pytest.mark.parametrize("bucket", ["hour", "day", "week", "month", "year"])
def test_buckets_of_any_size_add_up_to_the_same(bucket: str) -> None:
    spans = [Span(NOON + n * 86400 * 9, 1.0, end=NOON + n * 86400 * 9 + 5000.5) for n in range(30)]
    period = Period(floor(NOON, bucket), following(floor(NOON + 366 * 86400, bucket), bucket), bucket)
    found = records("a", spans, period, NOON + 400 * 86400)
    assert sum(each["totalAmount"] for each in found) == pytest.approx(30 * 5001 / 3600)
    assert all(each["startTime"] < each["endTime"] for each in found)


def test_the_period_snaps_to_its_buckets() -> None:
    assert period_of({"bucketSize": "week", "lastN": "2"}, NOON) == Period(
        NOON - 7.5 * 86400, NOON + 6.5 * 86400, "week"
    )
    whole = period_of({"startTime": "2026-06-01T05:00:00Z", "endTime": "2026-06-01T05:00:01Z"}, NOON)
    assert whole == Period(NOON - 43200, NOON + 43200, "day")
    for wrong in ({"bucketSize": "minute"}, {"lastN": "0"}, {"lastN": "1", "startTime": "x"}, {"startTime": "x"}):
        with pytest.raises(Problem):
            period_of(wrong, NOON)


def test_a_pod_is_charged_until_it_is_stopped_and_no_longer(cloud: Standin, api: httpx2.Client) -> None:
    id = started(cloud, api)
    assert api.get(f"/v2/pods/{id}").json()["cost"] == 0.4
    stopped = api.post(f"/v2/pods/{id}/action", json={"action": "stop"}).json()
    assert (stopped["status"], stopped["cost"], stopped["runtime"]) == ("EXITED", 0.0, None)
    usd = pod(cloud.truth(), id)["usd"]
    time.sleep(1.1)
    truth = pod(cloud.truth(), id)
    assert (truth["usd"], truth["charged"], truth["alive"]) == (usd, False, True)
    assert usd == pytest.approx(truth["seconds"] * (0.4 + 20 * DISK_USD_PER_GB_HOUR) / 3600)
    assert api.post(f"/v2/pods/{id}/action", json={"action": "start"}).json()["status"] == "PROVISIONING"
    cloud.until(lambda truth: pod(truth, id)["starts"] == 2)
    api.delete(f"/v2/pods/{id}")
    bill = api.get("/v2/billing/pods", params={"podId": id}).json()
    truth = pod(cloud.truth(), id)
    assert bill["metadata"]["totals"]["totalAmount"] == pytest.approx(truth["usd"])
    assert (bill["metadata"]["recordCount"], bill["metadata"]["uniquePodCount"]) == (1, 1)
    assert bill["records"][0]["podId"] == id
    assert cloud.truth()["usd"] == pytest.approx(truth["usd"])


def test_a_program_that_ends_leaves_a_pod_that_says_no_exit_code(cloud: Standin, api: httpx2.Client) -> None:
    id = created(api, "sh -c 'echo bye; exit 3'")
    cloud.until(lambda truth: pod(truth, id)["status"] == "EXITED")
    shown = api.get(f"/v2/pods/{id}").json()
    assert "bye" in log(cloud, id)
    assert shown["actions"] == ["start", "terminate"]
    assert not [name for name in shown if "exit" in name.lower()]


def test_a_program_that_cannot_start_is_an_exited_pod(cloud: Standin, api: httpx2.Client) -> None:
    missing, broken = created(api, "no-such-program"), created(api, "sh -c 'unbalanced")
    cloud.until(lambda truth: pod(truth, missing)["status"] == "EXITED" and pod(truth, broken)["status"] == "ERROR")
    assert "no-such-program" in log(cloud, missing)


def test_a_pod_has_its_order_and_what_runpod_sets_and_nothing_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ("FT_SECRET", "AWS_SECRET_ACCESS_KEY", "RUNPOD_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_URI")
    for name in ours:
        monkeypatch.setenv(name, "of-the-machine")
    with standin(tmp_path / "cloud", provision=0.02, start=0.02) as cloud, asking(cloud) as api:
        given = {"FT_JOB": "t-1", "RUNPOD_POD_ID": "forged"}
        id = started(cloud, api, "sh -c 'env; echo end'", env=given)
        said = until_said(cloud, id, "\nend\n")
        assert "of-the-machine" not in said
        assert "FT_JOB=t-1\n" in said
        assert f"RUNPOD_POD_ID={id}\n" in said
        assert "RUNPOD_GPU_COUNT=1\n" in said
        assert "RUNPOD_API_KEY=rpa_pod_" in said
        assert f"HOME={tmp_path / 'cloud' / 'pods' / id}\n" in said


def test_a_pod_can_end_itself_with_its_own_key(cloud: Standin, api: httpx2.Client) -> None:
    id = created(api, f"python -c {shlex.quote(ENDS_ITSELF)} {cloud.url}")
    cloud.until(lambda truth: not pod(truth, id)["alive"])
    until_said(cloud, id, "said 204")
    until_gone(id)


def test_an_end_is_told_first_and_reaches_who_left_the_group(cloud: Standin, api: httpx2.Client) -> None:
    id = created(api, "sh -c 'trap \"echo told; sleep 60\" TERM; setsid -f sleep 61; echo up; sleep 60 & wait; wait'")
    until_said(cloud, id, "\nup\n")
    assert len(of_pod(id)) >= 4  # the keeper, the shell, both sleeps
    assert api.delete(f"/v2/pods/{id}").status_code == 204
    until_gone(id)
    assert "\ntold\n" in log(cloud, id)
    assert pod(cloud.truth(), id)["processes"] == []


def test_kill_9_of_the_stand_in_leaves_no_process(cloud: Standin, api: httpx2.Client) -> None:
    ids = [created(api, "sh -c 'setsid -f sleep 61; trap \"\" TERM; sleep 60; sleep 60'") for _ in range(3)]
    cloud.until(lambda truth: all(len(each["processes"]) >= 3 for each in truth["pods"]))
    cloud.process.kill()
    for id in ids:
        until_gone(id, 10)


def test_its_own_end_leaves_no_process(tmp_path: Path) -> None:
    with standin(tmp_path / "cloud", provision=0.02, start=0.02, grace=30) as cloud, asking(cloud) as api:
        id = started(cloud, api, "sh -c 'trap \"\" TERM; sleep 60; sleep 60'")
    assert of_pod(id) == []
    assert cloud.process.returncode == 0


def test_pods_die_hang_restart_and_never_come_as_ordered(cloud: Standin, api: httpx2.Client) -> None:
    def one(name: str, args: str = "sleep 60", **more: Any) -> str:
        cloud.faults({"match": "POST /v2/pods", "fault": name} | more)
        return created(api, args)

    dies, hangs = one("dies", seconds=0.3), one("hangs", seconds=0.1)
    restarts, stuck, breaks = one("restarts", "sh -c 'echo again'"), one("stuck"), one("breaks")
    idle = one("idle")
    cloud.until(lambda truth: pod(truth, dies)["status"] == "EXITED" and pod(truth, restarts)["starts"] >= 3)
    truth = cloud.truth()
    assert pod(truth, dies)["processes"] == []
    assert pod(truth, stuck)["status"] == "PROVISIONING"
    assert (pod(truth, breaks)["status"], pod(truth, breaks)["charged"]) == ("ERROR", True)
    [frozen] = pod(truth, hangs)["processes"]
    assert Path(f"/proc/{frozen}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    for id in (hangs, idle):
        shown = api.get(f"/v2/pods/{id}").json()
        assert (shown["status"], shown["runtime"]["gpus"][0]["util"]) == ("RUNNING", 0)
    for id in (hangs, stuck, restarts):
        api.delete(f"/v2/pods/{id}")
        until_gone(id)


def test_what_nobody_ordered_can_befall_a_pod_as_well(cloud: Standin, api: httpx2.Client) -> None:
    first, second = started(cloud, api), started(cloud, api)
    cloud.fate(first, "die")
    cloud.fate(second, "end")
    cloud.until(lambda truth: pod(truth, first)["status"] == "EXITED" and not pod(truth, second)["alive"])


def test_at_zero_pods_end_and_nothing_more_is_rented(tmp_path: Path) -> None:
    options: dict[str, Any] = {"price_factor": 3600, "provision": 0.02, "start": 0.02, "balance": 1450}
    with standin(tmp_path / "cloud", **options) as cloud, asking(cloud) as api:
        id = started(cloud, api)  # 1440 USD an hour
        assert api.post("/v2/pods", json=BODY | {"gpu": {"id": "NVIDIA H200"}}).status_code == 402
        cloud.account(left=0.5)
        cloud.until(lambda truth: not pod(truth, id)["alive"])
        assert api.post("/v2/pods", json=BODY).status_code == 402
        assert cloud.truth()["balance"] <= 0


def test_a_request_is_closed_and_says_every_violation(api: httpx2.Client) -> None:
    answer = api.post("/v2/pods", json=BODY | {"gpuTypeIds": ["x"], "interruptible": True, "name": ""})
    assert (answer.status_code, answer.headers["Content-Type"].partition(";")[0]) == (422, "application/problem+json")
    said = answer.json()
    assert (said["title"], said["status"], len(said["errors"])) == ("Unprocessable Entity", 422, 3)
    assert api.post("/v2/pods", content=b"{").status_code == 400
    assert api.post("/v2/pods", json={k: v for k, v in BODY.items() if k != "image"}).status_code == 422
    assert api.post("/v2/pods", json=BODY | {"cpu": {"id": "cpu5c"}}).status_code == 400
    assert api.post("/v2/pods", json=BODY | {"gpu": {"id": "NVIDIA RTX 9090"}}).status_code == 400
    assert api.post("/v2/pods", json=BODY | {"dataCenterIds": ["MOON-1"]}).status_code == 400
    assert api.get("/v2/nothing").status_code == 404
    assert api.patch("/v2/pods", json={}).status_code == 405
    assert api.get("/v2/catalog/gpus", params={"include": "AVAILABILITY"}).status_code == 400


def test_actions_depend_on_the_status(cloud: Standin, api: httpx2.Client) -> None:
    id = started(cloud, api)
    assert api.post(f"/v2/pods/{id}/action", json={"action": "start"}).status_code == 409
    assert api.post(f"/v2/pods/{id}/action", json={"action": "fly"}).status_code == 422
    assert api.post(f"/v2/pods/{id}/action", json={"action": "restart"}).status_code == 200
    cloud.until(lambda truth: pod(truth, id)["starts"] == 2)
    assert api.post(f"/v2/pods/{id}/action", json={"action": "terminate"}).status_code == 204
    assert api.post(f"/v2/pods/{id}/action", json={"action": "terminate"}).status_code == 404


def test_a_wrong_clock_is_wrong_everywhere(cloud: Standin, api: httpx2.Client) -> None:
    cloud.faults({"fault": "clock_skew", "seconds": 3600})
    answer = api.post("/v2/pods", json=BODY)
    date = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    assert date == pytest.approx(time.time() + 3600, abs=5)
    assert answer.json()["createdAt"] > time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1800))


def test_the_documented_limit_of_requests_can_be_had(tmp_path: Path) -> None:
    with standin(tmp_path / "cloud", rate_per_minute=3) as cloud, asking(cloud) as api:
        answers = [api.get("/v2/pods") for _ in range(8)]
    assert 429 in [each.status_code for each in answers]
    assert 1 <= int(next(each for each in answers if each.status_code == 429).headers["Retry-After"]) <= 60


def test_the_same_seed_gives_the_same_faults() -> None:
    def fired(seed: int) -> list[list[str]]:
        faults = Faults(seed)
        faults.replace([{"fault": "random", "probability": 0.3}, {"fault": "price", "probability": 0.5, "times": 9}])
        return [[each.name for each in faults.of("POST", "/v2/pods", "NVIDIA A40")] for _ in range(200)]

    assert fired(7) == fired(7)
    assert fired(7) != fired(8)
    assert sum("price" in each for each in fired(7)) == 9
    assert {"reset", "duplicate", "timeout_after"} <= {name for each in fired(7) for name in each}


def test_a_rule_counts_spares_and_chooses(cloud: Standin, api: httpx2.Client) -> None:
    cloud.faults({"match": "GET /v2/pods*", "fault": "error", "status": 503, "after": 1, "times": 2},
                 {"match": "POST /v2/pods", "fault": "no_capacity", "gpu": "*H200"})  # fmt: skip
    assert [api.get("/v2/pods").status_code for _ in range(5)] == [200, 503, 503, 200, 200]
    assert api.post("/v2/pods", json=BODY | {"gpu": {"id": "NVIDIA H200"}}).status_code == 400
    assert api.post("/v2/pods", json=BODY).status_code == 201
    assert [each["fired"] for each in cloud.truth()["faults"]] == [2, 1]
    assert api.put("/_faults", json=[{"fault": "wishful"}]).status_code == 422


def test_jobs_of_an_endpoint_go_to_the_local_server_behind_it(cloud: Standin, api: httpx2.Client) -> None:
    made = api.post("/v2/serverless", json=ENDPOINT).json()
    base = f"/v2/{made['id']}"
    assert made["requestUrls"]["run"] == f"{cloud.url}{base}/run"
    echoed = api.post(f"{base}/runsync", json={"input": {"a": 1}}).json()
    assert (echoed["status"], echoed["output"]) == ("COMPLETED", {"a": 1})
    assert echoed["delayTime"] >= 250  # it was cold
    assert api.post(f"{base}/runsync", json={"input": 2}).json()["delayTime"] < 200
    with upstream() as url:
        cloud.account(upstream=url)
        answer = api.post(f"{base}/openai/v1/chat/completions", json={"model": "m"})
        assert answer.json() == {"path": "/v1/chat/completions", "body": '{"model":"m"}'}
        job = api.post(f"{base}/run", json={"input": {"route": "/v1/models", "method": "POST", "body": {}}}).json()
        assert job["status"] == "IN_QUEUE"
        assert "/v1/models" in str(until_final(api, base, job["id"])["output"])
    streamed = api.get(f"{base}/stream/{job['id']}").json()
    assert (streamed["status"], len(streamed["stream"])) == ("COMPLETED", 1)
    assert api.get(f"{base}/stream/{job['id']}").json()["stream"] == []
    failed = api.post(f"{base}/runsync", json={"input": {"route": "/v1/models"}}).json()
    assert failed["status"] == "FAILED"
    health = api.get(f"{base}/health").json()
    assert (health["jobs"]["completed"], health["jobs"]["failed"], health["workers"]["idle"]) == (3, 1, 1)
    assert api.get(f"{base}/status/nobody").status_code == 404


def test_jobs_that_wait_can_be_cancelled_and_purged(tmp_path: Path) -> None:
    with standin(tmp_path / "cloud", cold_start=30) as cloud, asking(cloud) as api:
        made = api.post("/v2/serverless", json=ENDPOINT).json()
        base = f"/v2/{made['id']}"
        jobs = [api.post(f"{base}/run", json={"input": n}).json()["id"] for n in range(3)]
        assert api.post(f"{base}/cancel/{jobs[0]}").json()["status"] == "CANCELLED"
        assert api.post(f"{base}/purge-queue").json() == {"removed": 2, "status": "completed"}
        assert api.post(f"{base}/run", json={}).status_code == 400
        assert api.delete(f"/v2/serverless/{made['id']}").status_code == 204
        assert api.post(f"{base}/run", json={"input": 1}).status_code == 404


ENDPOINT: dict[str, Any] = {
    "name": "support", "type": "QUEUE", "image": "worker:1", "gpu": {"pools": ["ADA_24"]},
    "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
}  # fmt: skip


def until_final(api: httpx2.Client, base: str, job: str) -> dict[str, Any]:
    end = time.monotonic() + 20
    while (found := api.get(f"{base}/status/{job}").json())["status"] in ("IN_QUEUE", "IN_PROGRESS"):
        assert time.monotonic() < end
        time.sleep(0.05)
    return dict(found)


@contextmanager
def upstream() -> Iterator[str]:
    """Says what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            said = httpx2.Response(200, json={"path": self.path, "body": body}).content
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_who_asks_is_told_apart(cloud: Standin) -> None:
    with httpx2.Client(base_url=cloud.url, trust_env=False) as stranger:
        assert stranger.get("/v2/pods").json() == {
            "title": "Unauthorized", "status": 401, "detail": "missing bearer token",
        }  # fmt: skip
        assert stranger.get("/v2/pods", headers={"Authorization": "Bearer x"}).status_code == 401
    os.kill(cloud.process.pid, signal.SIGTERM)
    assert cloud.process.wait(20) == 0
