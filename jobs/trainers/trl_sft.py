"""Backend `trl`: TRL's SFTTrainer with PEFT; QLoRA (NF4 by bitsandbytes) or LoRA, on a GPU or a CPU."""

from __future__ import annotations

import json
import resource
import shutil
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
from jobs.trainers.progress import ProgressMeter
from jobs.trainers.task import BadData, Task, Trained
from registry.chat_data import Row, load_rows
from registry.manifest import write_manifest
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


def train(task: Task) -> Trained:
    transformers_logging.disable_progress_bar()  # its bars fill log.txt with thousands of characters
    tokenizer = AutoTokenizer.from_pretrained(task.base)
    model = _adapted_model(task)
    meter = ProgressMeter(task.report)
    trainer = SFTTrainer(
        model=model,
        args=_arguments(task),
        train_dataset=_encoded(task, tokenizer, "train", task.recipe.data.max_train),
        eval_dataset=_encoded(task, tokenizer, "eval", EVAL_ROWS),
        processing_class=tokenizer,
        callbacks=[_Watch(task, meter)],
    )
    checkpoint = _resume_from(task)
    if checkpoint and (ended := _ended_at(checkpoint)):
        _take(trainer, meter, checkpoint, ended)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
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


def _adapted_model(task: Task) -> Any:
    train, lora = task.recipe.train, task.recipe.train.lora
    torch.manual_seed(train.seed)
    base = _load_base(task, quantize=train.quantize)
    # It casts what is not quantized to float32, which makes a step on a CPU a third longer.
    if train.quantize == "nf4" and _on_gpu():
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if lora.targets == "all-linear" else list(lora.targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


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


def _arguments(task: Task) -> SFTConfig:
    train = task.recipe.train
    return SFTConfig(
        output_dir=str(task.job.work / "trainer"),
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        per_device_train_batch_size=train.batch,
        per_device_eval_batch_size=train.batch,
        gradient_accumulation_steps=train.accumulate,
        learning_rate=train.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=train.warmup,
        max_length=None,  # checked row by row in _encoded: a cut row would train on half an answer
        optim="adamw_torch",
        gradient_checkpointing=_on_gpu(),
        bf16=True,
        use_cpu=not _on_gpu(),
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would replace a loss that is no number, and ProgressMeter never see it
        save_strategy="steps",
        save_steps=train.checkpoint_steps,
        eval_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        include_num_input_tokens_seen="no",
    )


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
        self.task, self.meter = task, meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.begin(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        self.meter.log(state.global_step, logs or {}, _peak_memory())

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
            write_manifest(saved, step=state.global_step)
            target.parent.mkdir(exist_ok=True)
            saved.replace(target)
            self.task.job.prune_checkpoints(keep=2)


def _on_gpu() -> bool:
    return bool(torch.cuda.is_available())


def _peak_memory() -> int:
    """Bytes: of the card's allocator on a GPU, of this process elsewhere."""
    if _on_gpu():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
