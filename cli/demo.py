"""`make demo`: the whole loop, told with the real commands in a project of its own.

Run a recipe, serve its adapter, ask it; change the data set, run again, and watch the swap under a stream of
requests; go back in one command. Last, a table of what happened and how long each part took.
"""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import aiohttp

from cli.console import say, table
from registry.events import read
from registry.project import find_project
from registry.runs import Run, get
from registry.store import open_store

MODEL, RECIPE = "tickets", "recipes/tickets.yaml"
QUESTION = "The tracking page has not moved for six days, where is my parcel?"
AT_ONCE, STREAMS, REQUESTS, AFTER_FLIP = 8, 2, 300, 60
SWAP_SECONDS = 600.0


@dataclass
class Story:
    """What happened: a row a part, with its seconds."""

    project: Path
    rows: list[list[str]] = field(default_factory=list)

    def part(self, title: str, *command: str, exits: int = 0) -> str:
        """Run one command in the project, showing its output; what it printed."""
        say(f"\n\033[1m$ {' '.join(command)}\033[0m   # {title}")
        started = time.monotonic()
        output = _run(self.project, command, exits)
        self.note(title, time.monotonic() - started)
        return output

    def note(self, title: str, seconds: float, fact: str = "") -> None:
        self.rows.append([title, f"{seconds:.1f} s", fact])


@dataclass
class Traffic:
    """Replies counted by the version that made them. `wrong`: header and body disagree on it."""

    versions: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    # When each stream of version 1 was open (Unix times), and when the route was flipped.
    streams: list[tuple[float, float]] = field(default_factory=list)
    flipped: float = 0.0

    @property
    def across(self) -> int:
        return sum(began < self.flipped < ended for began, ended in self.streams)

    @property
    def total(self) -> int:
        return sum(self.versions.values()) + len(self.failed)


class _Tee(io.TextIOBase):
    """Standard output, and a file beside the demo project: docs/run.svg is drawn from it."""

    def __init__(self, screen: TextIO, file: TextIO) -> None:
        self.screen, self.file = screen, file

    def write(self, text: str) -> int:
        self.file.write(text)
        return self.screen.write(text)

    def flush(self) -> None:
        self.file.flush()
        self.screen.flush()

    def isatty(self) -> bool:
        return False


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    _clear(folder)
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log, redirect_stdout(_Tee(sys.stdout, log)):
        tell(folder)


def tell(folder: Path) -> None:
    """The story, from an empty folder to a table of what happened."""
    began = time.monotonic()
    story = Story(folder.parent)
    story.part("make a project", "ft", "init", str(folder))
    story.project = folder
    first_version(story)
    traffic = second_version(story)
    story.part("roll back in one command", "ft", "rollback", MODEL, "--reason", "demo")
    story.part("ask again", "ft", "ask", MODEL, QUESTION, "--system", _system(folder))
    story.part("what there is now", "ft", "models")
    story.part("stop serving", "ft", "serve", "down")
    _tell(story, traffic, time.monotonic() - began)


def first_version(story: Story) -> None:
    story.part("version 1: train, evaluate, judge, promote", "ft", "run", RECIPE)
    story.part("serve it", "ft", "serve", "up")
    story.part("ask the bare base", "ft", "ask", "base", QUESTION, "--system", _system(story.project))
    story.part("ask the tuned model", "ft", "ask", MODEL, QUESTION, "--system", _system(story.project))


def second_version(story: Story) -> Traffic:
    """A ninth queue is wanted: new data, the same command, and a swap that no caller notices."""
    say("\n# a ninth label: the data set changes, and the same recipe runs again")
    params = story.project / "params.yaml"
    params.write_text(params.read_text(encoding="utf-8").replace("labels: 8", "labels: 9"), encoding="utf-8")
    story.part("build the new data set", sys.executable, "-m", "dvc", "repro", "--quiet")
    story.part("commit it", "git", "commit", "--quiet", "-am", "A ninth queue")
    started = time.monotonic()
    run_id = story.part("version 2", "ft", "run", RECIPE, "--detach").strip().splitlines()[-1]
    traffic = asyncio.run(_watch_swap(story, run_id))
    story.note("version 2: train, evaluate, judge, promote, swap", time.monotonic() - started)
    story.part("what the run says", "ft", "show", run_id)
    return traffic


async def _watch_swap(story: Story, run_id: str) -> Traffic:
    """Send requests from the moment the engine is back for the evaluation until well after the flip."""
    traffic, stop = Traffic(), asyncio.Event()
    watching = asyncio.create_task(asyncio.to_thread(_run, story.project, ("ft", "logs", "-f", run_id), 0))
    address = await _gateway_is_back(story.project, run_id)
    say(f"\n# {AT_ONCE} callers at once, {STREAMS} of them with long streams, while version 2 is judged and swapped in")
    questions = _questions(story.project)
    started = time.monotonic()
    async with aiohttp.ClientSession(address, timeout=aiohttp.ClientTimeout(total=300)) as session:
        callers = [_caller(session, questions, number, traffic, stop) for number in range(AT_ONCE)]
        await asyncio.gather(_until_swapped(traffic, stop, run_id, story.project), *callers)
    await watching
    served = read(open_store(find_project(story.project)), type_="adapter.served", subject=f"{MODEL}@2")
    traffic.flipped = served[0].time if served else 0.0
    story.note("requests around the swap", time.monotonic() - started, _figures(traffic))
    return traffic


