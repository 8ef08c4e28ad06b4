"""A job that a torch-free trainer does anywhere: pushed to a bucket with its data and a base that nobody loads."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.base_models import BaseModel
from registry.bucket import open_bucket
from registry.job_bucket import JobBucket
from registry.job_folder import JobFolder
from registry.manifest import manifest_digest, write_manifest
from registry.recipe import Finetune
from registry.settings import Settings
from tests.dvc_projects import write_splits
from tests.fakes.adapter_folder import lora_arrays, make_adapter


@dataclass(frozen=True)
class BucketJob:
    """`job` is our side's folder, `remote` the bucket's, `trainer` a command that gets a folder behind it."""

    job: JobFolder
    remote: JobBucket
    base: Path
    trainer: str

    def steps(self) -> list[int]:
        """Of all trainers, in the order in which they were written; pulls first."""
        self.remote.pull(self.job)
        return [line["step"] for line in self.job.progress() if "step" in line]


def bucket_job(folder: Path, settings: Settings, name: str = "m-0123456789", **train: Any) -> BucketJob:
    base = folder / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}", encoding="utf-8")
    write_manifest(base, source="none", revision="1", licence="Apache-2.0")
    known = BaseModel("none", "1", "Apache-2.0", manifest_digest(base), "local-none@1")
    recipe = Finetune.model_validate({
        "kind": "finetune", "name": "m", "model": "m", "base": {"model": "acme/none"}, "data": {"path": "datasets/t"},
        "train": {"max_steps": 20, "checkpoint_steps": 2, **train}, "evaluate": {"task": "text"},
    })  # fmt: skip
    job = JobFolder(folder / "jobs" / name)
    job.write_spec({"job": name, "recipe": recipe.model_dump(mode="json"), "base": known.as_dict(), "dataset": "d"})
    write_splits(job.data)
    made = make_adapter(folder / "made", lora_arrays(size=16), base=known.digest)
    (made / "fingerprint.json").write_text(json.dumps({}), encoding="utf-8")
    trainer = f"{shlex.quote(sys.executable)} -m tests.flows.torch_free_trainer {shlex.quote(str(made))}"
    remote = JobBucket(open_bucket(settings), name)
    remote.push(job, base)
    return BucketJob(job, remote, base, trainer)
