"""The published list of event types, each with a JSON schema of its data. docs/events.md is made from it.

Types that begin with `external.` are anybody's: their data is any JSON object.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from typing import Any

from registry.errors import WrongInput
from registry.events import Event

EXTERNAL = "external."
MAX_TEXT = 256
TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
OPTIONAL_WHOLE, OPTIONAL_TEXT = {"type": ["integer", "null"]}, {"type": ["string", "null"]}
FAILURE = {"error": TEXT, "what": TEXT, "place": TEXT, "fix": TEXT}


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
    "run.submitted": EventType("a run was asked for", "run", {"recipe": TEXT}),
    "run.finished": EventType("a run came to its end; `refused`: the gate said no", "run", {"state": TEXT}),
    "run.failed": EventType("a run failed; `ft resume` lets it go on", "run", {"state": TEXT}, FAILURE),
    "run.cancelled": EventType("a run was cancelled, and its card is free", "run", {"state": TEXT}, FAILURE),
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
    "adapter.refused": EventType(
        "the server would not serve the version", "model@N", {"reason": TEXT},
        {"place": TEXT, "parity": {"type": "object"}},
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
    from jsonschema import Draft202012Validator

    wrong = [
        f"data{_at(error)}: {error.message}" for error in Draft202012Validator(found.schema()).iter_errors(event.data)
    ]
    if wrong:
        raise WrongInput("\n".join(wrong), place=event.type, fix="`ft events types` says what belongs into it")


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
