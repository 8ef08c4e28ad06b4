"""`python -m tests.bench.bench_packing [ROUNDS]`: the same rows trained in padded batches and in packs, in turns.

SmolLM2-135M, LoRA on the CPU, rows of very different lengths, one epoch with about as many rows in each update. Prints
one JSON line: seconds of training (medians of the rounds) and tokens per second without padding.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from jobs.claim import OK
from jobs.fetch_base import fetch_base
from jobs.trainer import run_job
from registry.project import Project, cache_folder
from registry.recipe import Base
from tests.conftest import SMOL
from tests.jobs.test_trainer import make_job, result_of, rows, write_split

ROWS, LENGTH = 24, 256
SETTINGS: dict[str, dict[str, Any]] = {
    "rows": {"batch": 4},
    "packs": {"batch": 1, "packing": True},
}


def main(rounds: int) -> None:
    cache = cache_folder()
    os.environ["FT_CACHE"] = str(cache)
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        base = fetch_base(Project(root=home, home=home, cache=cache), Base(model=SMOL))
        for number in range(rounds):
            for name, train in SETTINGS.items():
                job = make_job(home / f"{name}-{number}", base, cache, quantize="none", max_steps=None, smoke=False,
                               max_length=LENGTH, **train)  # fmt: skip
                write_split(job.folder.data, "train", _varied())
                write_split(job.folder.data, "eval", rows(1))
                assert run_job(job.folder) == OK
                measured[name].append(result_of(job))
    print(json.dumps({name: _median(found) for name, found in measured.items()}), flush=True)


def _varied() -> list[dict[str, Any]]:
    """Most rows are short, every eighth is several times as long."""
    content = rows(ROWS)
    for at, row in enumerate(content):
        row["messages"][0]["content"] += " The parcel was sent back." * (25 if at % 8 == 0 else at % 5)
    return content


def _median(found: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [each["train_seconds"] for each in found]
    middle = statistics.median(seconds)
    rate = round(found[0]["tokens"] / middle, 1)
    return {"steps": found[0]["steps"], "tokens": found[0]["tokens"], "seconds": round(middle, 1),
            "of": [round(each, 1) for each in seconds], "tokens_per_second": rate}  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
