"""Which setting makes a training fit, and by how much: each knob alone, then all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from registry.card_profiles import GIB
from registry.packing import longest, padding
from registry.recipe import LoraRank, Train
from registry.train_memory import Memory

# train, stack, batch, longest
Estimate = Callable[[Train, str, int, int], Memory]
# Less of the time than this is not worth a change of what an update is made of.
WORTH = 0.1


@dataclass(frozen=True)
class Knob:
    """`change`: keys of the recipe's section train (`backend` names another stack); bytes at the expected peak."""

    text: str
    change: dict[str, Any]
    saves_bytes: int
    then_fits: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Settings:
    train: Train
    stack: str
    batch: int
    accumulate: int
    longest: int
    row: int


def find_knobs(train: Train, lengths: Sequence[tuple[int, int]], arranged: tuple[int, int], available: int,
               memory: Estimate, *, stack: str, others: Sequence[str] = ()) -> list[Knob]:  # fmt: skip
    """Those that save something, first those that suffice, then by what they save."""
    most = train.max_length
    now = _Settings(train, stack, *arranged, longest(lengths, most, packed=train.packing), longest(lengths, most))
    turned = [*_turned(now, available, memory), *_other_stacks(now, others), *_shorter(now, lengths, available, memory)]
    before = _of(now, memory)
    knobs = [_knob(text, change, before, _of(to, memory), available) for text, change, to in turned]
    useful = sorted((each for each in knobs if each.saves_bytes > 0), key=lambda each: -each.saves_bytes)
    useful.sort(key=lambda each: not each.then_fits)
    if not any(each.then_fits for each in useful):
        useful += _together(now, before, available, memory)
    return useful


def packing_knob(lengths: Sequence[tuple[int, int]], batch: int, seconds: tuple[float, float],
                 arranged: tuple[int, int], saves_bytes: int) -> Knob | None:  # fmt: skip
    """What packing saves of the time, of a training that fits: `seconds` as it is now and with packs, which fits too in
    batches `arranged` so."""
    saved = 1 - seconds[1] / seconds[0]
    if saved < WORTH:
        return None
    to, each = arranged
    text = (f"packing true with batch {to}, accumulate {each} saves about {saved:.0%} of the time: "
            f"{padding(lengths, batch):.0%} of the tokens are padding now")  # fmt: skip
    return Knob(text, {"packing": True, "batch": to, "accumulate": each}, saves_bytes, True)


def _turned(now: _Settings, available: int, memory: Estimate) -> list[tuple[str, dict[str, Any], _Settings]]:
    train, found = now.train, []
    if now.batch > 1:
        found.append(_smaller_batch(now, available, memory))
    if train.packing:
        found.append(("packing false: padding instead, and more steps", {"packing": False},
                      _with(now, packing=False)))  # fmt: skip
    if not train.checkpointing:
        found.append(("recompute activations: a third slower", {"checkpointing": True},
                      _with(now, checkpointing=True)))  # fmt: skip
    if train.quantize == "none":
        found.append(("hold the base in 4 bits", {"quantize": "nf4"}, _with(now, quantize="nf4")))
    for optimizer in ("adamw_8bit", "paged_adamw_8bit") if train.optimizer == "adamw" else ():
        found.append((f"optimizer {optimizer}", {"optimizer": optimizer}, _with(now, optimizer=optimizer)))
    lower = [rank for rank in get_args(LoraRank) if 8 <= rank < train.lora.rank]
    if lower:
        rank = lower[-1]
        lora = train.lora.model_copy(update={"rank": rank})
        found.append((f"rank {rank} in place of {train.lora.rank}", {"lora": {"rank": rank}}, _with(now, lora=lora)))
    return found


def _smaller_batch(now: _Settings, available: int, memory: Estimate) -> tuple[str, dict[str, Any], _Settings]:
    """The largest that fits and divides the effective batch, which stays what it is."""
    effective = now.batch * now.accumulate
    smaller = [batch for batch in range(now.batch - 1, 0, -1) if effective % batch == 0]
    options = [replace(now, batch=batch, accumulate=effective // batch) for batch in smaller]
    to = next((each for each in options if _of(each, memory).high <= available), options[-1])
    change = {"batch": to.batch, "accumulate": to.accumulate}
    return f"batch {to.batch} with accumulate {to.accumulate}: the effective batch stays {effective}", change, to


def _other_stacks(now: _Settings, others: Sequence[str]) -> list[tuple[str, dict[str, Any], _Settings]]:
    return [
        (f"train with {other}", {"backend": other}, replace(now, stack=other)) for other in others if other != now.stack
    ]


def _shorter(now: _Settings, lengths: Sequence[tuple[int, int]], available: int,
             memory: Estimate) -> list[tuple[str, dict[str, Any], _Settings]]:  # fmt: skip
    """The most tokens a row that fit, and how many rows are longer."""
    low, high = 0, now.longest
    while high - low > 16:
        middle = (low + high) // 2
        fits = memory(now.train, now.stack, now.batch, middle).high <= available
        low, high = (middle, high) if fits else (low, middle)
    most = low // 16 * 16
    if most < 16 or most >= now.longest:
        return []
    rows = sum(count for length, count in lengths if most < length <= now.row)
    text = f"max_length {most}: {rows} of {sum(count for _, count in lengths)} rows are longer, and must be shortened"
    text = text if rows else f"max_length {most}: no row is longer"
    return [(text, {"max_length": most}, replace(now, longest=most, row=min(most, now.row)))]


def _together(now: _Settings, before: Memory, available: int, memory: Estimate) -> list[Knob]:
    """The least harmful order until it fits: batch, no packs, checkpointing, 4 bits, the optimizer; rank and length
    stay."""
    change: dict[str, Any] = {}
    to = now
    for update in ({"packing": False}, {"checkpointing": True}, {"quantize": "nf4"}, {"optimizer": "paged_adamw_8bit"}):
        key, value = next(iter(update.items()))
        if getattr(now.train, key) != value and not (key == "optimizer" and now.train.optimizer != "adamw"):
            change[key], to = value, _with(to, **update)
        if to.batch > 1 or now.batch > 1:
            began = replace(to, batch=now.batch, accumulate=now.accumulate)
            _, batches, to = _smaller_batch(began, available, memory)
            change |= batches
        if change and _of(to, memory).high <= available:
            break
    if len(change) <= 1 or set(change) == {"batch", "accumulate"}:
        return []
    words = ", ".join(f"{key} {value}" for key, value in change.items())
    return [_knob(f"together: {words}", change, before, _of(to, memory), available)]


def _knob(text: str, change: dict[str, Any], before: Memory, after: Memory, available: int) -> Knob:
    saved = before.total - after.total
    fits = after.high <= available
    end = "then it fits" if fits else f"then {after.high / GIB:.1f} GiB, still too much"
    return Knob(f"{text} (saves {saved / GIB:.1f} GiB; {end})", change, saved, fits)


def _of(settings: _Settings, memory: Estimate) -> Memory:
    return memory(settings.train, settings.stack, settings.batch, settings.longest)


def _with(now: _Settings, **update: Any) -> _Settings:
    tokens = now.row if update.get("packing") is False else now.longest
    return replace(now, train=now.train.model_copy(update=update), longest=tokens)
