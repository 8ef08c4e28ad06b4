"""The trainer: does the job in the folder, can be stopped, killed and run again, and says what went wrong.

On a random two-layer Llama, so that each takes seconds; one test trains the real model in 4 bits.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.claim import FAILED, OK, STOPPED, TAKEN
from jobs.retries import next_attempt
from jobs.trainer import run_job
from registry.base_models import BaseModel
from registry.job_folder import Held, JobFolder
from registry.manifest import broken_files, read_manifest, write_manifest
from registry.recipe import Finetune
from registry.run_control import Retries
from tests.conftest import SMOL, TinyBase, run_bounded, started

# torch and its friends warn of their own deprecations, which are not ours to mend.
pytestmark = [pytest.mark.training, pytest.mark.filterwarnings("default")]

ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
           "special_tokens_map.json", "chat_template.jinja", "fingerprint.json", "MANIFEST.json"}  # fmt: skip
LABELS = ["delivery", "refund", "account", "other"]


@dataclass(frozen=True)
class Job:
    """A job folder, and how to run its trainer in a process of its own."""

    folder: JobFolder
    env: dict[str, str]

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "jobs.trainer", str(self.folder.path)]

    def run(self) -> int:
        done = run_bounded(self.command, 500, env=self.env)
        print(done.stdout, done.stderr)
        return done.returncode

    def steps(self) -> list[int]:
        """Steps at which something was reported, in order."""
        return [line["step"] for line in self.folder.progress() if "step" in line]

    def begins(self) -> list[int]:
        """The step at which each attempt began."""
        return [line["step"] for line in self.folder.progress() if line.keys() == {"time", "epoch", "step", "steps"}]


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [
            {"role": "user", "content": f"Message {n} is about {LABELS[n % 4]}. Which queue?"},
            {"role": "assistant", "content": LABELS[n % 4]},
        ]}
        for n in range(count)
    ]  # fmt: skip


def write_split(folder: Path, split: str, content: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in content)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def make_job(path: Path, base: BaseModel, cache: Path, **train: Any) -> Job:
    settings = {"quantize": "none", "batch": 2, "max_steps": 6, "checkpoint_steps": 2, "learning_rate": 1e-3,
                "max_length": 128, "lora": {"rank": 8}, **train}  # fmt: skip
    recipe = Finetune.model_validate({
        "kind": "finetune", "name": "tiny", "model": "tiny", "base": {"model": base.source}, "train": settings,
        "data": {"path": "datasets/tiny"}, "evaluate": {"task": "label"},
    })  # fmt: skip
    folder = JobFolder(path)
    folder.write_spec({"job": "tiny-1", "recipe": recipe.model_dump(mode="json"), "base": base.as_dict(),
                       "dataset": "0", "card": "cpu"})  # fmt: skip
    folder.data.mkdir(parents=True)
    write_split(folder.data, "train", rows(40))
    write_split(folder.data, "eval", rows(4))
    return Job(
        folder,
        {"FT_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )


@pytest.fixture
def make(tiny_base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Makes a job on the tiny base; also usable in this process, which saves the seconds of starting torch."""
    monkeypatch.setenv("FT_CACHE", str(tiny_base.cache))

    def made(path: Path = tmp_path / "job", **train: Any) -> Job:
        return make_job(path, tiny_base.model, tiny_base.cache, **train)

    return made


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system needs the right to mount one: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def until(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.02)


@contextmanager
def meanwhile(condition: Callable[[], bool], act: Callable[[], object]) -> Iterator[None]:
    """While the block runs the trainer in this process (which saves the start of torch), `act` once on `condition`."""
    over = threading.Event()

    def watch() -> None:
        while not condition():
            if over.wait(0.02):
                return
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def result_of(job: Job) -> dict[str, Any]:
    result = job.folder.result()
    assert result is not None
    return result


