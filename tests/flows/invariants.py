"""What must hold after a run, however often its processes were killed: read from the stores, MLflow and the gateway."""

from __future__ import annotations

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from registry import adapters, runs
from registry.decisions import CURSOR, decisions_on
from registry.events import Event, cursor, read
from registry.job_folder import JobFolder
from registry.manifest import broken_files, manifest_digest
from serving.control import server_status
from tests.flows.swept_project import MODEL, Swept

SETTLE_SECONDS = 90.0


def violations(swept: Swept, event: Event, run_id: str) -> list[str]:
    """Empty if all holds. Waits for what comes after a run by itself: MLflow's aliases, the server's routes."""
    run = runs.get(swept.store, run_id)
    if run.state != "succeeded":
        return [f"the run is {run.state} at {run.stage}: {run.error}"]
    version = int(run.result["version"])
    waits = {"MLflow is not told": lambda: not _untold(swept), "not served": lambda: _is_served(swept, version),
             "events not decided": lambda: _is_decided(swept),
             "its workflows are on": lambda: not any(each.startswith(run_id) for each in _still_on(swept))}  # fmt: skip
    late = [what for what, over in waits.items() if not _within(SETTLE_SECONDS, over, swept.keep_up)]
    checks = (_one_run, _one_result, _one_version, _one_move, _served_once, _all_events, _nothing_left)
    return [*late, *(wrong for check in checks for wrong in check(swept, event, run_id, version))]


def _one_run(swept: Swept, event: Event, run_id: str, version: int) -> Iterator[str]:
    found = [(each.fired, each.run_id) for each in decisions_on(swept.store, event)]
    if found != [(True, run_id)]:
        yield f"decisions on the event: {found}"
    caused = swept.store.read("SELECT subject FROM events WHERE type = 'run.submitted' AND cause = ?", (event.ref,))
    if [row["subject"] for row in caused] != [run_id]:
        yield f"runs of the event: {caused}"


def _one_result(swept: Swept, event: Event, run_id: str, version: int) -> Iterator[str]:
    job = JobFolder(swept.project.job_folder(run_id))
    held, text = job.lease(), (job.path / "result.json").read_bytes()
    if held is None or held.lease.result != hashlib.sha256(text).hexdigest() or json.loads(text)["status"] != "ok":
        yield f"no accepted result: lease {held}, result {text[:200]!r}"
    folder = swept.project.adapter_folder(MODEL, version)
    if broken_files(folder) or manifest_digest(folder) != manifest_digest(job.adapter):
        yield f"the version's folder is not the accepted adapter: {broken_files(folder)}"
    steps = [line["step"] for line in job.progress() if "step" in line]
    if max(steps, default=0) != 4:
        yield f"training steps: {steps}"


def _one_version(swept: Swept, event: Event, run_id: str, version: int) -> Iterator[str]:
    rows = swept.store.read("SELECT version FROM versions WHERE run_id = ?", (run_id,))
    if [row["version"] for row in rows] != [version]:
        yield f"versions of the run: {rows}"
    ours = {each.version: each.run_id for each in adapters.versions(swept.store, MODEL)}
    theirs = [(int(each.version), each.tags.get("ft.run")) for each in _mlflow(swept).search_model_versions("")]
    if sorted(theirs) != sorted(ours.items()):
        yield f"MLflow's versions: {sorted(theirs)}, ours: {sorted(ours.items())}"
    run = _mlflow(swept).get_run(adapters.get_version(swept.store, MODEL, version).body["mlflow"]["run_id"])
    if run.info.status != "FINISHED":
        yield f"MLflow's run is {run.info.status}"


def _one_move(swept: Swept, event: Event, run_id: str, version: int) -> Iterator[str]:
    moves = adapters.promotions(swept.store, MODEL)
    own = [(each.kind, each.version) for each in moves if each.run_id == run_id]
    if own != [("promote", version)]:
        yield f"moves of the run: {own}"
    chain = [(each.from_version, each.version) for each in moves]
    if any(before[1] != after[0] for before, after in pairwise(chain)):
        yield f"moves do not join: {chain}"
    champion = moves[-1].version
    aliases, theirs = adapters.aliases(swept.store, MODEL), _mlflow(swept).get_model_version_by_alias(MODEL, "champion")
    if (aliases["champion"], int(theirs.version)) != (champion, champion):
        yield f"champion is {aliases['champion']} here, {theirs.version} in MLflow, {champion} by the last move"


