"""What is said after `champion` moved: from which version to which, how long the swap took; and MLflow is told."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict

from cli.console import print_json, say
from registry import events
from registry.adapters import Promotion, get_version
from registry.errors import EngineError, TrackerError
from registry.mlflow_mirror import mirror_apart
from registry.project import Project
from registry.rollouts import Rollout
from registry.store import Store
from serving.control import server_status

SWAP_SECONDS = 60.0
LOOK_SECONDS = 0.05
# A training may have the card for hours; nobody waits for that at a prompt.
WITHOUT_CARD = ("waiting for the card", "giving the card to training", "card given to training", "stopping")


def tell_move(project: Project, store: Store, moved: Promotion, *, as_json: bool) -> None:
    """Print what moved, wait for the swap where a server is up, and tell MLflow.

    Raises EngineError if the server does not serve the new champion within a minute, or refuses it.
    """
    if not as_json:
        before = "nothing" if moved.from_version is None else f"version {moved.from_version}"
        say(f"champion of {moved.model}: {before} -> version {moved.version}")
    try:
        swapped, note = _wait_for_swap(store, moved)
        if as_json:
            print_json({**asdict(moved), "served_after": swapped, "note": note})
        else:
            say(note)
    finally:
        tell_mlflow(project, moved.model)  # last: importing mlflow takes longer than the swap


def tell_rollout(store: Store, begun: Rollout, *, as_json: bool) -> None:
    """Print what has begun; nobody waits for its end at a prompt."""
    if as_json:
        print_json(begun.as_dict())
        return
    steps = ", then ".join(f"{each.percent:g}% for {each.for_}" for each in begun.terms.steps)
    say(f"rollout of {begun.name} beside version {begun.from_version}: {steps}")
    say(f"`ft rollout {begun.model}` shows how it goes" if server_status(store) else
        "no server is up, and time counts only while one answers with both; `ft serve up` starts one")  # fmt: skip


def _wait_for_swap(store: Store, moved: Promotion) -> tuple[float | None, str]:
    """Seconds until the server said that it serves the version (None where none can now), and words for people."""
    subject, deadline = f"{moved.model}@{moved.version}", moved.created + SWAP_SECONDS
    base = get_version(store, moved.model, moved.version).body["base"]
    while status := server_status(store):
        engine = status.engine_on(base["digest"])
        if engine is None:
            served = ", ".join(each.base["source"] for each in status.all_engines() if each.base)
            return None, f"the server that is up is for {served}, and {subject} is on {base['source']}"
        if engine.is_off:
            return None, f"engine '{engine.name}' is {engine.state}; it serves {subject} when it is on"
        if engine.state in WITHOUT_CARD:
            return None, f"the server is at '{engine.state}'; it serves {subject} as soon as it is back"
        said = [each for each in events.read(store, subject=subject) if each.time >= moved.created]
        for event in said:
            if event.type == "adapter.served":
                return event.time - moved.created, f"served after {event.time - moved.created:.2f} s"
            if event.type == "adapter.refused":
                raise EngineError(f"the server refused {subject}: {event.data.get('reason', event.data)}",
                                  fix=f"`ft rollback {moved.model}`; `ft serve status` has the numbers")  # fmt: skip
        if time.time() > deadline:
            raise EngineError(f"{subject} is the champion, but is not served after {SWAP_SECONDS:.0f} s",
                              fix="`ft serve status` says what the server does")  # fmt: skip
        time.sleep(LOOK_SECONDS)
    return None, "no server is up; `ft serve up` starts one"


def tell_mlflow(project: Project, model: str) -> None:
    """Let MLflow show what moved or was judged; if it cannot now, say so and leave it for later."""
    try:
        mirror_apart(project, model)
    except TrackerError as error:
        print(f"MLflow was not told yet; the next run, gate or promotion tells it: {error}", file=sys.stderr)