@pytest.fixture(scope="module")
def done(tiny_base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that was done without any disturbance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FT_CACHE", str(tiny_base.cache))
        job = make_job(tmp_path_factory.mktemp("done") / "job", tiny_base.model, tiny_base.cache)
        assert run_job(job.folder) == OK
    return job


def test_a_job_leaves_exactly_its_adapter(done: Job) -> None:
    names = {each.name for each in done.folder.adapter.iterdir()}
    assert names <= ADAPTER
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "fingerprint.json"} <= names
    assert broken_files(done.folder.adapter) == []
    manifest = read_manifest(done.folder.adapter)
    assert manifest is not None
    assert (manifest["base"], manifest["recipe"]) == (done.folder.spec()["base"]["digest"], "tiny")
    config = json.loads((done.folder.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert not done.folder.work.exists()
    assert [each.name for each in done.folder.complete_checkpoints()] == ["0001-6", "0001-4"]


def test_its_result_has_what_it_cost(done: Job) -> None:
    result = result_of(done)
    assert (result["status"], result["steps"]) == ("ok", 6)
    assert result["tokens"] > 100
    assert result["peak_memory"] > 1 << 20
    assert 0 < result["loss"] < 20
    assert 0 < result["eval_loss"] < 20


def test_progress_tells_every_step_once_with_loss_rate_and_eta(done: Job) -> None:
    lines = list(done.folder.progress())
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4, 5, 6]
    for line in losses:
        assert line["steps"] == 6
        assert line["tokens_per_second"] > 0
        assert line["eta"] >= 0
        assert line["memory"] > 0
        assert line["epoch"] == 1
    assert losses[-1]["eta"] == 0
    assert [line["stage"] for line in lines if "stage" in line] == ["smoke", "fingerprint"]
    assert sum("eval_loss" in line for line in lines) >= 1
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_the_fingerprint_has_prompts_continuations_and_logprobs(done: Job) -> None:
    fingerprint = json.loads((done.folder.adapter / "fingerprint.json").read_text())
    assert fingerprint["precision"] == "none"
    assert len(fingerprint["samples"]) == 4
    for sample in fingerprint["samples"]:
        length = len(sample["continuation_ids"])
        assert 1 <= length <= 16
        for kind in ("logprobs", "base_logprobs"):
            assert sample[kind]["bf16"] == sample[kind]["train"]
            assert len(sample[kind]["bf16"]) == length
            assert all(value <= 0 for value in sample[kind]["bf16"])


def test_a_job_that_is_done_is_left_alone(done: Job) -> None:
    before, lease, began = result_of(done), done.folder.lease(), time.monotonic()
    assert run_job(done.folder) == OK
    assert time.monotonic() - began < 1
    assert result_of(done) == before
    assert done.folder.lease() == lease


def test_sigterm_saves_and_stops_and_the_next_trainer_goes_on_from_there(make: Callable[..., Job]) -> None:
    job = make(max_steps=400, checkpoint_steps=100)
    write_split(job.folder.data, "train", rows(200))
    with started(job.command, env=job.env) as trainer:
        until(trainer, lambda: max(job.steps(), default=0) >= 3)
        trainer.send_signal(signal.SIGTERM)
        assert trainer.wait(60) == STOPPED
    stopped = result_of(job)
    assert (stopped["status"], stopped["message"]) == ("stopped", "stopped by SIGTERM")
    assert 3 <= stopped["steps"] < 100
    assert not job.folder.adapter.exists()
    assert [each.name for each in job.folder.complete_checkpoints()] == [f"0001-{stopped['steps']}"]
    steps: list[int] = []

    def stop() -> None:
        assert job.folder.result() is None  # the stopped one counts no more
        job.folder.ask_to_stop("the run was cancelled")
        steps.extend(job.steps())

    with meanwhile(lambda: max(job.steps()) > stopped["steps"] + 1, stop):
        assert run_job(job.folder) == STOPPED
    assert steps
    assert job.begins() == [0, stopped["steps"]]
    assert result_of(job)["message"] == "the run was cancelled"
    assert result_of(job)["steps"] > stopped["steps"]


def test_kill_9_and_the_next_trainer_goes_on_from_the_last_whole_checkpoint(make: Callable[..., Job]) -> None:
    job = make(max_steps=60, checkpoint_steps=5)
    write_split(job.folder.data, "train", rows(120))
    with started(job.command, env=job.env) as trainer:
        until(trainer, lambda: len(job.folder.complete_checkpoints()) >= 2)
        trainer.kill()
        trainer.wait(30)
    assert job.folder.result() is None
    newest = job.folder.complete_checkpoints()[0]
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])  # as if killed while it was written
    whole = int(job.folder.complete_checkpoints()[0].name.split("-")[1])
    assert run_job(job.folder) == OK
    assert job.begins() == [0, whole]
    first = [line["step"] for line in job.folder.progress() if line["epoch"] == 1 and "loss" in line]
    assert first[:whole] == list(range(1, whole + 1)), "nobody takes the steps of a checkpoint again"
    held = job.folder.lease()
    assert held is not None
    assert held.lease.epoch == 2
    assert (result_of(job)["status"], result_of(job)["steps"]) == ("ok", 60)
    second = [line["step"] for line in job.folder.progress() if line["epoch"] == 2 and "loss" in line]
    assert second == list(range(whole + 1, 61))


