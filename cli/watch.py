"""Watching a run: a live bar on a terminal, plain lines in a pipe, and what it came to at its end."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from cli.console import print_json, say, table
from jobs.worker_process import ensure_worker, submitting, worker_is_on, worker_log_tail
from registry import runs
from registry.errors import GateClosed, Trouble, from_dict
from registry.job_folder import JobFolder
from registry.project import Project
from registry.store import Store

if TYPE_CHECKING:
    from rich.progress import Progress

LOOK_SECONDS = 0.2
LINE_SECONDS = 10.0
STARTS = 5
LINE_WIDTH = 160


def watch(project: Project, store: Store, run_id: str, *, quiet: bool = False) -> runs.Run:
    """Follow the run to its end, or until it is paused; a worker that died meanwhile is started again."""
    screen: Any = _Quiet() if quiet else _Bar(run_id) if sys.stdout.isatty() else _Lines(run_id)
    keeper = _WorkerKeeper(project)
    try:
        with screen:
            while (run := runs.get(store, run_id)).active:
                screen.show(run, _training(project, run))
                keeper.look(run)
                time.sleep(LOOK_SECONDS)
            screen.show(run, None)
    except KeyboardInterrupt:
        say(
            f"\nno longer watching; the run goes on. `ft logs -f {run_id}` watches again, `ft cancel {run_id}` stops it"
        )
        sys.exit(130)
    return run


def exit_as(run: runs.Run, as_json: bool) -> None:
    """Print what the run came to and leave with its exit code (0, 1, 2 or 3)."""
    from registry.project import find_project
    from registry.store import open_store

    store = open_store(find_project())
    if as_json:
        print_json(outcome(store, run))
    else:
        say(f"\n{run.id}: {_how_it_ended(run)}")
        print_outcome(store, run)
    if run.state == "refused":
        sys.exit(GateClosed.exit_code)
    if run.state == "failed" and run.error:
        error = from_dict(run.error)
        if not as_json:
            print(f"\n{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if run.state in ("cancelled", "paused"):
        sys.exit(1)


def _how_it_ended(run: runs.Run) -> str:
    said = run.result.get("approval", {})
    if run.state == "refused" and said.get("answer") == "rejected":
        return f"{said['by']} did not let it through" + (f": {said['reason']}" if said["reason"] else "")
    if run.state == "refused" and said.get("answer") == "timed_out":
        return f"nobody approved it in time; `ft promote {run.model}@{run.result['version']}` promotes it by hand"
    if run.state == "paused":
        return f"paused at {run.stage or 'its beginning'}; `ft resume {run.id}` lets it go on"
    return {"succeeded": "done", "refused": "the gate did not let it through"}.get(run.state, run.state)


def outcome(store: Store, run: runs.Run) -> dict[str, Any]:
    """The run as JSON."""
    return {
        "run": run.id, "recipe": run.recipe, "model": run.model, "state": run.state, "stage": run.stage,
        "created": run.created, "started": run.started, "finished": run.finished, "error": run.error,
        "result": run.result, "time": where_time_went(store, run),
    }  # fmt: skip


def print_outcome(store: Store, run: runs.Run) -> None:
    """Scores, checks, what moved, and where the time went."""
    result = run.result
    if "scores" in result:
        metrics = sorted({name for each in result["scores"].values() for name in each})
        rows = [[_subject(subject, result), *(f"{each[name]:.3f}" for name in metrics)]
                for subject, each in result["scores"].items()]  # fmt: skip
        table(["", *metrics], rows)
    _print_probes(result)
    for check in result.get("checks", []):
        say(f"  {check['outcome']:9} {check['text']}")
    if escalated := result.get("escalated"):
        from registry.escalation import told  # reads recipes: pydantic would make every `ft show` slower

        say(told(escalated))
    if promoted := result.get("promoted"):
        before = f" (was {promoted['from']})" if promoted["from"] else ""
        say(f"champion of {run.model} is now version {promoted['to']}{before}")
    if result.get("served"):
        say(f'served as {run.model}: `ft ask {run.model} "..."`')
    elif promoted:
        say("no server is up for it: `ft serve up` starts one")
    spent = where_time_went(store, run)
    if spent:
        parts = [f"{kind} {seconds:.1f} s" for kind, seconds in spent.items() if kind != "total"]
        say(f"time: {', '.join(parts)}; {spent['total']:.1f} s in all")


def _print_probes(result: dict[str, Any]) -> None:
    """The recipe's probe questions, with what each subject answered; the whole answers are in `--json`."""
    for question in result.get("probes", {}).get("candidate", {}):
        say(f"\n  {question}")
        for subject, answers in result["probes"].items():
            say(f"    {_subject(subject, result)}: {' '.join(answers.get(question, '').split())[:LINE_WIDTH]}")


