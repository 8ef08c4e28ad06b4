"""`make bench-control`: from `ft run` to RunPod's create call, and `ft plan` as a whole process; the figures as JSON.

Through the stand-in and a real S3, with a worker on, and with token lengths, prices and base model in their caches.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from registry import runs
from tests.conftest import ROOT
from tests.fakes.runpod.started import Standin, standin
from tests.flows.money_sweep import tiny_base_in
from tests.flows.tiny_project import Tiny, make_tiny
from tests.weed_server import weed_server

ROUNDS = 8
CLOUD = {"gpus": ["NVIDIA A40"], "max_usd_per_hour": 0.5}


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="ft-bench-control-"))
    with ExitStack() as stack:
        s3 = stack.enter_context(weed_server())
        cloud = stack.enter_context(standin(folder / "cloud", provision=60))
        tiny = make_tiny(folder / "project", tiny_base_in(folder / "tiny"))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("FT_", "AWS_", "RUNPOD_"))},
            **s3.environment("bench"), **cloud.environment, "PYTHONPATH": str(ROOT),
            "FT_CACHE": str(tiny.person.project.cache), "FT_RUNPOD_IMAGE": "ft", "FT_WORKER_IDLE_SECONDS": "600",
        }  # fmt: skip
        stack.callback(tiny.kill_worker)
        print(json.dumps(_measured(tiny, cloud, environment), indent=1))


def _measured(tiny: Tiny, cloud: Standin, environment: dict[str, str]) -> dict[str, Any]:
    tiny.write_recipe(card="runpod", cloud=CLOUD, budget={"max_usd": 1.0})
    text = (tiny.person.project.root / "recipes" / "m.yaml").read_text(encoding="utf-8")
    whole, behind_row, plans = [], [], []
    for number in range(ROUNDS):
        path = tiny.person.project.root / "recipes" / f"m{number}.yaml"
        path.write_text(text, encoding="utf-8")
        plans.append(_seconds(tiny, environment, "plan", f"recipes/{path.name}"))
        began = time.time()
        run_id = _ft(tiny, environment, "run", f"recipes/{path.name}", "--yes", "--detach").strip().splitlines()[-1]
        created = _created(cloud, number)
        whole.append(created - began)
        behind_row.append(created - runs.get(tiny.store, run_id).created)
    # The first round starts the worker, counts the tokens and asks for prices.
    return {"first": _shown(whole[:1]), "ft_run_to_create_s": _shown(whole[1:]),
            "row_to_create_s": _shown(behind_row[1:]), "ft_plan_s": _shown(plans[1:])}  # fmt: skip


def _created(cloud: Standin, known: int) -> float:
    """When the next create came (Unix time)."""
    end = time.monotonic() + 60
    while len(found := cloud.requests("POST", "/v2/pods")) <= known:
        assert time.monotonic() < end, "no create came"
        time.sleep(0.05)
    return float(found[-1]["at"])


def _seconds(tiny: Tiny, environment: dict[str, str], *arguments: str) -> float:
    began = time.monotonic()
    _ft(tiny, environment, *arguments)
    return time.monotonic() - began


def _ft(tiny: Tiny, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments], cwd=tiny.person.project.root, env=environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def _shown(seconds: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds), 3), "longest": round(max(seconds), 3), "rounds": len(seconds)}


if __name__ == "__main__":
    main()
