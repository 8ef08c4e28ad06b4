"""A host that only serves has neither the engine of runs nor a training stack: registry and serving ask for neither."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import run_bounded

ROOT = Path(__file__).parent.parent
ABSENT = ("dbos", "torch", "trl", "transformers", "peft", "bitsandbytes", "datasets", "huggingface_hub", "gguf")
IMPORT = """
import importlib, json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r} on a host that only serves", name=name)

ABSENT = json.loads(sys.argv[1])
sys.meta_path.insert(0, Absent())
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
print(sorted(set(ABSENT) & set(sys.modules)), [room for room in ("jobs", "cli") if room in sys.modules])
"""


def modules(room: str) -> list[str]:
    found = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / room).rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in found)


@pytest.mark.parametrize("room", ["registry", "serving"])
def test_every_module_is_imported_without_what_trains(room: str) -> None:
    assert len(modules(room)) > 5
    command = [sys.executable, "-c", IMPORT, json.dumps(ABSENT), json.dumps(modules(room))]
    done = run_bounded(command, 120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] []"


def test_what_is_absent_there_cannot_be_imported() -> None:
    """Else the test above would show nothing."""
    done = run_bounded([sys.executable, "-c", IMPORT, json.dumps(ABSENT), '["jobs.trainers.fingerprint"]'], 60)
    assert done.returncode != 0
    assert "No module named 'torch' on a host that only serves" in done.stderr
