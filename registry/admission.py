"""Admission: what an adapter must be before it is registered, and again before a server loads it.

A folder is let in by what its files contain, never by what they are called: weights are safetensors, all else
is JSON or plain text, so nothing in it can run. The other checks are vLLM's own rules, asked early: what it
would refuse at load time (or silently leave out) is refused here with a reason.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from registry.errors import AdmissionError
from registry.manifest import MANIFEST, broken_files, read_manifest
from registry.recipe import LoraRank

WEIGHTS, CONFIG, TEMPLATE = "adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"
# The only files that an adapter may have. training_args.bin (TRL) and adapter_model.bin are pickles.
ALLOWED = frozenset({
    WEIGHTS, CONFIG, TEMPLATE, MANIFEST,
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "fingerprint.json",
})  # fmt: skip
NEEDED = (MANIFEST, WEIGHTS, CONFIG)
RANKS: tuple[int, ...] = typing.get_args(LoraRank)
MAX_WEIGHTS, MAX_TEXT, MAX_HEADER = 16 << 30, 64 << 20, 8 << 20
TENSOR = re.compile(r"base_model\.model\.((?:[\w-]+\.)*([\w-]+))\.lora_(A|B)\.weight")
# PEFT takes pattern keys as regular expressions; those that could run for minutes, or fail, are no names.
MODULES = re.compile(r"\^?(?:[\w.-]|\\\.){1,200}\$?")
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<u4"), "F16": np.dtype("<u2"), "BF16": np.dtype("<u2")}
# A number is NaN or infinite when all bits of its exponent are set.
EXPONENT = {"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
MAGIC = [
    (b"PK\x03\x04", "a zip archive, as torch.save writes"),
    (b"\x7fELF", "a program"),
    (b"\x1f\x8b", "gzip"),
]
# What PEFT may write freely. Every other key must be off, so that a feature which the server does not know
# (also one that a newer PEFT brings) is refused here; vLLM ignores keys that it does not know.
FREE_KEYS = frozenset({
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
    "fan_in_fan_out", "megatron_core", "qalora_group_size",
})  # fmt: skip

Config = dict[str, Any]


@dataclass(frozen=True)
class Tensor:
    """One entry of the safetensors header; `start` and `end` count bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def admit(folder: Path, base_digest: str, max_rank: int) -> dict[str, Any]:
    """Let in the adapter in `folder`, for the base with that manifest digest and a server of `max_rank`.

    Returns its facts: rank (largest), targets (module names), tensors and parameters (counts), bytes (of all
    files) and template_sha256 (None without a template of its own). Raises AdmissionError with its problems.
    """
    _refuse(folder, _wrong_files(folder))
    _refuse(folder, _wrong_content(folder))
    _refuse(folder, _wrong_origin(folder, base_digest))
    config = json.loads((folder / CONFIG).read_bytes())
    _refuse(folder, _wrong_config(config, max_rank))
    data_start, tensors = _read_header(folder / WEIGHTS)
    _refuse(folder, _wrong_tensors(config, tensors))
    _refuse(folder, _wrong_numbers(folder / WEIGHTS, data_start, tensors))
    return _facts(folder, tensors)


def _refuse(folder: Path, problems: Iterator[str]) -> None:
    found = list(problems)
    if found:
        raise AdmissionError(
            "adapter refused: " + "\n".join(found),
            place=str(folder),
            fix="nothing was loaded from it; train it again, or ask where it came from",
        )


def _wrong_files(folder: Path) -> Iterator[str]:
    if not folder.is_dir():
        yield "no such folder"
        return
    names = set()
    for path in sorted(folder.iterdir()):
        names.add(path.name)
        if path.is_symlink() or not path.is_file():
            yield f"{path.name}: not a plain file"
        elif path.name not in ALLOWED:
            yield f"{path.name}: no file of an adapter{_looks_like(path)}"
        elif path.stat().st_size > (MAX_WEIGHTS if path.name == WEIGHTS else MAX_TEXT):
            yield f"{path.name}: {path.stat().st_size} bytes are too many"
    yield from (f"{name}: missing" for name in NEEDED if name not in names)


def _wrong_content(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        what = _looks_like(path)
        if what:
            yield f"{path.name}: not what its name says{what}"
        elif path.suffix == ".json":
            yield from _wrong_json(path)
        elif path.name == TEMPLATE and not _is_text(path):
            yield f"{path.name}: not UTF-8 text"


def _wrong_json(path: Path) -> Iterator[str]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        yield f"{path.name}: not JSON ({error})"
        return
    if not isinstance(content, dict):
        yield f"{path.name}: not a JSON object"
    elif content.get("auto_map") or content.get("auto_mapping"):
        yield f"{path.name}: names Python code to import (auto_map), which is not run here"


def _wrong_origin(folder: Path, base_digest: str) -> Iterator[str]:
    yield from (f"{name}: differs from {MANIFEST}" for name in broken_files(folder))
    base = (read_manifest(folder) or {}).get("base")
    if base != base_digest:
        yield f"made for the base model {str(base)[:12]}, and this one is {base_digest[:12]}"


def _wrong_config(config: Config, max_rank: int) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}, and only LORA is served"
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        yield f"task_type is {config['task_type']!r}, and only CAUSAL_LM is served"
    if config.get("bias", "none") != "none":
        yield f"bias is {config['bias']!r}, and the server adds none"
    yield from _wrong_ranks(config, max_rank)
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start != "gaussian":
        yield f"init_lora_weights is {start!r}, which changes the base model's weights"
    if not _is_number(config.get("lora_alpha")):
        yield f"lora_alpha is {config.get('lora_alpha')!r}, and must be a positive number"
    on = [key for key, value in config.items() if key not in FREE_KEYS and value]
    yield from (f"{key} is on, which the server does not know" for key in sorted(on))


