"""Backend `trl`: TRL's SFTTrainer with PEFT; QLoRA (NF4 by bitsandbytes) or LoRA, on a GPU or a CPU."""

from __future__ import annotations

import json
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, TrainerState
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from jobs.trainers.chat_tokens import Encoded, encode
from jobs.trainers.fingerprint import make_fingerprint
from jobs.trainers.packing import ARGUMENTS, check_rows_stay_apart, pack
from jobs.trainers.progress import ProgressMeter
from jobs.trainers.smoke import smoke
from jobs.trainers.task import BadData, Task, Trained
from registry.chat_data import Row, load_rows
from registry.errors import RecipeError
from registry.manifest import read_manifest, write_manifest
from registry.recipe import Train
from registry.sampling import pick_rows

# What of a saved adapter is kept: never TRL's training_args.bin, which is a pickle.
ADAPTER_FILES = ["adapter_model.safetensors", "adapter_config.json"]
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
EVAL_ROWS = 48
# The recipe's names, and transformers' for them; the 8-bit ones are bitsandbytes', which has them for GPUs.
OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


def train(task: Task) -> Trained:
    _refuse_on_cpu(task.recipe.train)
    transformers_logging.disable_progress_bar()  # its bars fill log.txt with thousands of characters
    tokenizer = AutoTokenizer.from_pretrained(task.base)
    rows = _encoded(task, tokenizer, "train", task.recipe.data.max_train)
    eval_rows = _encoded(task, tokenizer, "eval", EVAL_ROWS)
    model = _adapted_model(task)
    if task.recipe.train.packing:
        check_rows_stay_apart(model)
        rows = pack(rows, task.recipe.train.max_length)

    def make(rows: Dataset, eval_rows: Dataset, watch: TrainerCallback, **arguments: Any) -> SFTTrainer:
        return SFTTrainer(
            model=model,
            args=_arguments(task, **arguments),
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=[watch],
        )

    checkpoint = _resume_from(task)
    smoked = smoke(task, model, make, rows, eval_rows, _peak_memory) if _smoke_is_due(task, checkpoint) else None
    watch = _Watch(task, ProgressMeter(task.report))
    if smoked and (reason := task.stop()):
        trained = Trained(_steps_of(checkpoint), 0, None, None, _peak_memory(), reason)
    else:
        trained = _long_run(task, make(rows, eval_rows, watch), watch, checkpoint)
    return replace(trained, longest=max(map(len, rows["input_ids"])), card=_card(), smoke=smoked)


def _long_run(task: Task, trainer: SFTTrainer, watch: _Watch, checkpoint: str | None) -> Trained:
    seconds = 0.0
    if checkpoint and (ended := _ended_at(checkpoint)):
        _take(trainer, watch.meter, checkpoint, ended)
    else:
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.monotonic() - began - watch.eval_seconds
    state = trainer.state
    unfinished = task.stop() if state.global_step < state.max_steps else None
    if unfinished is None:
        _save_adapter(task, trainer.model)
    losses = [line for line in state.log_history if "loss" in line]
    counted = [line["num_tokens"] for line in state.log_history if "num_tokens" in line]
    evals = [line["eval_loss"] for line in state.log_history if "eval_loss" in line]
    return Trained(
        steps=state.global_step,
        tokens=int(counted[-1]) if counted else 0,
        loss=losses[-1]["loss"] if losses else None,
        eval_loss=evals[-1] if evals else None,
        peak_memory=_peak_memory(),
        stopped=unfinished,
        seconds=seconds,
    )


def fingerprint(task: Task) -> dict[str, Any]:
    chats = [row.messages for row in load_rows(task.job.data / "eval.jsonl")]
    return make_fingerprint(
        base=_load_base(task, quantize=task.recipe.train.quantize),
        plain_base=lambda: _load_base(task, quantize="none"),
        adapter=task.job.work / "adapter",
        tokenizer=AutoTokenizer.from_pretrained(task.base),
        chats=chats,
        precision=task.recipe.train.quantize,
    )


def _refuse_on_cpu(train: Train) -> None:
    if train.optimizer != "adamw" and not _on_gpu():
        raise RecipeError(
            f"train.optimizer {train.optimizer} needs a GPU, and this job is on a CPU",
            fix="set train.optimizer to adamw, or `card` to one with a GPU",
        )


def _adapted_model(task: Task) -> Any:
    train, lora = task.recipe.train, task.recipe.train.lora
    torch.manual_seed(train.seed)
    base = _load_base(task, quantize=train.quantize)
    _keep_gradients(base)
    # It casts what is not quantized to float32, which makes a step on a CPU a third longer.
    if train.quantize == "nf4" and _on_gpu():
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=train.checkpointing)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if lora.targets == "all-linear" else list(lora.targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def _keep_gradients(base: Any) -> None:
    # On a CPU with AVX512-BF16 bitsandbytes repacks 4-bit layers at the first evaluation, for a kernel without a
    # gradient: whatever was trained after it learned through the adapters alone.
    for layer in base.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _load_base(task: Task, *, quantize: str) -> Any:
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        # Saves 0.4 bits a weight; on a CPU unpacking it twice makes a step a quarter longer.
        bnb_4bit_use_double_quant=_on_gpu(),
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        task.base,
        dtype=torch.bfloat16,
        quantization_config=nf4 if quantize == "nf4" else None,
        device_map={"": 0 if _on_gpu() else "cpu"},
    )


