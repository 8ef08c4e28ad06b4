"""The first minute of a job: the longest rows, a checkpoint, a resume and an evaluation, and only then the long run.

Out of memory at the longest row costs a minute here and a night later. What is trained stays the same: the adapter is
put back as it was, and whoever trains next seeds anew. On a GPU the step after the resume is of the longest rows too:
the first one has no optimizer state yet, and a resumed adapter is held in float32, so the second is the larger one.
"""

from __future__ import annotations

import gc
import hashlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from transformers import TrainerCallback

from jobs.trainers.task import Smoked, Task
from registry.manifest import broken_files, write_manifest
from registry.recipe import Train

# Enough that a step moves the weights, too little to diverge where the recipe's own rate would not.
RATE = 1e-5
# A job of fewer steps has hardly anything to resume for.
SHORT_STEPS = 10


class Make(Protocol):
    """Makes the trainer of the long run, with other rows and some other arguments."""

    def __call__(self, rows: Dataset, eval_rows: Dataset, watch: TrainerCallback, **arguments: Any) -> Any: ...


def smoke(
    task: Task, model: Any, make: Make, rows: Dataset, eval_rows: Dataset, peak_memory: Callable[[], int]
) -> Smoked:
    """Try what the long run will need, and leave `model` as it was; ends early when the job is to stop.

    Raises what the long run would have raised, and RuntimeError where a checkpoint does not load as it was saved.
    """
    began, train = time.monotonic(), task.recipe.train
    worst = longest(rows, int(train.batch))
    most = len(rows[worst[0]]["input_ids"])
    task.report({"stage": "smoke", "rows": len(worst), "longest": most})
    kept = {name: part.detach().to("cpu", copy=True) for name, part in _trainable(model)}
    forwards = _forwards(model)
    _rehearse(task, model, make, rows, eval_rows, kept)
    _put_back(model, kept)
    _undo_patches(model, forwards)
    _free()
    found = Smoked(round(time.monotonic() - began, 2), peak_memory(), len(worst), most)
    task.report({"smoke_seconds": found.seconds, "smoke_memory": found.peak_memory})
    return found


def longest(rows: Dataset, most: int) -> list[int]:
    """Numbers of the longest rows, the longest first: together with the longest, all others are padded to it."""
    lengths = [len(each) for each in rows["input_ids"]]
    return sorted(range(len(lengths)), key=lambda at: -lengths[at])[:most]


def updates(train: Train, rows: int) -> int:
    """Optimizer steps of the whole job."""
    batches = math.ceil(rows / int(train.batch))
    return train.max_steps or math.ceil(math.ceil(batches / train.accumulate) * train.epochs)


def _rehearse(
    task: Task, model: Any, make: Make, rows: Dataset, eval_rows: Dataset, kept: dict[str, torch.Tensor]
) -> None:
    train, on_gpu = task.recipe.train, model.device.type == "cuda"
    worst, folder = longest(rows, int(train.batch)), task.job.work / "smoke"
    # A second batch of a step finds the gradients of the first one in memory; a third finds no more.
    batches = min(train.accumulate, 2) if on_gpu else 1
    worst_rows = rows.select(worst * batches)
    worst_evals = eval_rows.select(longest(eval_rows, int(train.batch)))
    common = {
        "output_dir": str(folder), "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "per_device_train_batch_size": len(worst), "gradient_accumulation_steps": batches, "eval_strategy": "no",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    trainer = make(worst_rows, worst_evals, _Watch(task), **common, max_steps=1, save_steps=1)
    trainer.train()
    checkpoint = _verified(folder / "checkpoint-1")
    if updates(train, len(rows)) >= SHORT_STEPS and not task.stop():
        saved = state_digest(model, trainer.optimizer)
        del trainer
        _put_back(model, kept)
        _free()
        # On a CPU time is what is short, not memory: there the step after the resume is of the shortest row.
        again = worst_rows if on_gpu else rows.select(longest(rows, len(rows))[-1:])
        trainer = make(again, worst_evals, _Watch(task, saved), **common, max_steps=2, save_strategy="no")
        trainer.train(resume_from_checkpoint=str(checkpoint))
    if not task.stop():
        trainer.evaluate()
    shutil.rmtree(folder, ignore_errors=True)


def _verified(checkpoint: Path) -> Path:
    write_manifest(checkpoint, step=1)
    if broken := broken_files(checkpoint):
        raise RuntimeError(f"the checkpoint was not written as it should be: {', '.join(broken)}")
    return checkpoint


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Stops when asked to; with `saved`, the digest of a state, checks that it is what was loaded."""

    def __init__(self, task: Task, saved: str | None = None) -> None:
        self.task, self.saved = task, saved

    def on_train_begin(self, args: Any, state: Any, control: Any, **now: Any) -> None:
        if self.saved is None:
            return
        if state.global_step != 1 or state_digest(now["model"], now["optimizer"]) != self.saved:
            raise RuntimeError(f"a checkpoint of step 1 was loaded as step {state.global_step}, or with other content")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} on the longest rows, before anything was learnt")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.task.stop():
            control.should_training_stop = True


def state_digest(model: Any, optimizer: Any) -> str:
    """sha256 (hex) of the adapter's and the optimizer's numbers, whatever type they are held in."""
    found = hashlib.sha256()
    for name, tensor in [*_trainable(model), *_tensors(optimizer.state_dict()["state"], "optimizer")]:
        # PEFT loads an adapter that was saved in bfloat16 into float32; the numbers are the same.
        plain = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        found.update(name.encode() + plain.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _tensors(state: dict[Any, Any], place: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name in sorted(state, key=str):
        value = state[name]
        if isinstance(value, dict):  # of a parameter; bitsandbytes has one more in it
            yield from _tensors(value, f"{place}/{name}")
        elif isinstance(value, torch.Tensor):
            yield f"{place}/{name}", value


def _trainable(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, part) for name, part in model.named_parameters() if part.requires_grad]


def _put_back(model: Any, kept: dict[str, torch.Tensor]) -> None:
    # .data and not copy_: TRL and PEFT may have changed the type as well.
    for name, part in _trainable(model):
        part.data, part.grad = kept[name].to(part.device, copy=True), None


def _forwards(model: Any) -> dict[torch.nn.Module, Any]:
    return {each: each.__dict__.get("forward") for each in model.modules()}


def _undo_patches(model: Any, forwards: dict[torch.nn.Module, Any]) -> None:
    """TRL and accelerate put wrappers around `forward`; a second trainer would add its own, or believe it had them."""
    for mark in ("_is_accelerate_prepared", "_original_forward"):
        model.__dict__.pop(mark, None)
    for each in model.modules():
        each.__dict__.pop("forward", None)
        if forwards[each] is not None:
            each.forward = forwards[each]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