def _wrong_ranks(config: Config, max_rank: int) -> Iterator[str]:
    pattern, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or not isinstance(alphas, dict):
        yield "rank_pattern and alpha_pattern must be objects"
        return
    for rank in [config.get("r"), *pattern.values()]:
        if type(rank) is not int or rank not in RANKS:
            yield f"rank {rank!r} is none that the server takes: {', '.join(map(str, RANKS))}"
        elif rank > max_rank:
            yield f"rank {rank} is more than this server's {max_rank}"
    for key, alpha in alphas.items():
        if not _is_number(alpha):
            yield f"alpha_pattern.{key} is {alpha!r}, and must be a positive number"
    for key in (*pattern, *alphas):
        if not MODULES.fullmatch(key):
            yield f"'{key}' is no name of modules"


def _wrong_tensors(config: Config, tensors: list[Tensor]) -> Iterator[str]:
    halves: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        found = TENSOR.fullmatch(tensor.name)
        if found is None:
            yield f"{tensor.name}: no LoRA weight of a layer (…lora_A.weight, …lora_B.weight)"
        elif tensor.dtype not in DTYPES:
            yield f"{tensor.name}: type {tensor.dtype}, and adapters are {', '.join(DTYPES)}"
        else:
            halves.setdefault(found[1], {})[found[3]] = tensor
    if not tensors:
        yield f"{WEIGHTS}: no weights in it"
    for module, pair in halves.items():
        yield from _wrong_pair(module, pair, _rank_of(config, module))


def _wrong_pair(module: str, pair: dict[str, Tensor], rank: int) -> Iterator[str]:
    if len(pair) != 2:
        yield f"{module}: lora_{next(iter(pair))} without its other half"
        return
    shapes = pair["A"].shape, pair["B"].shape
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][0] != rank or shapes[1][1] != rank:
        yield f"{module}: shapes {list(shapes[0])} and {list(shapes[1])} do not fit rank {rank}"


def _wrong_numbers(path: Path, data_start: int, tensors: list[Tensor]) -> Iterator[str]:
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=data_start)
    for tensor in tensors:
        bits = data[tensor.start : tensor.end].view(DTYPES[tensor.dtype])
        mask = bits.dtype.type(EXPONENT[tensor.dtype])
        bad = int(np.count_nonzero((bits & mask) == mask))
        if bad:
            yield f"{tensor.name}: {bad} of {bits.size} numbers are NaN or infinite"


def _read_header(path: Path) -> tuple[int, list[Tensor]]:
    """Where the data starts, and the tensors. The library checks sizes, overlaps and holes."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as source:
            length = int.from_bytes(source.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, path.stat().st_size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {path.stat().st_size}")
            header = json.loads(source.read(length))
        with safe_open(path, framework="np"):
            pass
        header.pop("__metadata__", None)
        return 8 + length, [_tensor(name, entry) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise AdmissionError(f"adapter refused: {path.name}: not safetensors ({error})", place=str(path)) from error


def _tensor(name: str, entry: dict[str, Any]) -> Tensor:
    start, end = entry["data_offsets"]
    return Tensor(name, entry["dtype"], tuple(entry["shape"]), start, end)


def _facts(folder: Path, tensors: list[Tensor]) -> dict[str, Any]:
    template = folder / TEMPLATE
    parts = [(TENSOR.fullmatch(each.name), each) for each in tensors]
    modules = {found[2] for found, _ in parts if found}
    return {
        "rank": max(each.shape[0] for found, each in parts if found and found[3] == "A"),
        "targets": sorted(modules),
        "tensors": len(tensors),
        "parameters": sum(math.prod(each.shape) for each in tensors),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "template_sha256": hashlib.sha256(template.read_bytes()).hexdigest() if template.exists() else None,
    }


def _rank_of(config: Config, module: str) -> int:
    """The rank that PEFT gave the module: the first pattern that its name ends with, at a dot."""
    for key, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return int(rank)
    return int(config["r"])


def _looks_like(path: Path) -> str:
    with path.open("rb") as source:
        start = source.read(9)
    # safetensors begin with the header's length, whose bytes may be anything; the header with a brace.
    if path.name == WEIGHTS and start[8:] == b"{":
        return ""
    if start[:1] == b"\x80":
        return " (a pickle: loading it would run code)"
    return next((f" ({what})" for magic, what in MAGIC if start.startswith(magic)), "")


def _is_text(path: Path) -> bool:
    try:
        return "\0" not in path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
