"""The published list of event types, each with a JSON schema of its data. docs/events.md is made from it.

Types that begin with `external.` are anybody's: their data is any JSON object.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from registry.errors import WrongInput
from registry.events import Event

EXTERNAL = "external."
MAX_TEXT = 256
TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
OPTIONAL_WHOLE, OPTIONAL_TEXT = {"type": ["integer", "null"]}, {"type": ["string", "null"]}
FAILURE = {"error": TEXT, "what": TEXT, "place": TEXT, "fix": TEXT}

OBJECTIVE = {
    "objective": TEXT, "value": {"type": ["number", "null"]}, "limit": NUMBER, "window": NUMBER, "requests": WHOLE,
}  # fmt: skip
ANSWER = {"version": TEXT, "verdict": WHOLE, "by": TEXT, "reason": TEXT}


@dataclass(frozen=True)
class EventType:
    """What it means, what its subject is, and the properties of its data; those in `may` can be missing."""

    means: str
    subject: str
    must: dict[str, Any] = field(default_factory=dict)
    may: dict[str, Any] = field(default_factory=dict)
    outside: bool = False

    def schema(self) -> dict[str, Any]:
        """JSON schema (draft 2020-12) of `data`."""
        return {
            "type": "object", "properties": {**self.must, **self.may}, "required": list(self.must),
            "additionalProperties": False,
        }  # fmt: skip


TYPES: dict[str, EventType] = {
    "dataset.versioned": EventType(
        "DVC's records name another version of a dataset", "path", {"hash": TEXT},
        {"rows": {"type": "object"}, "branch": TEXT}, outside=True,
    ),
    "recipe.changed": EventType(
        "a recipe's meaning has changed", "recipe", {"digest": TEXT}, {"branch": TEXT}, outside=True
    ),
    "schedule.fired": EventType("a cron line of a recipe has come due", "recipe", {"cron": TEXT, "due": NUMBER}),
    "feedback.received": EventType(
        "somebody judged an answer", "model@N", {},
        {"rating": NUMBER, "correction": TEXT, "tags": {"type": "array", "items": TEXT}, "request": TEXT}, outside=True,
    ),
    "webhook.refused": EventType(
        "the receiver refused something; `count`: so often since the last of these", "github, mlflow or events",
        {"reason": TEXT, "count": WHOLE}, {"delivery": TEXT, "client": TEXT},
    ),
    "run.submitted": EventType("a run was asked for", "run", {"recipe": TEXT}),
    "run.started": EventType("a worker has begun with a run", "run", {"recipe": TEXT}),
    "run.step": EventType("a step of a run is done", "run", {"step": TEXT, "attempt": WHOLE, "seconds": NUMBER}),
    "run.finished": EventType("a run came to its end; `refused`: the gate said no", "run", {"state": TEXT}),
    "run.failed": EventType("a run failed; `ft resume` lets it go on", "run", {"state": TEXT}, FAILURE),
    "run.cancelled": EventType("a run was cancelled, and its card is free", "run", {"state": TEXT}, FAILURE),
    "run.paused": EventType("a run stands still after a checkpoint, and its card is free", "run", {"stage": TEXT}),
    "run.resumed": EventType("a run that stood still goes on", "run", {"from": TEXT}),
    "run.approval_wanted": EventType(
        "a person is asked whether a version may be promoted", "run",
        {"version": TEXT, "verdict": WHOLE, "deadline": NUMBER},
    ),
    "run.approved": EventType("a person said yes", "run", ANSWER, {"to": TEXT}),
    "run.rejected": EventType("a person said no", "run", ANSWER, {"to": TEXT}),
    "run.approval_timed_out": EventType("nobody answered in time, which counts as no", "run", ANSWER, {"to": TEXT}),
    "job.started": EventType("a trainer is at work on a run's job", "run", {"card": TEXT, "epoch": WHOLE}),
    "job.finished": EventType(
        "a trainer has left a result that counts", "run", {"epoch": WHOLE},
        {"steps": WHOLE, "seconds": NUMBER, "peak_memory": WHOLE},
    ),
    "job.stopped": EventType(
        "a trainer has saved a checkpoint and stopped, as it was asked to", "run", {"epoch": WHOLE, "reason": TEXT},
        {"steps": WHOLE},
    ),
    "job.failed": EventType(
        "a trainer has failed; `class` says how", "run", {"epoch": WHOLE, "class": TEXT, "message": TEXT}
    ),
    "job.lost": EventType("a trainer is gone, and has left no result", "run", {"epoch": WHOLE}),
    "job.retried": EventType(
        "a job is tried again by itself; `after` is the trainer before, `train` what was changed", "run",
        {"after": WHOLE, "class": TEXT, "train": {"type": "object"}, "anew": {"type": "boolean"}},
    ),
    "pod.created": EventType(
        "a pod was rented (`adopted`: found, because the answer to its creation was lost)", "run",
        {"pod": TEXT, "name": TEXT, "gpu": TEXT, "usd_per_hour": NUMBER, "reserved_usd": NUMBER},
        {"adopted": {"type": "boolean"}},
    ),
    "pod.ended": EventType(
        "a rented pod is gone", "run", {"name": TEXT, "reason": TEXT}, {"pod": TEXT, "seconds": NUMBER, "usd": NUMBER}
    ),
    "pod.reaped": EventType(
        "a pod of this installation that no job wanted was ended", "pod name", {"pod": TEXT, "reason": TEXT}
    ),
    "pod.stuck": EventType(
        "RunPod does not end a pod, and its bill grows; tried again for ever", "pod name",
        {"pod": TEXT, "reason": TEXT, "attempts": WHOLE},
    ),
    "budget.warned": EventType(
        "so much of a budget is spent or reserved", "run, day or month",
        {"percent": WHOLE, "usd": NUMBER, "cap_usd": NUMBER, "period": TEXT},
    ),
    "budget.refused": EventType(
        "a run would have gone beyond a budget, and nothing was rented or asked", "run",
        {"scope": TEXT, "usd": NUMBER, "cap_usd": NUMBER, "wanted_usd": NUMBER},
    ),
    "run.escalated": EventType(
        "a version was not good enough, and another recipe was started", "run",
        {"to": TEXT, "run": TEXT, "score": NUMBER, "limit": NUMBER, "max_usd": NUMBER},
    ),
    "run.escalation_wanted": EventType(
        "a person is asked whether another recipe may be started", "run",
        {"to": TEXT, "score": NUMBER, "limit": NUMBER, "max_usd": NUMBER, "deadline": NUMBER},
    ),
    "run.tracker_away": EventType("MLflow did not answer; training goes on", "run", {}, FAILURE),
    "host.lost": EventType(
        "a host's worker was heard no more; its runs were handed on", "host", {"runs": {"type": "array", "items": TEXT}}
    ),
    "card.paused": EventType("nobody begins on the card", "host/card", {"by": TEXT}),
    "card.resumed": EventType("the card takes work again", "host/card", {"by": TEXT}),
    "adapter.registered": EventType("a version is there, not judged yet", "model@N", {"run": TEXT}),
    "adapter.judged": EventType("a gate gave a verdict", "model@N", {"outcome": TEXT, "verdict": WHOLE}),
    "adapter.promoted": EventType(
        "`champion` moved on", "model@N", {"from": OPTIONAL_WHOLE, "by": TEXT, "reason": TEXT, "run": OPTIONAL_TEXT}
    ),
    "adapter.rolled_back": EventType(
        "`champion` moved back", "model@N", {"from": OPTIONAL_WHOLE, "by": TEXT, "reason": TEXT, "run": OPTIONAL_TEXT}
    ),
    "adapter.served": EventType(
        "the gateway's public name leads to the version", "model@N", {"at": NUMBER},
        {"version": TEXT, "from": OPTIONAL_TEXT, "route": TEXT, "seconds": {"type": "object"},
         "parity": {"type": "object"}, "since_promotion": NUMBER},
    ),
    "serving.objective_broken": EventType("a route no longer keeps what its objective promises", "route", OBJECTIVE),
    "serving.objective_met": EventType(
        "a route keeps a broken objective again (`value`: null where nobody asked any more)", "route", OBJECTIVE
    ),
    "rollout.started": EventType(
        "a version answers a part of the callers, beside the champion", "model@N",
        {"from": WHOLE, "percent": NUMBER, "steps": WHOLE, "by": TEXT},
    ),
    "rollout.advanced": EventType(
        "a step has held, and the next has begun", "model@N", {"percent": NUMBER, "by": TEXT, "reason": TEXT}
    ),
    "rollout.held": EventType(
        "a step's time is over, and it cannot go on yet", "model@N", {"percent": NUMBER, "reason": TEXT}
    ),
    "rollout.rolled_back": EventType(
        "the version was worse, and the champion answers everybody again", "model@N",
        {"percent": NUMBER, "reason": TEXT, "numbers": {"type": "object"}},
    ),
    "rollout.finished": EventType(
        "the last step has held; `champion` moves", "model@N", {"from": WHOLE, "by": TEXT, "reason": TEXT}
    ),
    "rollout.cancelled": EventType(
        "somebody ended it; the champion answers everybody again", "model@N", {"by": TEXT, "reason": TEXT}
    ),
    "store.pruned": EventType(
        "what had had its time was deleted", "none", {"by": TEXT, "bytes": WHOLE, "counts": {"type": "object"}}
    ),
    "adapter.refused": EventType(
        "the server would not serve the version", "model@N", {"reason": TEXT},
        {"place": TEXT, "parity": {"type": "object"}},
    ),
    "alias.requested": EventType(
        "somebody moved an alias in MLflow (`to`: null where it was deleted)", "model@N",
        {"alias": TEXT, "from": OPTIONAL_WHOLE, "to": OPTIONAL_WHOLE},
    ),
    "alias.refused": EventType(
        "a move in MLflow was refused, and MLflow's alias is put back", "model@N",
        {"alias": TEXT, "reason": TEXT, "champion": OPTIONAL_WHOLE},
    ),
    "sink.gave_up": EventType(
        "a sink did not take an event; said once until it takes one again", "sink",
        {"event": TEXT, "type": TEXT, "reason": TEXT, "attempts": WHOLE},
    ),
}  # fmt: skip


def check_event(event: Event) -> None:
    """Raises WrongInput for an unknown type, a type that only ft itself may append, and data that do not fit."""
    for name in ("type", "subject", "id"):
        _check_text(name, getattr(event, name))
    if event.type.startswith(EXTERNAL) and len(event.type) > len(EXTERNAL):
        return
    found = TYPES.get(event.type)
    if found is None or not found.outside:
        raise WrongInput(_why_not(event.type), place=event.type, fix=_nearest(event.type))
    wrong = [f"data{_at(error)}: {error.message}" for error in _validator(event.type).iter_errors(event.data)]
    if wrong:
        raise WrongInput("\n".join(wrong), place=event.type, fix="`ft events types` says what belongs into it")


@cache
def _validator(type_: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(TYPES[type_].schema())


def _check_text(name: str, text: str) -> None:
    if len(text) > MAX_TEXT or not text.isprintable():
        raise WrongInput(f"{name} is at most {MAX_TEXT} printable characters on one line", place=ascii(text[:40]),
                         fix="what is longer belongs into the data")  # fmt: skip


def as_markdown() -> str:
    """docs/events.md."""
    lines = [
        "# Events", "",
        "Every line of the log has the attributes of CloudEvents 1.0 and, as `ftcause`, the event that led to it.",
        "Made by `make docs` from `registry/event_types.py`. Types marked with * may also be posted from outside, and",
        "so may any type that begins with `external.`.", "",
        "| type | means | subject | data |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, each in TYPES.items():
        data = ", ".join([f"`{key}`" for key in each.must] + [f"`{key}`?" for key in each.may])
        lines.append(f"| `{name}`{'*' if each.outside else ''} | {each.means} | {each.subject} | {data} |")
    schemas = {name: each.schema() for name, each in TYPES.items()}
    lines += ["", "## JSON schemas of data", "", "```json", json.dumps(schemas, indent=1), "```"]
    return "\n".join(lines) + "\n"


def _why_not(type_: str) -> str:
    return "only ft itself appends events of this type" if type_ in TYPES else "no such type of event"


def _nearest(type_: str) -> str:
    outside = [name for name, each in TYPES.items() if each.outside]
    near = difflib.get_close_matches(type_, outside, n=1)
    return f"did you mean {near[0]}?" if near else f"there is: {', '.join(outside)} and {EXTERNAL}ANYTHING"


def _at(error: Any) -> str:
    return "".join(f".{part}" for part in error.absolute_path)


if __name__ == "__main__":
    print(as_markdown(), end="")
