"""`make bench-gateway`: what our gateway adds to an upstream that answers at once, beside other gateways.

All stand in front of the same canned upstream on loopback, one worker each, and are asked in turn, round after round,
with kept-alive connections and the same body. c=1: one request after another from one connection; "added" is a
figure less the same figure of the upstream asked directly. c=16: wrk. Streams: time to the first event at c=1, then
64 streams at once whose events the upstream flushes one by one, first as fast as it can, then at a pace at which each
event travels alone. CPU time is that of the gateway's own processes. A table as markdown, then all figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from serving.vllm_process import free_port
from tests.bench.gateway_figures import Target, figures, quantile, table
from tests.bench.http_wire import KEY, PATH, Connection, chat_body, post
from tests.bench.peer_gateways import Start, peers
from tests.bench.unwind import unwind_on_sigterm
from tests.conftest import started

STREAMS = 64
READY_SECONDS = 120.0
WRK_HEAD = 'wrk.method = "POST"\nwrk.path = "{path}"\nwrk.body = [==[{body}]==]\n'
# Seconds between two events of a stream: 64 of them make 8,000 a second.
PACE = 0.008
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_gateway", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=300, help="of each kind, in each round, at c=1")
    parser.add_argument("--seconds", type=float, default=4.0, help="of wrk, and at most of the streams, in each round")
    parser.add_argument("--events", type=int, default=5000, help="of each of the 64 streams")
    parser.add_argument("--peers", default="nginx,vllm-router,portkey,litellm", help="which, with commas; or none")
    asked = parser.parse_args()
    unwind_on_sigterm()
    idle = idle_share()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ft-bench-gateway-")))
        targets, absent = start_all(stack, folder, asked.peers.split(","))
        measure(targets, asked, folder)
    absent |= {f"streams of {each.name}": each.no_streams for each in targets if each.no_streams}
    print("\n".join([*table(targets), *(f"not measured: {name}: {why}" for name, why in absent.items()), ""]))
    print(json.dumps({"idle_before": round(idle, 3), "cores": os.cpu_count(), "absent": absent,
                      "targets": {each.name: figures(each, targets[0]) for each in targets}}, indent=1))  # fmt: skip
    if idle < 0.9:
        print(f"only {idle:.0%} of the machine was idle before: read no absolute figure out of this", file=sys.stderr)


def idle_share(seconds: float = 2.0) -> float:
    """The part of the machine's time in which it had nothing to do."""
    before = _cpu_times()
    time.sleep(seconds)
    spent = [after - earlier for after, earlier in zip(_cpu_times(), before, strict=True)]
    return (spent[3] + spent[4]) / max(1, sum(spent))


def start_all(stack: ExitStack, folder: Path, wanted: list[str]) -> tuple[list[Target], dict[str, str]]:
    """The upstream asked directly, ours, and the peers that could be had; and why the others could not."""
    upstream, ours = free_port(), free_port()
    python = [sys.executable, "-m"]
    direct = _start(stack, "direct", Start([*python, "tests.bench.canned_upstream", str(upstream)]), upstream, folder)
    gateway = [*python, "tests.bench.gateway_under_test", f"http://127.0.0.1:{upstream}", str(ours)]
    found = [direct, _start(stack, "ft", Start(gateway, {"authorization": f"Bearer {KEY}"}), ours, folder)]
    absent = {}
    for name, made in peers().items():
        if name not in wanted:
            continue
        port = free_port()
        (folder / name).mkdir()
        try:
            found.append(_start(stack, name, made(upstream, port, folder / name), port, folder))
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            absent[name] = str(error)[:300]
    return found, absent


def measure(targets: list[Target], asked: argparse.Namespace, folder: Path) -> None:
    wrk = shutil.which("wrk")
    if wrk is None:
        print("wrk is not installed (Debian: apt-get install wrk): nothing at c=16", file=sys.stderr)
    for number in range(asked.rounds + 1):
        # Another one begins each round, and the first round warms all up.
        turn = [*targets[number % len(targets) :], *targets[: number % len(targets)]]
        for each in turn:
            one_after_another(each, asked.requests)
        for each in turn:
            if wrk:
                sixteen_at_once(each, wrk, asked.seconds, folder)
        for each in turn:
            if not each.no_streams:
                many_streams(each, asked.events, asked.seconds)
        if number == 0:
            for each in targets:
                each.rounds.clear()
        print(f"round {number} of {asked.rounds}", file=sys.stderr, flush=True)


