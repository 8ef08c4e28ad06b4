"""`python -m tests.flows.torch_free_trainer ADAPTER FOLDER`: the real trainer, with a backend that needs no torch.

Lease, progress, checkpoints, stop, manifest and result are the trainer's own. What comes out is the adapter that a real
backend once made, under a mark of the job: two jobs' adapters are never the same bytes.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from jobs.trainer import run_job
from jobs.trainers.progress import ProgressMeter
from jobs.trainers.task import Smoked, Task, Trained
from registry.job_folder import JobFolder
from registry.manifest import MANIFEST, write_manifest

STEP_SECONDS = 0.05
MEMORY = 1 << 20
FINGERPRINT, WEIGHTS = "fingerprint.json", "adapter_model.safetensors"


class TorchFree:
    """A backend whose steps only take time; `made` is a complete adapter folder of the same base."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def train(self, task: Task) -> Trained:
        steps, meter = task.recipe.train.max_steps or 4, ProgressMeter(task.report)
        complete = task.job.complete_checkpoints()
        done = int(complete[0].name.partition("-")[2]) if complete else 0
        smoked = _smoke(task) if task.recipe.train.smoke and not done else None
        began = time.monotonic()
        meter.begin(done, steps)
        stopped = task.stop()
        while done < steps and not stopped:
            time.sleep(STEP_SECONDS)
            done += 1
            meter.log(done, {"loss": 1.0 / done, "num_tokens": 100.0 * done}, MEMORY)
            stopped = task.stop() if done < steps else None
            if done % task.recipe.train.checkpoint_steps == 0 or stopped:
                task.ship()
                _save_checkpoint(task, done)
        if stopped is None:
            _save_adapter(task, self.made)
        seconds = time.monotonic() - began
        return Trained(done, 100 * done, 1.0 / max(done, 1), None, MEMORY, stopped, seconds, 100, "cpu", smoked)

    def fingerprint(self, task: Task) -> dict[str, Any]:
        return dict(json.loads((self.made / FINGERPRINT).read_text(encoding="utf-8")))


def _smoke(task: Task) -> Smoked:
    found = Smoked(STEP_SECONDS, MEMORY, int(task.recipe.train.batch), 100)
    task.report({"stage": "smoke", "rows": found.rows, "longest": found.longest})
    time.sleep(found.seconds)
    task.report({"smoke_seconds": found.seconds, "smoke_memory": found.peak_memory})
    return found


def _save_checkpoint(task: Task, step: int) -> None:
    saved = task.job.work / f"checkpoint-{step}"
    saved.mkdir()
    (saved / "state.json").write_text(json.dumps({"step": step}), encoding="utf-8")
    write_manifest(saved, step=step)
    target = task.job.checkpoints / f"{task.epoch:04d}-{step}"
    target.parent.mkdir(exist_ok=True)
    saved.replace(target)
    task.job.prune_checkpoints(keep=2)


def _save_adapter(task: Task, made: Path) -> None:
    target = task.job.work / "adapter"
    shutil.copytree(made, target, ignore=shutil.ignore_patterns(MANIFEST, FINGERPRINT))
    mark_weights(target / WEIGHTS, str(task.job.spec()["job"]))


def mark_weights(path: Path, job: str) -> None:
    """Write the job's name into the header of a safetensors file; the numbers stay as they are."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {**header.get("__metadata__", {}), "job": job}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def main() -> None:
    made, folder = Path(sys.argv[1]), Path(sys.argv[-1])
    sys.exit(run_job(JobFolder(folder.resolve()), lambda _: TorchFree(made)))


if __name__ == "__main__":
    main()