def test_killed_after_the_last_checkpoint_it_trains_no_step_more(
    done: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_CACHE", done.env["FT_CACHE"])
    job = Job(JobFolder(tmp_path / "job"), done.env)
    shutil.copytree(done.folder.path, job.folder.path)
    for part in ("adapter", "result.json", "lease.json"):
        gone = job.folder.path / part
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert run_job(job.folder) == OK
    assert max(job.steps()) == result_of(job)["steps"] == 6
    alike = ("tokens", "loss", "eval_loss")
    assert [result_of(job)[each] for each in alike] == [result_of(done)[each] for each in alike]
    weights = [each.folder.adapter / "adapter_model.safetensors" for each in (job, done)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_trainer_that_was_taken_over_publishes_nothing(make: Callable[..., Job]) -> None:
    job = make(max_steps=4000, checkpoint_steps=1000)
    taken: list[Held] = []

    def take() -> None:
        taken.append(job.folder.claim("another", job.folder.lease()))

    with meanwhile(lambda: max(job.steps(), default=0) >= 1, take):
        assert run_job(job.folder) == TAKEN
    assert job.folder.lease() == taken[0]
    assert job.folder.result() is None
    assert not (job.folder.path / "result.json").exists()
    assert not job.folder.adapter.exists()


def test_rows_that_are_too_long_are_named(make: Callable[..., Job]) -> None:
    job = make(max_length=96)
    content = rows(10)
    content[6]["messages"][0]["content"] = "parcel " * 100
    content[8]["messages"][0]["content"] = "parcel " * 150
    write_split(job.folder.data, "train", content)
    assert run_job(job.folder) == FAILED
    result = result_of(job)
    assert (result["status"], result["class"]) == ("failed", "bad_data")
    assert "train.jsonl: 2 rows are longer than train.max_length 96 (the first is row 7 with " in result["message"]
    longest = int(result["message"].split("the longest has ")[1].split(")")[0])
    assert f"set train.max_length to {longest}" in result["message"]
    assert longest > 150


def test_data_that_cannot_be_read_is_the_datas_fault(make: Callable[..., Job]) -> None:
    job = make()
    (job.folder.data / "eval.jsonl").write_text("{not json\n")
    assert run_job(job.folder) == FAILED
    assert result_of(job)["class"] == "bad_input"
    assert "eval.jsonl:1: not valid JSON" in result_of(job)["message"]


def test_a_loss_that_is_no_number_ends_the_job(make: Callable[..., Job]) -> None:
    job = make(learning_rate=1e30, warmup=0, max_steps=20)
    assert run_job(job.folder) == FAILED
    result = result_of(job)
    assert (result["status"], result["class"]) == ("failed", "diverged")
    assert "the loss is nan at step" in result["message"]
    assert not job.folder.adapter.exists()


# A trainer on a small machine: 800 MB more than its libraries take. Measured: 512 rows need 1005, 128 need 684, 8 157.
SMALL_MACHINE = """
import resource, sys
from pathlib import Path
import jobs.trainers.trl_sft, torch
from jobs.trainer import run_job
from registry.job_folder import JobFolder
torch.ones(8, requires_grad=True).sum().backward()
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, ((taken << 10) + (800 << 20),) * 2)
sys.exit(run_job(JobFolder(Path(sys.argv[1]))))
"""


def test_a_batch_that_does_not_fit_is_out_of_memory_and_a_smaller_one_fits(make: Callable[..., Job]) -> None:
    job = make(batch=1024, max_steps=2, checkpoint_steps=1)
    write_split(job.folder.data, "train", rows(1024))
    command = [sys.executable, "-c", SMALL_MACHINE, str(job.folder.path)]
    done, result = run_bounded(command, 500, env=job.env), result_of(job)
    assert (result["status"], result["class"], result["stage"]) == ("failed", "out_of_memory", "smoke"), done.stderr
    assert result["message"].startswith("in the smoke, with 1024 rows of up to ")
    assert job.steps() == []
    for after in range(job.folder.accepted(), 9):  # as many as a machine of another make may need
        train, before = job.folder.recipe()["train"], job.folder.attempts()
        change = next_attempt(Retries(out_of_memory=9), train, result, after, before)
        assert change is not None
        job.folder.add_attempt(change)
        if change["train"]["batch"] == 32:
            break
    done = run_bounded(command, 500, env=job.env)
    assert done.returncode == OK, done.stderr + str(result_of(job))
    assert job.folder.recipe()["train"]["accumulate"] == 32
    assert result_of(job)["steps"] == 2


def test_a_smaller_batch_goes_on_from_the_checkpoint_of_a_larger_one(make: Callable[..., Job]) -> None:
    job = make(batch=4, max_steps=4, checkpoint_steps=2)

    def stop() -> None:
        job.folder.ask_to_stop("enough")

    with meanwhile(lambda: max(job.steps(), default=0) >= 2, stop):
        run_job(job.folder)
    job.folder.withdraw_stop()
    reached = int(job.folder.complete_checkpoints()[0].name.split("-")[1])
    change = {"after": 1, "class": "out_of_memory", "train": {"batch": 2, "accumulate": 2}, "anew": False}
    job.folder.add_attempt(change)
    assert run_job(job.folder) == OK
    assert job.begins() == [0, reached] or reached == 4
    assert result_of(job)["steps"] == 4


def test_a_base_that_was_changed_is_not_trained_on(
    make: Callable[..., Job], tiny_base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(tiny_base.cache, cache)
    write_manifest(cache / "models" / tiny_base.model.folder, source="tiny", revision="1", licence="another")
    job = make()
    monkeypatch.setenv("FT_CACHE", str(cache))
    assert run_job(job.folder) == FAILED
    assert result_of(job)["class"] == "bad_input"
    assert "the base model tiny at 1 is not in the cache (or was changed)" in result_of(job)["message"]


def test_a_full_disk_keeps_the_last_checkpoint(make: Callable[..., Job], small_disk: Path) -> None:
    job = make(small_disk / "job", max_steps=200, checkpoint_steps=2, lora={"rank": 64})
    filler = small_disk / "filler"

    def fill() -> None:
        filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 20_000))

    with meanwhile(lambda: len(job.folder.complete_checkpoints()) >= 1, fill):
        assert run_job(job.folder) == FAILED
    result = result_of(job)
    assert (result["status"], result["class"]) == ("failed", "disk_full")
    assert result["message"] == f"the disk is full: {job.folder.path}"
    assert len(job.folder.complete_checkpoints()) >= 1
    assert not job.folder.work.exists()


def test_the_real_model_trains_in_4_bits(base_model: BaseModel, persons_cache: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", base_model, persons_cache, quantize="nf4", max_steps=2, batch=1)
    write_split(job.folder.data, "eval", rows(1))
    assert job.run() == OK
    assert (result_of(job)["steps"], base_model.source) == (2, SMOL.removeprefix("pypi:"))
    fingerprint = json.loads((job.folder.adapter / "fingerprint.json").read_text())
    assert fingerprint["precision"] == "nf4"
    for sample in fingerprint["samples"]:
        assert len(sample["logprobs"]["train"]) == len(sample["logprobs"]["bf16"]) == len(sample["continuation_ids"])
