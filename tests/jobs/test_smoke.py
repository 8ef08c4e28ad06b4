"""The smoke: the longest rows, a checkpoint, a resume and an evaluation first, and then a run as if there was none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from jobs.claim import FAILED, OK, STOPPED
from jobs.trainer import run_job
from jobs.trainers.smoke import longest, state_digest, updates
from registry.recipe import Train
from tests.conftest import TinyBase
from tests.jobs.test_trainer import Job, make_job, result_of, rows, write_split

pytestmark = [pytest.mark.training, pytest.mark.filterwarnings("default")]


@pytest.fixture
def make(tiny_base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    monkeypatch.setenv("FT_CACHE", str(tiny_base.cache))

    def made(name: str = "job", **train: Any) -> Job:
        return make_job(tmp_path / name, tiny_base.model, tiny_base.cache, **train)

    return made


def smokes(job: Job) -> list[dict[str, Any]]:
    return [line for line in job.folder.progress() if line.get("stage") == "smoke"]


def reopen(job: Job) -> None:
    """As if the job had been killed before its last checkpoint."""
    shutil.rmtree(job.folder.complete_checkpoints()[0])
    (job.folder.path / "result.json").unlink()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_what_is_trained_is_the_same_with_and_without_it(make: Callable[..., Job], quantize: str) -> None:
    found = []
    for smoke in (True, False):
        job = make(str(smoke), smoke=smoke, max_steps=12, quantize=quantize, lora={"rank": 8, "dropout": 0.2})
        assert run_job(job.folder) == OK
        assert len(smokes(job)) == smoke
        losses = [line["loss"] for line in job.folder.progress() if "loss" in line]
        kept = [result_of(job)[each] for each in ("loss", "eval_loss", "tokens", "steps")]
        found.append((losses, kept, (job.folder.adapter / "adapter_model.safetensors").read_bytes()))
    assert len(found[0][0]) == 12
    assert found[0] == found[1]


def test_it_tries_the_longest_rows_and_tells_what_it_cost(make: Callable[..., Job]) -> None:
    job = make(batch=3, max_steps=12, max_length=256)
    content = rows(40)
    content[17]["messages"][0]["content"] += " parcel" * 60
    write_split(job.folder.data, "train", content)
    assert run_job(job.folder) == OK
    (line,), result = smokes(job), result_of(job)
    assert line["rows"] == 3
    assert result["longest"] == line["longest"] > 80
    cost = next(each for each in job.folder.progress() if "smoke_seconds" in each)
    assert (cost["smoke_seconds"], cost["smoke_memory"]) == (result["smoke_seconds"], result["smoke_memory"])
    assert 0 < result["smoke_seconds"] < 60
    assert 1 << 20 < result["smoke_memory"] <= result["peak_memory"]
    assert (result["batch"], result["card"]) == (3, "cpu")
    assert 0 < result["train_seconds"] < result["seconds"] - result["smoke_seconds"]
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["train_seconds"], rel=0.1)
    assert not job.folder.work.exists()


def test_a_checkpoint_of_the_same_batch_needs_none_and_one_of_another_batch_does(make: Callable[..., Job]) -> None:
    job = make(batch=4, max_steps=12, checkpoint_steps=2)
    job.folder.ask_to_stop("while it tries the longest rows")
    assert run_job(job.folder) == STOPPED
    assert (result_of(job)["steps"], len(smokes(job))) == (0, 1)
    assert not job.folder.complete_checkpoints()
    job.folder.withdraw_stop()
    assert run_job(job.folder) == OK
    assert len(smokes(job)) == 2

    reopen(job)
    assert run_job(job.folder) == OK
    assert len(smokes(job)) == 2
    reopen(job)
    job.folder.add_attempt(
        {"after": 3, "class": "out_of_memory", "train": {"batch": 2, "accumulate": 2}, "anew": False}
    )
    assert run_job(job.folder) == OK
    assert [line["rows"] for line in smokes(job)] == [4, 4, 2]
    assert result_of(job)["steps"] == 12


def test_without_it_a_job_begins_at_once(make: Callable[..., Job]) -> None:
    job = make(smoke=False, max_steps=2)
    assert run_job(job.folder) == OK
    assert smokes(job) == []
    assert result_of(job)["smoke_seconds"] is None


def test_what_the_plan_must_decide_or_a_card_cannot_do_is_said_before_the_base_is_loaded(
    make: Callable[..., Job],
) -> None:
    undecided, eight_bit = make("auto", batch="auto"), make("8bit", optimizer="paged_adamw_8bit")
    for job, message in (
        (undecided, "train.batch is still `auto`"),
        (eight_bit, "train.optimizer paged_adamw_8bit needs a GPU, and this job is on a CPU"),
    ):
        assert run_job(job.folder) == FAILED
        result = result_of(job)
        assert (result["class"], result["stage"]) == ("bad_input", "load")
        assert message in result["message"]


def test_the_longest_rows_come_first_and_the_steps_are_counted() -> None:
    lengths = Dataset.from_dict({"input_ids": [[0] * length for length in (3, 9, 1, 9, 5)]})
    assert longest(lengths, 3) == [1, 3, 4]
    assert longest(lengths, 9) == [1, 3, 4, 0, 2]
    assert updates(Train(batch=8, epochs=2), 17) == 6
    assert updates(Train(batch=8, accumulate=2, epochs=1), 17) == 2
    assert updates(Train(max_steps=7), 1000) == 7


def test_a_state_that_differs_in_any_number_has_another_digest() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    before = state_digest(model, optimizer)
    moment = optimizer.state[model.bias]["exp_avg"]
    moment[0] += 1e-3
    changed = state_digest(model, optimizer)
    moment[0] -= 1e-3
    model.weight.data[0, 0] += 1e-3
    assert len({before, changed, state_digest(model, optimizer)}) == 3
    model.weight.data = model.weight.data.bfloat16()
    rounded = state_digest(model, optimizer)
    model.weight.data = model.weight.data.float()
    assert state_digest(model, optimizer) == rounded
