"""A real project (git, DVC) with a dataset of four labels and adapter versions that can be evaluated without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from registry import adapters
from registry.base_models import BaseModel
from registry.cards import list_cards
from registry.chat_data import Row, write_rows
from registry.dataset_versions import Pinned, store_version
from registry.project import Project
from registry.recipe import Finetune, Serve
from registry.store import Store, open_store
from serving.server_keys import write_keys
from serving.server_record import ServerStatus, State, only_server, write_status
from tests.dvc_projects import make_project
from tests.fakes.adapter_folder import lora_arrays, make_adapter
from tests.fakes.answering_engine import KEY

LABELS = ["배송", "환불", "account", "other"]
BASE = BaseModel("org/base", "1", "Apache-2.0", "b" * 64, "org-base@1")
OTHER_BASE = BaseModel("org/other", "1", "Apache-2.0", "d" * 64, "org-other@1")
TEST_ROWS = 24


@dataclass(frozen=True)
class Judged:
    """What a test of evaluation needs."""

    project: Project
    store: Store
    pinned: Pinned

    def recipe(self, **evaluate: Any) -> Finetune:
        section = {"task": "label", "concurrency": 4, **evaluate}
        # Nothing listens there: a tracker that is away must not keep anybody from judging or promoting.
        return Finetune.model_validate({
            "kind": "finetune", "name": "m", "model": "m", "base": {"model": "org/base"},
            "data": {"path": self.pinned.path}, "evaluate": section, "gate": {"may_lose": 0.05},
            "tracking": {"uri": "http://127.0.0.1:9"},
        })  # fmt: skip

    def add(self, number: int, base: BaseModel = BASE, recipe: Finetune | None = None) -> adapters.Version:
        folder = self.project.adapter_folder("m", number)
        make_adapter(folder, lora_arrays(size=16 + number), base=base.digest)
        body = {
            "base": base.as_dict(), "rank": 8, "dataset": asdict(self.pinned),
            "recipe": (recipe or self.recipe()).model_dump(mode="json"),
        }  # fmt: skip
        relative = str(folder.relative_to(self.project.home))
        return adapters.add_version(self.store, "m", number, f"run-{number}", relative, body)

    def unpacked(self) -> Path:
        return self.project.root / self.pinned.path

    @contextmanager
    def server(self, engine_url: str, state: State = "serving") -> Iterator[None]:
        """This project's server as other processes see it: its lock, its row, its keys."""
        card = list_cards()[0].name
        with only_server(self.project, self.store):
            write_keys(self.project, {"engine_url": engine_url, "engine_key": KEY})
            write_status(self.store, ServerStatus(
                pid=1, state=state, reason="", base=BASE.as_dict(), serve=Serve().model_dump(), card=card,
                max_rank=512, gateway_url="http://127.0.0.1:1", engine_url=engine_url,
            ))  # fmt: skip
            yield


def make_judged(root: Path) -> Judged:
    project = make_project(root)
    (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    return Judged(project, open_store(project), store_version(project, "tickets", _write, replace=False))


def question_of(messages: list[dict[str, str]]) -> tuple[int, str]:
    """(number, label) of a question as `_write` made it, also when more was written below it."""
    first = messages[-1]["content"].splitlines()[0]
    _, number, label = first.split()
    return int(number), LABELS[int(label)]


def _write(folder: Path) -> None:
    for split, rows in (("train", 8), ("eval", 4), ("test", TEST_ROWS)):
        write_rows(folder / f"{split}.jsonl", [_row(split, number) for number in range(rows)])


def _row(split: str, number: int) -> Row:
    said = f"{split} {number} {number % len(LABELS)}"
    return Row([{"role": "user", "content": said}, {"role": "assistant", "content": LABELS[number % len(LABELS)]}])


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
