"""The parity probe: does the server say, token by token, what the trainer heard the adapter say?

`fingerprint.json` has prompts, continuations and their logprobs. The server tokenizes the same messages and
scores the same continuations (teacher forcing). Equal generated tokens would be no test: a correct adapter
that was trained in NF4 gives other tokens in bf16 now and then, while a wrong adapter is off by whole nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from registry.errors import AdmissionError

FINGERPRINT = "fingerprint.json"
# Mean |difference of logprob| per token. Seen with a real adapter: bf16 0.006 to 0.04, NF4 0.07 to 0.5,
# bare base or a wrong adapter 4.8 to 5.6.
BF16_TOLERANCE = 0.10
TRAIN_TOLERANCE = 1.0
BASE_SHARE = 0.25
# Below, the adapter hardly differs from its base, so that closeness to it proves nothing.
BF16_TELLING = 2 * BF16_TOLERANCE
TRAIN_TELLING = 2.0

TRAIN_FLOOR = 0.05
HARDLY = "the adapter hardly differs from its base, so closeness to it proves nothing"

Outcome = Literal["pass", "fail", "undecided"]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Logprobs(Part):
    """Natural log, one per continuation token: in training precision, and in bf16 where that was measured."""

    train: list[float]
    bf16: list[float] | None = None


class ChatMessage(Part):
    role: str
    content: str


class Sample(Part):
    messages: list[ChatMessage] = Field(min_length=1)
    prompt_ids: list[int] = Field(min_length=1)
    continuation_ids: list[int]
    logprobs: Logprobs
    base_logprobs: Logprobs

    @model_validator(mode="after")
    def _one_per_token(self) -> Sample:
        for part in (self.logprobs, self.base_logprobs):
            if any(each is not None and len(each) != len(self.continuation_ids) for each in (part.train, part.bf16)):
                raise ValueError("logprobs must be one per continuation token")
        return self


class Fingerprint(Part):
    template_sha256: str
    precision: Literal["nf4", "none"]
    samples: list[Sample] = Field(min_length=1)


@dataclass(frozen=True)
class Measured:
    """What the server said of one sample."""

    prompt_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Parity:
    """The judgement, with the numbers that it rests on."""

    outcome: Outcome
    reason: str
    numbers: dict[str, float | int | None]


class Scorer(Protocol):
    """The part of an engine that the probe needs."""

    in_4_bits: bool

    async def tokenize(self, name: str, messages: list[dict[str, str]]) -> list[int]: ...
    async def prompt_logprobs(self, name: str, token_ids: list[int]) -> list[float]: ...


async def probe(engine: Scorer, name: str, fingerprint: Fingerprint) -> Parity:
    """Measure the loaded adapter `name` and judge it. Raises EngineError if the engine does not answer."""
    measured = [await _measure(engine, name, sample) for sample in fingerprint.samples]
    return judge_parity(fingerprint, measured, in_4_bits=engine.in_4_bits)


def read_fingerprint(folder: Path) -> Fingerprint:
    """Raises AdmissionError if the adapter brings none, or none that can be read."""
    path = folder / FINGERPRINT
    try:
        return Fingerprint.model_validate_json(path.read_bytes())
    except OSError as error:
        raise AdmissionError("no fingerprint.json, so nothing to hold the server to", place=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AdmissionError(f"a broken fingerprint: {where}: {first['msg']}", place=str(path)) from error


def judge_parity(fingerprint: Fingerprint, measured: Sequence[Measured], *, in_4_bits: bool = False) -> Parity:
    """Pure. 'fail' stops a swap; 'undecided' (nothing tells adapter and base apart) is noted and goes on.

    `in_4_bits`: the server's base is quantized, so its distance to bf16 is the quantization's, not its own.
    """
    numbers = _numbers(fingerprint, measured)
    if numbers["prompts_differing"]:
        return Parity("fail", "the server makes other prompt tokens of the same messages", numbers)
    train, bf16 = numbers["train_distance"], numbers["bf16_distance"]
    if train is None:
        empty = not numbers["tokens"]
        return Parity("undecided", HARDLY, numbers) if empty else Parity("fail", "tokens without a score", numbers)
    # What was heard in bf16 decides where it was recorded. The distance to NF4 is then the quantization's, not the
    # server's: a right adapter after four steps of training was 1.07 off, and refused for it.
    if bf16 is not None and not in_4_bits:
        outcome, reason = _against_bf16(bf16, numbers["bf16_base_distance"] or 0.0)
    else:
        outcome, reason = _against_train(train, numbers["train_base_distance"] or 0.0)
    return Parity(outcome, reason, numbers)


async def _measure(engine: Scorer, name: str, sample: Sample) -> Measured:
    prompt = await engine.tokenize(name, [message.model_dump() for message in sample.messages])
    if prompt != sample.prompt_ids or not sample.continuation_ids:
        return Measured(prompt, [])
    scored = await engine.prompt_logprobs(name, sample.prompt_ids + sample.continuation_ids)
    return Measured(prompt, scored[len(sample.prompt_ids) - 1 :])


def _numbers(fingerprint: Fingerprint, measured: Sequence[Measured]) -> dict[str, float | int | None]:
    samples = fingerprint.samples
    served = [value for each in measured for value in each.logprobs]
    train = [value for each in samples for value in each.logprobs.train]
    train_base = [value for each in samples for value in each.base_logprobs.train]
    bf16 = [value for each in samples for value in each.logprobs.bf16 or []]
    bf16_base = [value for each in samples for value in each.base_logprobs.bf16 or []]
    return {
        "samples": len(samples),
        "prompts_differing": sum(a.prompt_ids != b.prompt_ids for a, b in zip(samples, measured, strict=True)),
        "tokens": len(train),
        "train_distance": _distance(served, train),
        "train_base_distance": _distance(train_base, train),
        "bf16_distance": _distance(served, bf16),
        "bf16_base_distance": _distance(bf16_base, bf16),
    }


def _distance(ours: list[float], theirs: list[float]) -> float | None:
    """Mean |difference| per token; None where one of the two was not measured whole."""
    if not theirs or len(ours) != len(theirs):
        return None
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(theirs)


def _against_train(distance: float, base: float) -> tuple[Outcome, str]:
    # Written so that a NaN from the server fails.
    if not distance <= TRAIN_TOLERANCE:
        return "fail", f"off by {distance:.3f} per token against training, more than {TRAIN_TOLERANCE}"
    if distance <= BASE_SHARE * base and base > TRAIN_FLOOR:
        return "pass", f"off by {distance:.3f} per token against training, the bare base by {base:.3f}"
    if base < TRAIN_TELLING:
        return "undecided", HARDLY
    return (
        "fail",
        f"off by {distance:.3f} per token against training, more than a quarter of the base's {base:.3f}",
    )


def _against_bf16(distance: float, base: float) -> tuple[Outcome, str]:
    if not distance <= BF16_TOLERANCE:
        return "fail", f"off by {distance:.3f} per token in bf16, more than {BF16_TOLERANCE}"
    if base < BF16_TELLING:
        return "undecided", HARDLY
    return "pass", f"off by {distance:.3f} per token in bf16, the bare base by {base:.3f}"