def one_after_another(target: Target, requests: int) -> None:
    plain = post(target.port, chat_body(), target.headers)
    stream = post(target.port, chat_body(stream=True), target.headers)
    with Connection(target.port) as connection:
        whole = [connection.answer(plain) * 1e3 for _ in range(requests)]
        target.note(p50=quantile(whole, 0.5), p99=quantile(whole, 0.99))
        if not target.no_streams:
            first = [connection.first_event(stream) * 1e3 for _ in range(requests)]
            target.note(first_p50=quantile(first, 0.5), first_p99=quantile(first, 0.99))


def sixteen_at_once(target: Target, wrk: str, seconds: float, folder: Path) -> None:
    script = folder / f"{target.name}.lua"
    headers = {"content-type": "application/json", **target.headers}
    lines = [f'wrk.headers["{name}"] = "{value}"\n' for name, value in headers.items()]
    script.write_text(WRK_HEAD.format(path=PATH, body=chat_body().decode()) + "".join(lines), encoding="utf-8")
    command = [wrk, "-t1", "-c16", f"-d{max(1, round(seconds))}s", "--latency", "-s", str(script),
               f"http://127.0.0.1:{target.port}"]  # fmt: skip
    before = cpu_seconds(target.session)
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    spent = cpu_seconds(target.session) - before
    target.note(
        rate=float(_found(r"Requests/sec:\s+([\d.]+)", said)[0]),
        p50_16=_milliseconds("50%", said),
        p99_16=_milliseconds("99%", said),
        cpu_us_a_request=spent / int(_found(r"(\d+) requests in", said)[0]) * 1e6,
        not_200=int(next(iter(re.findall(r"Non-2xx or 3xx responses: (\d+)", said)), 0)),
    )


def many_streams(target: Target, events: int, seconds: float) -> None:
    """As fast as the upstream can, and then at a pace at which each event travels by itself."""
    fast, spent = _streams(target, events, seconds, pause=0)
    target.note(broken_streams=fast["broken"])
    if fast["events"]:
        target.note(events=fast["events"] / fast["seconds"], events_a_piece=fast["events"] / max(1, fast["pieces"]),
                    cpu_us_an_event=spent / fast["events"] * 1e6)  # fmt: skip
    paced, spent = _streams(target, round(seconds / PACE), seconds + 1, pause=PACE)
    if paced["events"]:
        target.note(alone_events_a_piece=paced["events"] / max(1, paced["pieces"]),
                    cpu_us_an_event_alone=spent / paced["events"] * 1e6)  # fmt: skip


def _streams(target: Target, events: int, seconds: float, pause: float) -> tuple[dict[str, float], float]:
    """The counts of stream_load, and the CPU seconds of the target meanwhile."""
    headers = [f"{name}={value}" for name, value in target.headers.items()]
    command = [sys.executable, "-m", "tests.bench.stream_load", str(target.port), str(STREAMS), str(events),
               str(seconds), str(pause), *headers]  # fmt: skip
    before = cpu_seconds(target.session)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60)
    return json.loads(done.stdout), cpu_seconds(target.session) - before


def _start(stack: ExitStack, name: str, how: Start, port: int, folder: Path) -> Target:
    log = stack.enter_context((folder / f"{name}.log").open("w+", encoding="utf-8"))
    mine = how.command[0] == sys.executable
    where = {} if mine else {"cwd": how.folder, "env": {**how.environment, "PYTHONPATH": ""}}
    process = stack.enter_context(started(how.command, stdout=log, stderr=log, **where))  # type: ignore[arg-type]
    until_answers(port, how.headers, process, Path(log.name))
    return Target(name, port, how.headers, process.pid, _tried(port, how.headers, stream=True))


def until_answers(port: int, headers: dict[str, str], process: subprocess.Popen[str], log: Path) -> None:
    """Raises RuntimeError with the end of its log if it ends instead, or does not come up."""
    end = time.monotonic() + READY_SECONDS
    while said := _tried(port, headers, stream=False):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"it does not answer ({said}): {log.read_text(encoding='utf-8')[-300:]}")
        time.sleep(0.2)


def _tried(port: int, headers: dict[str, str], *, stream: bool) -> str:
    """One request; what went wrong, or ""."""
    request = post(port, chat_body(stream=stream), headers)
    try:
        with Connection(port, 5) as connection:
            connection.first_event(request) if stream else connection.answer(request)
    except (OSError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return ""


def cpu_seconds(session: int) -> float:
    """Of all processes that live in that session: what it costs does not depend on what else the machine does."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12]) if fields[3] == str(session) else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_times() -> list[int]:
    line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    return [int(each) for each in line.split()[1:9]]


def _found(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"wrk said: {text[-500:]}")
    return match.groups()


def _milliseconds(share: str, text: str) -> float:
    number, unit = _found(rf"{share}\s+([\d.]+)(us|ms|s)", text)
    return float(number) * UNITS[unit]


if __name__ == "__main__":
    main()
