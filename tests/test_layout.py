"""The rooms: what lies where, what no file may contain, and what is generated from the code."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.recipe_kinds import recipe_schema

ROOT = Path(__file__).parent.parent
ROOMS = ("cli", "jobs", "serving", "registry")
TOP = {
    ".ci", ".dvc", ".dvcignore", ".env.example", ".github", ".gitignore",
    "AGENTS.md", "CHANGELOG.md", "LICENSE", "Makefile", "README.ko.md", "README.md",
    "cli", "constraints.txt", "datasets", "docs", "dvc.lock", "dvc.yaml", "jobs", "params.yaml", "pyproject.toml",
    "recipes", "registry", "serving", "tests",
}  # fmt: skip
# Modules of ours named like one of these are harmless by absolute import, and fatal when run as a script.
LIBRARIES = {
    "accelerate", "aiohttp", "axolotl", "bitsandbytes", "boto3", "datasets", "dbos", "dvc", "gguf", "hypothesis",
    "jsonschema", "mlflow", "numpy", "pandas", "peft", "psycopg", "pydantic", "pynvml", "pytest", "requests", "rich",
    "runpod", "safetensors", "sqlalchemy", "tokenizers", "torch", "transformers", "trl", "typer", "unsloth", "uv",
    "uvicorn", "uvloop", "vllm", "yaml",
}  # fmt: skip
# Said in pieces, so that this file does not hold what it looks for.
MACHINES = [r"/" + r"root\b", r"/" + r"work/", r"/" + r"opt/", r"/" + r"home/\w", r"/Users/\w", r"/tmp/\w*probe",
            r"pyp" + r"i\.org/simple", r"index-" + r"url\s*[=:]\s*\S", r"download\.pytorch"]  # fmt: skip


def tracked() -> list[Path]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def modules(room: str) -> list[Path]:
    return [path for path in (ROOT / room).rglob("*.py") if "templates" not in path.parts]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_top_has_the_rooms_and_nothing_else() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert found == TOP


def test_what_people_write_is_no_package() -> None:
    for folder in ("recipes", "datasets"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert [path for path in (ROOT / "recipes").rglob("*") if path.suffix not in (".yaml", "")] == []


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_every_folder_of_code_is_a_package(room: str) -> None:
    folders = {path.parent for path in modules(room)}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_no_module_has_the_name_of_a_library() -> None:
    taken = LIBRARIES | set(sys.stdlib_module_names)
    found = {path.relative_to(ROOT).as_posix() for room in ROOMS for path in modules(room) if path.stem in taken}
    assert found == set()


def test_tests_lie_in_the_room_that_they_test() -> None:
    rooms = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert rooms <= {*ROOMS, "flows", "fakes", "bench"}


def test_no_file_names_a_machine() -> None:
    pattern = re.compile("|".join(MACHINES))
    found = []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # a picture
            continue
        found += [f"{path.relative_to(ROOT)}:{number}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    assert found == []


def test_the_trainer_knows_no_engine_of_runs() -> None:
    trainer = [ROOT / "jobs" / "trainer.py", *(ROOT / "jobs" / "trainers").rglob("*.py")]
    assert [path.name for path in trainer if any(name.split(".")[0] == "dbos" for name in imported(path))] == []


def test_calls_go_down() -> None:
    """import-linter checks it too, in `make check`; this says it where the suite runs without it."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for level, room in enumerate(ROOMS)
        for path in modules(room)
        for name in imported(path)
        if name.split(".")[0] in ROOMS[:level]
    ]
    assert wrong == []


def test_the_schema_in_the_docs_is_the_codes() -> None:
    written = json.loads((ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert written == recipe_schema(), "make it again: `make docs`"


def test_nothing_of_ours_is_mocked() -> None:
    wrong = [path.name for path in modules("tests") if any(name.startswith("unittest") for name in imported(path))]
    assert wrong == []
