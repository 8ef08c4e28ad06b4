"""`ft data` as a person uses it, in a real project."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from registry import events
from registry.project import Project
from registry.store import open_store
from tests.conftest import run_bounded
from tests.dvc_projects import make_project, questions, write_csv, write_splits

COLUMNS = ["--prompt", "text", "--answer", "label"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path / "p", remote=tmp_path / "remote")


class Ft:
    """The `ft` command in this process, as the console script calls it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        self.monkeypatch.setattr(sys, "argv", ["ft", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = self.capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(end.value.code or 0), out, err)

    def json(self, *arguments: str | Path) -> Any:
        done = self(*arguments, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)


@pytest.fixture
def ft(project: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ft:
    monkeypatch.chdir(project.root)
    return Ft(monkeypatch, capfd)


def test_csv_becomes_a_tracked_version_and_an_event(ft: Ft, project: Project, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", labels=4, rows=20)
    made = ft.json("data", "add", "mine", source, *COLUMNS, "--system", "Name it.")
    folder = project.root / "datasets" / "mine"
    assert made["rows"] == {"train": 64, "eval": 8, "test": 8}
    assert made["labels"] == ["label0", "label1", "label2", "label3"]
    assert made["remote"] == "there"
    assert f"md5: {made['hash']}" in folder.with_name("mine.dvc").read_text(encoding="utf-8")
    assert json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["options"]["prompt"] == "text"
    asked = [question for split in made["rows"] for question in questions(folder / f"{split}.jsonl")]
    assert len(asked) == len(set(asked)) == 80
    (event,) = events.read(open_store(project), type_="dataset.versioned")
    assert (event.source, event.subject, event.data["hash"]) == ("ft/datasets", "datasets/mine", made["hash"])


def test_the_same_import_again_is_the_same_version_and_no_second_event(
    ft: Ft, project: Project, tmp_path: Path
) -> None:
    source = write_csv(tmp_path / "a.csv")
    first = ft.json("data", "add", "mine", source, *COLUMNS)
    again = ft.json("data", "add", "mine", source, *COLUMNS, "--replace")
    other = ft.json("data", "add", "mine", write_csv(source, word="of"), *COLUMNS, "--replace")
    assert first == again
    assert other["hash"] != first["hash"]
    seen = events.read(open_store(project), type_="dataset.versioned")
    assert [event.data["hash"] for event in seen] == [first["hash"], other["hash"]]


def test_a_version_that_was_replaced_is_still_in_dvc(ft: Ft, project: Project, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv")
    first = ft.json("data", "add", "mine", source, *COLUMNS)
    record = (project.root / "datasets" / "mine.dvc").read_bytes()
    ft.json("data", "add", "mine", write_csv(source, word="of"), *COLUMNS, "--replace")
    (project.root / "datasets" / "mine.dvc").write_bytes(record)
    shutil.rmtree(project.root / "datasets" / "mine")
    assert ft.json("data", "list") == [
        {"path": "datasets/mine", "hash": first["hash"], "by": "datasets/mine.dvc", "state": "not pulled"}
    ]
    done = run_bounded([sys.executable, "-m", "dvc", "checkout", "-q"], timeout=60, cwd=project.root)
    assert done.returncode == 0, done.stderr
    assert ft.json("data", "list")[0]["state"] == "ok"


def test_words_for_people(ft: Ft, project: Project, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv")
    source.write_text(source.read_text(encoding="utf-8") + '"QUESTION 0,  about 0",label0\n', encoding="utf-8")
    done = ft("data", "add", "mine", source, *COLUMNS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("datasets/mine: 48 train, 6 eval, 6 test\n")
    assert "left out  1 rows whose question was there already" in done.stdout
    assert "datasets/mine  " in ft("data", "list").stdout
    assert "48 train, 6 eval, 6 test" in ft("data", "check", "mine").stdout
    (project.root / "datasets" / "mine" / "more.txt").write_text("x", encoding="utf-8")
    assert "changed" in ft("data", "list").stdout


def test_an_empty_project_says_how_to_begin(ft: Ft, project: Project) -> None:
    assert "ft data add NAME FILE" in ft("data", "list").stdout


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("text,label\na,b\nc\n", COLUMNS, "a.csv:3: 1 columns, and the header has 2"),
        ("text,label\na,b\n", [], "which columns are question and answer? There are: text, label"),
        ("text,label\na,b\n", ["--prompt", "txt", "--answer", "label"], "no column 'txt'; did you mean 'text'?"),
        ("text,label\na,b\n", [*COLUMNS, "--keep", "label"], "not of the form COLUMN=V1,V2"),
        ("text,label\na,b\n", COLUMNS, "too few rows"),
        ("", COLUMNS, "the file is empty"),
    ],
)
def test_wrong_input_exits_2_and_writes_nothing(
    ft: Ft, project: Project, tmp_path: Path, text: str, more: list[str], said: str
) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    done = ft("data", "add", "mine", tmp_path / "a.csv", *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list((project.root / "datasets").iterdir()) == []


@pytest.mark.parametrize("name", ["Mine", "../mine", "a b", "-x", ".hidden", "a" * 64, "mine\n"])
def test_names_that_are_none(ft: Ft, project: Project, tmp_path: Path, name: str) -> None:
    done = ft("data", "add", "--prompt", "text", "--answer", "label", "--", name, write_csv(tmp_path / "a.csv"))
    assert done.returncode == 2
    assert "is no name for a data set" in done.stderr


def test_broken_chats_are_reported_with_all_their_lines(ft: Ft, project: Project, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"messages": [{"role": "user", "content": "a"}]}\n{\n', encoding="utf-8")
    for command in (["data", "add", "mine", str(source)], ["data", "check", str(source)]):
        done = ft(*command)
        assert done.returncode == 2
        assert f"{source}:1: no assistant turn, so nothing to learn" in done.stderr
        assert f"{source}:2: not valid JSON" in done.stderr


def test_check_takes_names_files_and_folders_and_changes_nothing(ft: Ft, project: Project, tmp_path: Path) -> None:
    write_splits(tmp_path / "loose")
    assert ft.json("data", "check", tmp_path / "loose")["rows"] == {"train": 3, "eval": 3, "test": 3}
    assert ft.json("data", "check", tmp_path / "loose" / "eval.jsonl")["rows"] == {"eval.jsonl": 3}
    assert ft("data", "check", "nothing").returncode == 2
    assert list((project.root / "datasets").iterdir()) == []


def test_it_works_from_a_folder_below_the_project(
    ft: Ft, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_csv(tmp_path / "a.csv")
    monkeypatch.chdir(project.root / "recipes")
    assert ft.json("data", "add", "mine", source, *COLUMNS)["path"] == "datasets/mine"


def test_push_makes_a_version_of_what_was_changed_by_hand(ft: Ft, project: Project, tmp_path: Path) -> None:
    first = ft.json("data", "add", "mine", write_csv(tmp_path / "a.csv"), *COLUMNS)
    train = project.root / "datasets" / "mine" / "train.jsonl"
    train.write_text("\n".join(train.read_text(encoding="utf-8").splitlines()[:-1]) + "\n", encoding="utf-8")
    (pushed,) = ft.json("data", "push", "mine")
    assert pushed["hash"] != first["hash"]
    assert pushed["remote"] == "there"
    assert ft.json("data", "list")[0]["state"] == "ok"
    assert ft.json("data", "push")[0]["hash"] == pushed["hash"]
    told = events.read(open_store(project), type_="dataset.versioned")
    assert [each.data["hash"] for each in told] == [first["hash"], pushed["hash"]]
    shutil.rmtree(project.root / "datasets" / "mine")
    shutil.rmtree(project.root / ".dvc" / "cache")
    assert ft.json("data", "push", "mine")[0]["hash"] == pushed["hash"], "the remote has all of it"


def test_push_refuses_what_could_not_be_trained_on(ft: Ft, project: Project, tmp_path: Path) -> None:
    first = ft.json("data", "add", "mine", write_csv(tmp_path / "a.csv"), *COLUMNS)
    (project.root / "datasets" / "mine" / "train.jsonl").write_text("{}\n", encoding="utf-8")
    done = ft("data", "push", "mine")
    assert done.returncode == 2
    assert "train.jsonl" in done.stderr
    assert ft.json("data", "list")[0]["hash"] == first["hash"]
    assert ft("data", "push", "yours").returncode == 2