def _served_once(swept: Swept, event: Event, run_id: str, version: int) -> Iterator[str]:
    told = read(swept.store, type_="adapter.served", subject=f"{MODEL}@{version}")
    if len(told) != 1:
        yield f"adapter.served {len(told)} times"
    refused = read(swept.store, type_="adapter.refused", subject=f"{MODEL}@{version}")
    if refused:
        yield f"refused: {refused[0].data}"


def _all_events(swept: Swept, event: Event, run_id: str, version: int) -> Iterator[str]:
    """Each change has its event, once."""
    name = f"{MODEL}@{version}"
    verdicts = swept.store.read("SELECT id FROM verdicts WHERE run_id = ?", (run_id,))
    once = {("run.submitted", run_id): 1, ("run.finished", run_id): 1, ("adapter.registered", name): 1,
            ("adapter.judged", name): len(verdicts), ("adapter.promoted", name): 1}  # fmt: skip
    for (type_, subject), wanted in once.items():
        found = len(read(swept.store, type_=type_, subject=subject))
        if found != wanted:
            yield f"{type_} {found} times, not {wanted}"
    if len(verdicts) != 1:
        yield f"{len(verdicts)} verdicts of one judgement"
    twice = swept.store.read("SELECT source, id FROM events GROUP BY source, id HAVING count(*) > 1")
    if twice:
        yield f"events twice: {twice}"


def _nothing_left(swept: Swept, event: Event, run_id: str, version: int) -> Iterator[str]:
    on = _still_on(swept)
    if on and not runs.listed(swept.store, active=True):
        yield f"workflows that are still on: {on}"
    own = [each.status for each in _workflows(swept) if each.workflow_id == run_id]
    if own != ["SUCCESS"]:
        yield f"the workflow is {own}"
    if trainers := swept.processes(f"jobs/{run_id}"):
        yield f"its trainer still lives: {trainers}"


def _still_on(swept: Swept) -> dict[str, str]:
    return {each.workflow_id: each.status for each in _workflows(swept) if each.status in ("PENDING", "ENQUEUED")}


def _workflows(swept: Swept) -> list[Any]:
    from dbos import DBOSClient, DBOSPortableJSONSerializer

    url = swept.parts.database_url or f"sqlite:///{swept.project.runs_database}"
    client = DBOSClient(system_database_url=url, serializer=DBOSPortableJSONSerializer())
    try:
        return client.list_workflows(load_input=False, load_output=False)
    finally:
        client.destroy()


def _untold(swept: Swept) -> list[Any]:
    return [*adapters.unprojected_aliases(swept.store), *adapters.unprojected_verdicts(swept.store)]


def _is_served(swept: Swept, version: int) -> bool:
    """By the gateway's own word: a request for the model is answered by the champion."""
    champion = adapters.aliases(swept.store, MODEL)["champion"]
    status = server_status(swept.store)
    if status is None or status.state != "serving" or status.routes.get(MODEL) != f"{MODEL}@{champion}":
        return False
    told = read(swept.store, type_="adapter.served", subject=f"{MODEL}@{version}")
    return bool(told) and _who_answers(status.gateway_url) == f"{MODEL}@{champion}"


def _who_answers(gateway: str) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Which queue?"}], "max_tokens": 1}
    request = urllib.request.Request(
        f"{gateway}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.headers["x-ft-adapter"])
    except (urllib.error.URLError, OSError):
        return ""


def _is_decided(swept: Swept) -> bool:
    events = read(swept.store, after=cursor(swept.store, CURSOR))
    return not events


def _mlflow(swept: Swept) -> Any:
    from mlflow import MlflowClient

    uri = f"sqlite:///{Path(swept.project.home)}/mlflow.db"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _within(seconds: float, over: Callable[[], bool], meanwhile: Callable[[], None]) -> bool:
    deadline = time.monotonic() + seconds
    while not over():
        if time.monotonic() > deadline:
            return False
        meanwhile()
        time.sleep(0.1)
    return True