def where_time_went(store: Store, run: runs.Run) -> dict[str, float]:
    """Seconds by kind; `platform` is what is left of the total, and so our own."""
    if run.finished is None:
        return {}
    spent: dict[str, float] = {"stopped": run.result["stopped"]} if "stopped" in run.result else {}
    for step in runs.steps(store, run.id):
        for kind, seconds in step.note.get("spent", {}).items():
            spent[kind] = spent.get(kind, 0.0) + seconds
    total = run.finished - run.created
    return {**spent, "platform": max(0.0, total - sum(spent.values())), "total": total}


def _subject(subject: str, result: dict[str, Any]) -> str:
    return f"candidate (version {result['version']})" if subject == "candidate" else subject


def _training(project: Project, run: runs.Run) -> dict[str, Any] | None:
    """The trainer's newest progress line."""
    if not run.stage.startswith("train"):
        return None
    files = JobFolder(project.job_folder(run.id)).progress_files()
    lines = [json.loads(line) for file in files[-2:] for line in file.read_text(encoding="utf-8").splitlines()]
    merged: dict[str, Any] = {}
    for line in lines:
        merged |= line
    return merged or None


class _WorkerKeeper:
    """Starts the worker again if it died, and gives up when that does not help."""

    def __init__(self, project: Project) -> None:
        self.project, self.starts, self.stage = project, 0, ""

    def look(self, run: runs.Run) -> None:
        if run.stage != self.stage:
            self.stage, self.starts = run.stage, 0
        if worker_is_on(self.project):
            return
        if self.starts == STARTS:
            raise Trouble(f"the worker ended {STARTS} times before it did anything",
                          place=str(self.project.logs / "worker.log"), fix=worker_log_tail(self.project))  # fmt: skip
        with submitting(self.project):
            self.starts += ensure_worker(self.project)


class _Quiet:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, run: runs.Run, training: dict[str, Any] | None) -> None: ...


class _Lines(_Quiet):
    """For a pipe or a CI log: a line when the stage changes, and one every few seconds of training."""

    def __init__(self, run_id: str) -> None:
        self.last, self.when, self.began = "", 0.0, time.monotonic()
        say(run_id)

    def show(self, run: runs.Run, training: dict[str, Any] | None) -> None:
        text, now = describe(run, training), time.monotonic()
        stage = run.stage.partition(" ")[0] if run.stage.startswith("evaluate") else run.stage
        if stage != self.last or (now - self.when > LINE_SECONDS and run.active):
            self.last, self.when = stage, now
            say(f"[{now - self.began:6.1f} s] {text}")


class _Bar(_Quiet):
    """For a terminal: one live line with a bar."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.progress: Progress | None = None

    def __enter__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns)
        self.task = self.progress.add_task(self.run_id, total=None, facts="")
        self.progress.start()

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def show(self, run: runs.Run, training: dict[str, Any] | None) -> None:
        if not self.progress:
            return
        done, total = _fraction(run, training)
        facts = describe(run, training)
        self.progress.update(self.task, description=run.id, completed=done, total=total, facts=facts)


def describe(run: runs.Run, training: dict[str, Any] | None) -> str:
    """One line: the stage, and of training step, loss, rate and eta."""
    if run.stage == "train" and not training:
        return "train: loading the base model"
    if not training or "step" not in training:
        if run.state == "paused":
            return f"paused at {run.stage}" if run.stage else "paused"
        return run.stage if run.active and run.stage else run.state
    if training.get("stage") == "smoke" and "step" not in training:
        return "train: trying the longest rows first"
    if training.get("stage") == "fingerprint":
        return "train: recording a fingerprint for the parity probe"
    parts = [f"train {training['step']}/{training['steps']}"]
    for name, form in (
        ("loss", "loss {:.3f}"),
        ("tokens_per_second", "{:.0f} tokens/s"),
        ("eta", "eta {:.0f} s"),
    ):
        if name in training:
            parts.append(form.format(training[name]))
    return "  ".join(parts)


def _fraction(run: runs.Run, training: dict[str, Any] | None) -> tuple[float | None, float | None]:
    if training and "step" in training:
        return training["step"], training["steps"]
    if run.stage.startswith("evaluate ") and "/" in run.stage:
        done, _, total = run.stage.removeprefix("evaluate ").partition("/")
        return float(done), float(total)
    return None, None