def _arguments(task: Task, **others: Any) -> SFTConfig:
    """What the recipe says, with `others` in its place."""
    train = task.recipe.train
    said: dict[str, Any] = {
        "output_dir": str(task.job.work / "trainer"),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.batch,
        "per_device_eval_batch_size": train.batch,
        "gradient_accumulation_steps": train.accumulate,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": train.warmup,
        "max_length": None,  # checked row by row in _encoded: a cut row would train on half an answer
        "optim": OPTIMIZERS[train.optimizer],
        "gradient_checkpointing": _on_gpu() and train.checkpointing,
        "bf16": True,
        "use_cpu": not _on_gpu(),
        "seed": train.seed,
        "data_seed": train.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would replace a loss that is no number, and ProgressMeter never see it
        "save_strategy": "steps",
        "save_steps": train.checkpoint_steps,
        "eval_strategy": "epoch",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "include_num_input_tokens_seen": "no",
    }
    return SFTConfig(**{**said, **(ARGUMENTS if train.packing else {}), **others})


def _encoded(task: Task, tokenizer: Any, split: str, most: int | None) -> Dataset:
    """The split's rows as input_ids and labels. Raises BadData with the numbers of the rows that do not fit."""
    rows = load_rows(task.job.data / f"{split}.jsonl")
    numbers = {id(row): number for number, row in enumerate(rows, 1)}
    picked = pick_rows(rows, most, task.recipe.train.seed)
    encoded = [_encoded_row(tokenizer, row, f"{split}.jsonl: row {numbers[id(row)]}") for row in picked]
    limit = task.recipe.train.max_length
    lengths = [len(each.input_ids) for each in encoded]
    long = [(numbers[id(row)], length) for row, length in zip(picked, lengths, strict=True) if length > limit]
    if long:
        raise BadData(
            f"{split}.jsonl: {len(long)} rows are longer than train.max_length {limit} "
            f"(the first is row {long[0][0]} with {long[0][1]} tokens; the longest has {max(lengths)}): "
            f"set train.max_length to {max(lengths)}, or shorten them"
        )
    return _dataset(encoded)


def _encoded_row(tokenizer: Any, row: Row, place: str) -> Encoded:
    try:
        return encode(tokenizer, row.messages)
    except ValueError as error:
        raise BadData(f"{place}: {error}") from error


def _dataset(encoded: list[Encoded]) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [each.input_ids for each in encoded], "labels": [each.labels for each in encoded]}
    )


def _resume_from(task: Task) -> str | None:
    complete = task.job.complete_checkpoints()
    return str(complete[0]) if complete else None


def _smoke_is_due(task: Task, checkpoint: str | None) -> bool:
    """Not where a checkpoint shows that this batch fits this card; a retry changes the batch, a new pod the card."""
    if not task.recipe.train.smoke or (checkpoint and _ended_at(checkpoint)):
        return False
    made = read_manifest(Path(checkpoint)) if checkpoint else None
    return made is None or _batch_and_card(task) != {name: made.get(name) for name in ("batch", "card")}


def _batch_and_card(task: Task) -> dict[str, Any]:
    return {"batch": task.recipe.train.batch, "card": _card()}


def _steps_of(checkpoint: str | None) -> int:
    made = read_manifest(Path(checkpoint)) if checkpoint else None
    return int(made["step"]) if made else 0


def _ended_at(checkpoint: str) -> TrainerState | None:
    """The state of a checkpoint of the last step. From such a one transformers 5 would train one step more."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    return state if state.global_step >= state.max_steps else None


def _take(trainer: SFTTrainer, meter: ProgressMeter, checkpoint: str, ended: TrainerState) -> None:
    """The checkpoint's adapter and state as they are; what may be missing is the evaluation after the last step."""
    trainer.model.load_adapter(checkpoint, "default", is_trainable=True)
    trainer.state = ended
    meter.begin(ended.global_step, ended.max_steps)
    trainer.evaluate()


def _save_adapter(task: Task, model: Any) -> None:
    target, raw = task.job.work / "adapter", task.job.work / "saved"
    for folder in (target, raw):
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(raw)
    target.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.move(raw / name, target / name)
    _name_base(target / "adapter_config.json", task)
    for name in TOKENIZER_FILES:
        if (task.base / name).is_file():
            shutil.copyfile(task.base / name, target / name)
    shutil.rmtree(raw)


def _name_base(config: Path, task: Task) -> None:
    """PEFT writes the base's path on this machine; what identifies the base is its source and digest."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = task.recipe.base.model
    config.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Reports progress, keeps complete checkpoints, and stops when asked to."""

    def __init__(self, task: Task, meter: ProgressMeter) -> None:
        self.task, self.meter, self.eval_seconds = task, meter, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.begin(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.meter.log(state.global_step, logs or {}, _peak_memory())

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self.eval_seconds += metrics.get("eval_runtime", 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.task.stop():
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.task.stop():
            control.should_evaluate = False  # an evaluation would only delay the stop

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        target = self.task.job.checkpoints / f"{self.task.epoch:04d}-{state.global_step}"
        if saved.is_dir() and not target.exists():
            # Nobody takes these steps again: what a trainer killed just after this had not shipped would be lost.
            self.task.ship()
            write_manifest(saved, step=state.global_step, **_batch_and_card(self.task))
            target.parent.mkdir(exist_ok=True)
            saved.replace(target)
            self.task.job.prune_checkpoints(keep=2)


def _on_gpu() -> bool:
    return bool(torch.cuda.is_available())


def _card() -> str:
    return str(torch.cuda.get_device_name(0)) if _on_gpu() else "cpu"


def _peak_memory() -> int:
    """Bytes: of the card's allocator on a GPU, of this process elsewhere."""
    if _on_gpu():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
