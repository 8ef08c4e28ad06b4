"""MLflow follows our store: aliases that moved and verdicts that were given since it was told last.

What it does not take now stays for the next time. `python -m registry.mlflow_mirror MODEL` tells it in a process of
its own: importing mlflow takes seconds, and a command must end however long MLflow takes.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from registry import adapters
from registry.alias_requests import mark_refusal_told, untold_refusals
from registry.alias_telling import abandon_telling, begin_telling, end_telling
from registry.errors import FtError, TrackerError, from_dict
from registry.mlflow_store import Tracker, tracker_for
from registry.project import Project, find_project
from registry.recipe import Finetune
from registry.store import Store, open_store

# Once, in CI with more work than cores, `ft rollback` was still in MLflow (or ending) after nine minutes.
PATIENCE_SECONDS = 120.0
CONNECT_SECONDS = 5.0
WAIT_SECONDS = 0.2


def mirror(store: Store, tracker: Tracker, model: str) -> int:
    """Tell MLflow what it does not know yet of the model; how many facts. Raises TrackerError; the rest stays."""
    moved = [alias for name, alias, _ in adapters.unprojected_aliases(store) if name == model]
    told = sum(tell_alias(store, tracker, model, alias) for alias in moved)
    for refusal in untold_refusals(store, model):
        if refusal.version is not None:
            tracker.tag_refused(model, refusal.version, refusal.reason)
        mark_refusal_told(store, refusal)
        told += 1
    judged = adapters.unprojected_verdicts(store, model)
    for verdict in judged:
        tracker.tag_verdict(model, verdict.version, verdict.outcome, verdict.body)
        adapters.mark_verdict_projected(store, verdict.id)
    return told + len(judged)


def tell_alias(store: Store, tracker: Tracker, model: str, alias: str) -> bool:
    """Make MLflow's alias ours, also where we have none; False while somebody else does. Raises TrackerError."""
    telling = begin_telling(store, model, alias)
    if telling is None:
        return False
    try:
        if telling.version is None:
            tracker.delete_alias(model, alias)
        else:
            tracker.set_alias(model, alias, telling.version)
    except BaseException:
        abandon_telling(store, telling)
        raise
    end_telling(store, telling)
    return True


def mirror_apart(project: Project, model: str, patience: float = PATIENCE_SECONDS) -> None:
    """`mirror` in a process of its own, for so many seconds at most. Raises TrackerError."""
    _refuse_if_away(tracker_of(project, open_store(project), model).uri)
    command = [sys.executable, "-m", "registry.mlflow_mirror", model]
    try:
        done = subprocess.run(command, cwd=project.root, capture_output=True, text=True, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        raise TrackerError(f"MLflow: no answer in {patience:.0f} s", fix="`ft doctor` shows which one it is") from None
    if done.returncode:
        raise _what_it_said(done.stdout, done.stderr)


def mirror_model(project: Project, store: Store, model: str) -> int:
    """`mirror` with the MLflow of the model's newest version."""
    return mirror(store, tracker_of(project, store, model), model)


def main() -> None:
    """Tell MLflow of the model that is named; an error goes to standard output, as JSON in the last line."""
    try:
        project, model = find_project(), sys.argv[1]
        _until_told(project, open_store(project), model)
    except FtError as error:
        print(json.dumps(error.as_dict()), flush=True)
        sys.exit(error.exit_code)


def tracker_of(project: Project, store: Store, model: str) -> Tracker:
    """The MLflow of the model's newest version."""
    newest = adapters.versions(store, model)[-1]
    return tracker_for(project, Finetune.model_validate(newest.body["recipe"]))


def _until_told(project: Project, store: Store, model: str) -> None:
    """Whoever started this process ends it. What a worker is telling at this moment is waited for: in CI a rollback's
    command once ended between the worker's two aliases, and MLflow's champion still was the version before it."""
    tracker = tracker_of(project, store, model)
    mirror(store, tracker, model)
    while any(name == model for name, _, _ in adapters.unprojected_aliases(store)):
        time.sleep(WAIT_SECONDS)
        mirror(store, tracker, model)


def _refuse_if_away(uri: str) -> None:
    """Where nobody listens, seconds of importing mlflow only delay the answer. Behind a proxy nothing is known."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise TrackerError(f"MLflow: nobody answers: {error}", place=f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}",
                           fix="start it again (or check MLFLOW_TRACKING_URI)") from error  # fmt: skip


def _what_it_said(out: str, err: str) -> FtError:
    try:
        return from_dict(json.loads(out.strip().splitlines()[-1]))
    except (IndexError, ValueError, AttributeError):
        return TrackerError(f"MLflow: its process failed: {' '.join(err.split())[-300:]}")


if __name__ == "__main__":
    main()