async def _until_swapped(traffic: Traffic, stop: asyncio.Event, run_id: str, project: Path) -> None:
    """Enough requests, and enough of them answered by the new version; or the run has ended otherwise."""
    deadline = time.monotonic() + SWAP_SECONDS
    while time.monotonic() < deadline:
        newest = traffic.versions[f"{MODEL}@2"]
        if traffic.total >= REQUESTS and newest >= AFTER_FLIP:
            break
        if _run_of(project, run_id).state in ("failed", "refused", "cancelled"):
            break
        await asyncio.sleep(1)
    stop.set()


async def _caller(
    session: aiohttp.ClientSession, questions: list[Any], number: int, traffic: Traffic, stop: asyncio.Event
) -> None:
    turn = number
    while not stop.is_set():
        started = time.time()
        stream = number < STREAMS
        body = {
            "model": MODEL,
            "messages": questions[turn % len(questions)],
            "temperature": 0,
            "stream": stream,
        }
        body |= {"max_tokens": 48, "ignore_eos": True} if stream else {"max_tokens": 8}
        version = await _ask(session, body, traffic)
        if stream and version == f"{MODEL}@1":
            traffic.streams.append((started, time.time()))
        turn += AT_ONCE


async def _ask(session: aiohttp.ClientSession, body: dict[str, Any], traffic: Traffic) -> str:
    try:
        async with session.post("/v1/chat/completions", json=body) as answer:
            text = await answer.text()
            if answer.status != 200:
                traffic.failed.append(f"{answer.status}: {text[:200]}")
                return ""
            version = answer.headers["x-ft-adapter"]
            said = _models_in(text, stream=body["stream"])
            if said != {version}:
                traffic.wrong.append(f"{version} in the header, {said} in the body")
            traffic.versions[version] += 1
            return version
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        traffic.failed.append(f"{type(error).__name__}: {error}")
        return ""


def _models_in(text: str, *, stream: bool) -> set[str]:
    """Every version that a reply names; a stream that was cut off (no [DONE]) is an error."""
    if not stream:
        return {json.loads(text)["model"]}
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise ValueError("the stream was cut off")
    return {json.loads(event)["model"] for event in events[:-1]}


async def _gateway_is_back(project: Path, run_id: str) -> str:
    """The gateway's address, once training has given the card back and the engine answers."""
    while (run := _run_of(project, run_id)).active and not run.stage.startswith("evaluate "):
        await asyncio.sleep(1)
    return str((await asyncio.to_thread(_json, project, "ft", "serve", "status", "--json"))["gateway_url"])


def _run_of(project: Path, run_id: str) -> Run:
    # Read here, not by `ft show`: a process each second would take a third of a core from what is shown.
    return get(open_store(find_project(project)), run_id)


def _system(project: Path) -> str:
    """The data set's own instruction: the tuned model was trained behind it."""
    return _questions(project)[0][0]["content"]


def _questions(project: Path) -> list[list[dict[str, str]]]:
    lines = (project / "datasets/tickets/test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"][:-1] for line in lines]


def _tell(story: Story, traffic: Traffic, seconds: float) -> None:
    say("")
    table(["what happened", "took", ""], story.rows)
    say(f"\nall in all {seconds:.0f} s; {_figures(traffic)}")
    say(f"\nthe project stays in {story.project}: try `cd {story.project}` and `ft runs`")
    for problem in [*traffic.failed[:3], *traffic.wrong[:3]]:
        say(f"  {problem}")
    if traffic.failed or traffic.wrong or traffic.total < REQUESTS or not traffic.versions[f"{MODEL}@2"]:
        sys.exit(1)


def _figures(traffic: Traffic) -> str:
    by_version = ", ".join(f"{count} by {version}" for version, count in sorted(traffic.versions.items()))
    return (
        f"{traffic.total} requests: {by_version}; {len(traffic.failed)} failed, {len(traffic.wrong)} mislabelled, "
        f"{traffic.across} streams of version 1 open across the flip"
    )


def _run(project: Path, command: tuple[str, ...], exits: int) -> str:
    """Run a command, passing its output on line by line. Ends the demo if it exits otherwise than expected."""
    process = subprocess.Popen(
        command,
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait() != exits:
        say(f"\nthe demo stops here: `{' '.join(command)}` ended with {process.returncode}")
        sys.exit(1)
    return "".join(lines)


def _json(project: Path, *command: str) -> Any:
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    return json.loads(done.stdout)


def _clear(folder: Path) -> None:
    """Remove an earlier demo, and stop what still runs of it."""
    if (folder / "recipes").is_dir():
        subprocess.run(["ft", "serve", "down"], cwd=folder, capture_output=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    main()
