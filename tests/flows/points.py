"""The points at which the sweep kills: every step of a run from its event to its end, before, inside and after.

A point is a call of a function of ours (or of DBOS), or its return: `call` of what writes somewhere is the moment
before the outside call, `return` of it the one after. `where` are values that its arguments must have.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Role = Literal["worker", "trainer", "server", "engine"]
When = Literal["call", "return"]


@dataclass(frozen=True)
class Point:
    """`role` is the process in which it lies, `victim` the one that is killed there (the same, or its engine).

    `count`: at so manieth time. `news` is what starts the run.
    """

    name: str
    role: Role
    place: str  # module:qualified name
    when: When
    count: int = 1
    where: dict[str, str] = field(default_factory=dict)
    victim: Literal["self", "engine"] = "self"
    news: Literal["event", "dataset"] = "event"

    @property
    def module(self) -> str:
        return self.place.partition(":")[0]

    @property
    def function(self) -> str:
        return self.place.partition(":")[2]

    @property
    def killed(self) -> str:
        return "engine" if self.victim == "engine" else self.role

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


STEPS = (
    "take turn",
    "pin",
    "plan",
    "train",
    "register",
    "evaluate",
    "judge",
    "promote",
    "wait until served",
    "conclude",
)


def _boundaries(step: str) -> list[Point]:
    """Of any step: not begun; begun, nothing done; done, not written down; written down by us, not by DBOS."""
    where, runs = {"name": step}, "registry.runs"
    return [
        Point(f"{step}: before it begins", "worker", f"{runs}:begin_step", "call", where=where),
        Point(f"{step}: begun", "worker", f"{runs}:begin_step", "return", where=where),
        Point(f"{step}: done, before it is written down", "worker", f"{runs}:end_step", "call", where=where),
        Point(f"{step}: before the engine of runs commits it", "worker", f"{runs}:end_step", "return", where=where),
    ]


def _around(step: str, place: str, role: Role = "worker", count: int = 1, **more: Any) -> list[Point]:
    what = place.rpartition(":")[2].rpartition(".")[2].strip("_")
    name = f"{step}: {{}} {what}" + (f" ({role})" if role != "worker" else "")
    return [
        Point(name.format("before"), role, place, "call", count, **more),
        Point(name.format("after"), role, place, "return", count, **more),
    ]


def _inside(step: str, place: str, what: str, **more: Any) -> Point:
    """Inside a transaction: written, not committed."""
    return Point(f"{step}: before the commit of {what}", "worker", place, "return", **more)


_TRACKER, _JOB, _DBOS = "registry.mlflow_store:Tracker", "registry.job_folder:JobFolder", "dbos._sys_db:SystemDatabase"

POINTS: list[Point] = [
    # From the event to the run.
    *_around("event", "registry.seen:note_value", news="dataset"),
    _inside("event", "registry.seen:_note_within", "dataset.versioned", news="dataset"),
    *_around("decide", "registry.decisions:settle"),
    _inside("decide", "registry.decisions:_write", "the decision"),
    _inside("decide", "registry.runs:submit_within", "the run's row"),
    *_around("submit", "jobs.finetune:begin"),
    # The steps' boundaries.
    *(point for step in STEPS for point in _boundaries(step)),
    # Inside the steps: around what each does outside.
    *_around("pin", "registry.dataset_versions:pin"),
    *_around("plan", "jobs.fetch_base:fetch_base"),
    *_around("plan", f"{_JOB}.write_spec"),
    *_around("plan", "registry.dataset_versions:materialise"),
    *_around("train", "jobs.targets.local_card:LocalCard._start"),
    Point("train: while the trainer trains", "worker", "jobs.targets.local_card:LocalCard.poll", "call", 8),
    *_around("train", f"{_TRACKER}.begin"),
    *_around("register", "registry.admission:admit"),
    *_around("register", f"{_TRACKER}.register"),
    *_around("register", "registry.mlflow_store:Tracker._logged_model"),
    *_around("register", "jobs.targets.local_card:LocalCard.fetch"),
    *_around("register", "registry.adapters:add_version"),
    _inside("register", "registry.adapters:_set_alias", "the version", where={"alias": "candidate"}),
    *_around("evaluate", "serving.engine:Engine.load"),
    *_around("evaluate", "serving.engine:Engine.chat", count=2),
    *_around("evaluate", "registry.scores:keep_score"),
    *_around("evaluate", "serving.engine:Engine.unload"),
    *_around("judge", "registry.adapters:add_verdict"),
    _inside("judge", "registry.events:append_within", "the verdict", where={"event.type": "adapter.judged"}),
    *_around("promote", "registry.adapters:promote"),
    _inside("promote", "registry.adapters:_move", "the move"),
    *_around("wait until served", "jobs.served:what_server_said"),
    *_around("conclude", f"{_TRACKER}.log_scores"),
    *_around("conclude", f"{_TRACKER}.set_alias"),
    *_around("conclude", f"{_TRACKER}.tag_verdict"),
    *_around("conclude", f"{_TRACKER}.end"),
    *_around("conclude", "registry.runs:finish"),
    _inside("conclude", "registry.events:append_within", "the end", where={"event.type": "run.finished"}),
    *_around("the engine of runs", f"{_DBOS}.update_workflow_outcome", count=3),
    # The trainer.
    *_around("train", f"{_JOB}.claim", "trainer"),
    *_around("train", f"{_JOB}.add_progress", "trainer"),
    Point("train: a checkpoint without its manifest (trainer)", "trainer", "registry.manifest:write_manifest", "call",
          2),
    Point("train: a checkpoint written (trainer)", "trainer", f"{_JOB}.prune_checkpoints", "call", 2),
    Point("train: the adapter without its manifest (trainer)", "trainer", "registry.manifest:write_manifest", "call",
          5),
    *_around("train", "jobs.trainer:_finish_adapter", "trainer"),
    *_around("train", f"{_JOB}.accept", "trainer"),
    Point("train: the lease names a result that is not there (trainer)", "trainer", f"{_JOB}._swap", "return", 2),
    # The server and its engine: while it is asked for an evaluation, loads, probes, flips, tells.
    Point("train: as the server gives its card away (server)", "server", "serving.own_engine:OwnEngine._give_way",
          "call"),
    *_around("evaluate", "serving.vllm_process:start_vllm", "server"),
    Point("evaluate: its engine dies (engine)", "engine", "tests.fakes.vllm_door:Door.chat", "call", 4),
    *_around("wait until served", "serving.engine:Engine.load", "server"),
    *_around("wait until served", "serving.parity:probe", "server"),
    *_around("wait until served", "serving.routes:Board.put", "server", 5),
    *_around("wait until served", "serving.reconciler:Reconciler._append_served", "server"),
    Point("wait until served: the engine dies in load (engine)", "server", "serving.engine:Engine.load", "call",
          victim="engine"),
    Point("wait until served: the engine dies in the probe (engine)", "server", "serving.parity:probe", "call",
          victim="engine"),
    Point("wait until served: the engine dies at the flip (engine)", "server",
          "serving.reconciler:Reconciler._append_served", "call", victim="engine"),
]  # fmt: skip

# Where the card is that of a host with another folder. The sweep has one host, so these are killed at in
# tests/flows/test_lent_cards.py, on the host that leads or on the one that lends its card.
_BUCKET = "registry.job_bucket:JobBucket"
LENT: list[Point] = [
    *_around("plan", f"{_BUCKET}.push"),
    *_around("train", f"{_BUCKET}.fetch_job"),
    *_around("train", "jobs.job_base:base_here"),
    *_around("train", "jobs.targets.bucket_card:BucketCard._begin_mirror"),
    *_around("train", f"{_BUCKET}.send_part", count=2),
    *_around("train", f"{_BUCKET}.send_checkpoint"),
    *_around("register", "jobs.through_bucket:bring_adapter"),
    *_boundaries("share"),
    *_around("share", "registry.whole_folders:share_folder", where={"kind": "adapters"}),
    *_around("evaluate", "jobs.through_bucket:bring_for_evaluation"),
]
ON_LENT_CARD = ("train", "evaluate")
# Of a run that is evaluated in a pod, in their order: tests/flows/test_evaluation_in_pod.py kills one worker after the
# other at them. `make sweep-kill` has no cloud.
IN_POD: list[Point] = [
    *_around("evaluate in a pod", "jobs.evaluation_job:write_evaluation"),
    *_around("evaluate in a pod", "registry.job_bucket:JobBucket.push"),
    *_around("evaluate in a pod", "registry.ledger:intend"),
    *_around("evaluate in a pod", "registry.runpod_api:RunPod.create"),
    Point("evaluate in a pod: while it is asked", "worker", "jobs.targets.runpod_pod:RunPodPod.poll", "call", 8),
    *_around("evaluate in a pod", "registry.scores:keep_score"),
]
