"""Token lengths of a dataset version: as the trainer counts them, once, and estimated where nobody can count."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.token_histogram import estimate, look, tokenizer_digest
from jobs.trainers.chat_tokens import encode
from registry.base_models import BaseModel
from registry.chat_data import Row, load_rows, write_rows
from registry.dataset_versions import store_version, track
from registry.errors import BaseModelError, DataError
from registry.histogram import lengths_of
from registry.project import Project
from registry.recipe import Recipe
from tests.conftest import TinyBase, run_bounded
from tests.dvc_projects import chat, make_project, write_splits
from tests.fakes.hub import REVISION, HubModel, files_of, running_hub

NOBODY = "a program that is not there"
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there
# HF_ENDPOINT is read when huggingface_hub is imported.
LOOK = """
import json, sys
from jobs.token_histogram import look
from registry.project import find_project
from registry.recipe import Recipe
found = look(find_project(), Recipe(**json.loads(sys.argv[1])))
print(json.dumps({"note": found.note, "config": found.config, **found.histogram.as_dict()}))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with the dataset `tickets` and a cache that is all its own."""
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "cache"))
    made = make_project(tmp_path / "project")
    store_version(made, "tickets", write_splits, replace=False)
    return made


@pytest.fixture
def base(tiny_base: TinyBase, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may change."""
    return Path(shutil.copytree(tiny_base.folder, tmp_path / "base"))


def recipe(base: str | Path) -> Recipe:
    return Recipe(
        kind="finetune", name="tickets", model="tickets", base={"model": str(base)},
        data={"path": "datasets/tickets"}, evaluate={"task": "label"},
    )  # fmt: skip


def rows_of(project: Project, split: str) -> list[Row]:
    return load_rows(project.root / "datasets" / "tickets" / f"{split}.jsonl")


def test_rows_are_as_long_as_the_trainer_makes_them_and_are_counted_once(own: Project, base: Path) -> None:
    from transformers import AutoTokenizer

    said: list[str] = []
    counted = look(own, recipe(base), say=said.append)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for split, lengths in counted.histogram.splits.items():
        assert lengths == lengths_of(len(encode(tokenizer, row.messages).input_ids) for row in rows_of(own, split))
    assert counted.histogram.splits["train"].longest > 10
    assert (counted.note, counted.histogram.estimated) == ("", False)
    assert counted.config == json.loads((base / "config.json").read_text())
    assert said == ["counting the tokens of 9 rows, once for this version of datasets/tickets"]
    assert look(own, recipe(base), python=NOBODY, say=said.append) == counted
    assert len(said) == 1


def test_another_version_of_the_data_is_counted_and_untracked_changes_are_refused(own: Project, base: Path) -> None:
    first = look(own, recipe(base)).histogram
    write_splits(own.root / "datasets" / "tickets", word="a rather longer greeting than before", rows=4)
    with pytest.raises(DataError, match="changed since it was last tracked"):
        look(own, recipe(base))
    track(own, "datasets/tickets")
    second = look(own, recipe(base)).histogram
    assert second.splits["train"].mean > first.splits["train"].mean
    assert second.dataset != first.dataset


def test_a_dataset_whose_folder_is_not_here_is_counted_from_the_cache_of_dvc(own: Project, base: Path) -> None:
    shutil.rmtree(own.root / "datasets" / "tickets")
    assert look(own, recipe(base)).histogram.splits["train"].rows == 3
    assert list((own.home / "tmp").iterdir()) == []
    assert not look(own, recipe(base), python=NOBODY).histogram.estimated


def test_a_changed_chat_template_is_another_tokenizer(base: Path) -> None:
    before = tokenizer_digest(base)
    assert tokenizer_digest(base) == before
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    assert tokenizer_digest(base) != before


def test_a_row_that_the_chat_template_cannot_take_is_named_before_anything_is_spent(own: Project, base: Path) -> None:
    folder = own.root / "datasets" / "tickets"
    long = Row([*chat("first", "one").messages, *chat("second", "two").messages])
    write_rows(folder / "eval.jsonl", [chat("short", "yes"), long])
    track(own, "datasets/tickets")
    only_last = "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    (base / "chat_template.jinja").write_text(only_last, encoding="utf-8")
    with pytest.raises(DataError, match=r"eval\.jsonl: row 2: the chat template changes earlier turns"):
        look(own, recipe(base))


def test_without_a_program_that_counts_lengths_are_estimated_and_it_says_so(own: Project, base: Path) -> None:
    found = look(own, recipe(base), python=NOBODY)
    assert found.histogram.estimated
    assert "cannot be counted" in found.note
    assert found.config is not None
    assert not (own.cache / "histograms").exists(), "an estimate is not kept"
    assert not look(own, recipe(base)).histogram.estimated


def test_an_environment_without_transformers_leads_to_an_estimate(own: Project, base: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: transformers' >&2\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    found = look(own, recipe(base), python=str(python))
    assert (found.histogram.estimated, found.note) == (
        True, "the tokens cannot be counted: ModuleNotFoundError: transformers",
    )  # fmt: skip


def test_a_model_that_brings_its_own_code_is_refused(own: Project, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(BaseModelError, match="Python code of its own"):
        look(own, recipe(base))


def looked(project: Project, endpoint: str, model: str) -> dict[str, Any]:
    env = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    body = recipe(model).model_dump_json()
    done = run_bounded([sys.executable, "-c", LOOK, body], 120, env=env, cwd=project.root)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_of_a_model_of_the_hub_only_small_files_are_fetched_once(own: Project, tiny_base: TinyBase) -> None:
    files = {**files_of(tiny_base.folder), "pytorch_model.bin": b"a pickle", "README.md": b"about"}
    with running_hub({"org/tiny": HubModel(files)}) as hub:
        found = looked(own, hub.url, "org/tiny")
        fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert (found["note"], found["estimated"]) == ("", False)
    assert {"config.json", "tokenizer.json"} <= fetched
    assert not {"model.safetensors", "pytorch_model.bin", "README.md"} & fetched
    kept = own.cache / "tokenizers"
    assert [each.name for each in kept.iterdir()] == [f"hub-org--tiny@{REVISION}"]
    assert looked(own, NOWHERE, "org/tiny") == found


def test_where_the_hub_cannot_be_reached_lengths_are_estimated(own: Project) -> None:
    found = looked(own, NOWHERE, "org/tiny")
    assert (found["estimated"], found["config"]) == (True, None)
    assert found["note"] == "org/tiny is not in the cache, and the hub cannot be reached"
    assert [rows for _, rows in found["splits"]["train"]] == [3]


def test_an_estimate_of_english_is_on_the_safe_side_and_not_far_off(base_model: BaseModel, persons_cache: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(persons_cache / "models" / base_model.folder)
    text = "Good morning. My order of two teapots should have come on Monday, and by now it is Wednesday. " * 8
    row = chat(text, "It was sent on Tuesday, and should be with you by Friday at the latest.")
    assert 1 <= estimate(row) / len(encode(tokenizer, row.messages).input_ids) < 1.4
