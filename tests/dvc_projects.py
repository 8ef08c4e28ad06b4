"""A real project with real git and DVC, without the demo data: made in a third of a second."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from registry.chat_data import Row
from registry.dvc_repo import quiet
from registry.project import Project


def make_project(root: Path, *, remote: Path | None = None) -> Project:
    """An empty project with git and DVC; the default remote is the folder `remote`."""
    quiet()
    from dvc.repo import Repo

    for folder in ("recipes", "datasets"):
        (root / folder).mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    Repo.init(str(root)).close()
    if remote:
        text = f"[core]\n    remote = there\n['remote \"there\"']\n    url = {remote}\n"
        (root / ".dvc" / "config").write_text(text, encoding="utf-8")
    return Project(root=root, home=root / ".ft", cache=root.parent / "cache")


def chat(question: str, answer: str) -> Row:
    return Row([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def write_splits(folder: Path, word: str = "hello", rows: int = 3) -> None:
    """Three valid splits; another `word` makes other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval", "test"):
        lines = [chat(f"{word} {split} {number}", "yes").as_json() for number in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_csv(path: Path, labels: int = 3, rows: int = 20, word: str = "about") -> Path:
    """`rows` different questions of each of `labels` labels, as columns text and label."""
    lines = [f'"question {n}, {word} {label}",label{label}' for label in range(labels) for n in range(rows)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def questions(path: Path) -> list[str]:
    """The user's words in a JSONL file of chats."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [each["content"] for line in lines for each in json.loads(line)["messages"] if each["role"] == "user"]
