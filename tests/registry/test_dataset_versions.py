"""Dataset versions with real git and DVC: pinned by hash, handed out byte for byte, never half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from registry.dataset_versions import Pinned, content, hash_of, materialise, pin, push, store_version
from registry.dvc_repo import cached_path, opened
from registry.errors import Conflict, DataError, Trouble
from registry.project import Project
from registry.tracked_data import tracked_datasets
from tests.dvc_projects import make_project, write_splits


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path / "p", remote=tmp_path / "remote")


def writing(word: str) -> Callable[[Path], None]:
    return lambda folder: write_splits(folder, word)


def add(project: Project, word: str = "hello", *, replace: bool = False) -> Pinned:
    return store_version(project, "mine", writing(word), replace=replace)


def drop_cache(project: Project) -> None:
    shutil.rmtree(project.root / ".dvc" / "cache")


def leftovers(project: Project) -> list[str]:
    return sorted(each.name for each in (project.root / "datasets").iterdir())


def test_a_version_is_tracked_and_pinned_by_dvcs_own_hash(project: Project) -> None:
    version = add(project)
    record = (project.root / "datasets" / "mine.dvc").read_text(encoding="utf-8")
    assert f"md5: {version.hash}" in record
    assert version.path == "datasets/mine"
    assert version.rows == {"train": 3, "eval": 3, "test": 3}
    assert sorted(version.files) == ["eval.jsonl", "test.jsonl", "train.jsonl"]
    assert leftovers(project) == [".gitignore", "mine", "mine.dvc"]
    assert pin(project, "./datasets/mine/") == version
    assert Pinned(**json.loads(json.dumps(asdict(version)))) == version


def test_our_hash_is_dvcs_hash_with_folders_and_other_alphabets(project: Project) -> None:
    folder = project.root / "datasets" / "odd"
    write_splits(folder)
    for name in ("b/ü.txt", "b.txt", "b/a/ 1.txt", "B"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    with opened(project.root) as repo:
        (stage,) = repo.add(str(folder))
    assert hash_of(content(folder)) == stage.outs[0].hash_info.value == pin(project, "datasets/odd").hash


def test_files_that_dvc_ignores_do_not_count(project: Project) -> None:
    (project.root / ".dvcignore").write_text("*.swp\n", encoding="utf-8")
    version = add(project)
    (project.root / "datasets" / "mine" / "x.swp").write_text("x", encoding="utf-8")
    assert pin(project, "datasets/mine") == version


def test_a_changed_working_copy_is_refused(project: Project) -> None:
    add(project)
    write_splits(project.root / "datasets" / "mine", "other")
    with pytest.raises(DataError, match="changed since it was last tracked") as caught:
        pin(project, "datasets/mine")
    assert "`dvc add datasets/mine`" in caught.value.fix


def test_broken_rows_are_found_when_pinned(project: Project) -> None:
    folder = project.root / "datasets" / "mine"
    write_splits(folder)
    (folder / "test.jsonl").write_text("{\n", encoding="utf-8")
    with opened(project.root) as repo:
        repo.add(str(folder))
    with pytest.raises(DataError, match=r"test\.jsonl:1: not valid JSON"):
        pin(project, "datasets/mine")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("datasets/mime", "did you mean datasets/mine"),
        ("datasets/loose", "`dvc add datasets/loose`"),
        ("../elsewhere", "outside of the project"),
        ("/etc", "outside of the project"),
        ("datasets/unmade", "`dvc repro` makes it"),
    ],
)
def test_a_dataset_that_is_not_tracked_is_refused_with_the_next_step(project: Project, path: str, said: str) -> None:
    add(project)
    write_splits(project.root / "datasets" / "loose")
    (project.root / "dvc.yaml").write_text("stages: {s: {cmd: x, outs: [datasets/unmade]}}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        pin(project, path)
    assert said in str(caught.value)


def test_the_pinned_bytes_are_handed_out_after_the_working_copy_went_on(project: Project, tmp_path: Path) -> None:
    first = add(project)
    second = add(project, "other", replace=True)
    assert first.hash != second.hash
    for version, target in ((first, tmp_path / "a" / "data"), (second, tmp_path / "b")):
        materialise(project, version, target)
        assert content(target) == version.files
        assert [each.name for each in target.parent.iterdir() if "partial" in each.name] == []


def test_a_target_that_is_right_is_left_alone_and_a_wrong_one_made_right(project: Project, tmp_path: Path) -> None:
    version, target = add(project), tmp_path / "data"
    materialise(project, version, target)
    inode = (target / "train.jsonl").stat().st_ino
    materialise(project, version, target)
    assert (target / "train.jsonl").stat().st_ino == inode
    (target / "train.jsonl").write_text("x", encoding="utf-8")
    (target / "more").write_text("x", encoding="utf-8")
    materialise(project, version, target)
    assert content(target) == version.files


def test_what_is_handed_out_is_no_link_into_the_cache(project: Project, tmp_path: Path) -> None:
    version, target = add(project), tmp_path / "data"
    materialise(project, version, target)
    (target / "train.jsonl").write_text("x", encoding="utf-8")
    materialise(project, version, tmp_path / "again")
    assert content(tmp_path / "again") == version.files


def test_bytes_come_from_the_remote_where_cache_and_folder_are_gone(project: Project, tmp_path: Path) -> None:
    first = add(project)
    assert push(project, first) == "there"
    second = add(project, "other", replace=True)
    push(project, second)
    drop_cache(project)
    shutil.rmtree(project.root / "datasets" / "mine")
    assert pin(project, "datasets/mine") == second
    assert not (project.root / "datasets" / "mine").exists()
    materialise(project, first, tmp_path / "data")  # an older version, which no record of the project names now
    assert content(tmp_path / "data") == first.files


def test_a_broken_object_of_the_cache_is_replaced_by_the_remotes(project: Project, tmp_path: Path) -> None:
    version = add(project)
    push(project, version)
    shutil.rmtree(project.root / "datasets" / "mine")
    with opened(project.root) as repo:
        broken = cached_path(repo, version.files["train.jsonl"])
    broken.chmod(0o644)
    broken.write_text("bits rot", encoding="utf-8")
    broken.chmod(0o444)  # which makes DVC trust it
    materialise(project, version, tmp_path / "data")
    assert content(tmp_path / "data") == version.files


def test_bytes_that_nobody_has_are_an_error_and_leave_nothing(project: Project, tmp_path: Path) -> None:
    version = add(project)
    drop_cache(project)
    materialise(project, version, tmp_path / "data")  # the working copy has them still
    shutil.rmtree(project.root / "datasets" / "mine")
    with pytest.raises(DataError, match="neither here nor in DVC's cache or remote"):
        pin(project, "datasets/mine")
    with pytest.raises(DataError, match="neither in DVC's cache nor in its remote"):
        materialise(project, version, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert [each.name for each in tmp_path.iterdir() if "partial" in each.name] == []


def test_without_a_remote_a_version_is_kept_and_lost_data_are_an_error(tmp_path: Path) -> None:
    alone = make_project(tmp_path / "alone")
    version = add(alone)
    assert push(alone, version) is None
    drop_cache(alone)
    shutil.rmtree(alone.root / "datasets" / "mine")
    with pytest.raises(DataError, match="neither here nor in DVC's cache or remote"):
        pin(alone, "datasets/mine")


def test_a_listing_that_points_outside_is_refused(project: Project, tmp_path: Path) -> None:
    version = add(project)
    evil = Pinned(version.path, version.hash, {"../../evil": version.files["train.jsonl"]}, {})
    with pytest.raises(DataError, match="outside of itself"):
        materialise(project, evil, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_name_that_is_there_needs_replace(project: Project) -> None:
    version = add(project)
    with pytest.raises(Conflict, match="is there already"):
        add(project, "other")
    assert pin(project, "datasets/mine") == version


def test_untracked_changes_and_folders_are_never_overwritten(project: Project) -> None:
    add(project)
    write_splits(project.root / "datasets" / "mine", "by hand")
    with pytest.raises(Conflict, match="changes that DVC does not know"):
        add(project, "other", replace=True)
    assert "by hand" in (project.root / "datasets" / "mine" / "train.jsonl").read_text(encoding="utf-8")
    write_splits(project.root / "datasets" / "loose")
    with pytest.raises(Conflict, match="DVC does not track it"):
        store_version(project, "loose", writing("x"), replace=True)
    (project.root / "dvc.yaml").write_text("stages: {s: {cmd: x, outs: [datasets/made]}}\n", encoding="utf-8")
    with pytest.raises(Conflict, match=r"made by a stage of dvc\.yaml"):
        store_version(project, "made", writing("x"), replace=True)


def test_nothing_changes_when_writing_or_tracking_fails(project: Project) -> None:
    version = add(project)

    def half(folder: Path) -> None:
        write_splits(folder, "half")
        raise OSError(28, "No space left on device")

    with pytest.raises(Trouble, match="No space left on device"):
        store_version(project, "mine", half, replace=True)
    (project.root / ".dvc" / "config").write_text("[core\n", encoding="utf-8")  # DVC cannot start
    with pytest.raises(DataError, match="DVC:"):
        add(project, "other", replace=True)
    with pytest.raises(DataError, match="DVC:"):
        store_version(project, "new", writing("x"), replace=False)
    (project.root / ".dvc" / "config").write_text("", encoding="utf-8")
    assert pin(project, "datasets/mine") == version
    assert leftovers(project) == [".gitignore", "mine", "mine.dvc"]
    assert (project.root / "datasets" / ".gitignore").read_text(encoding="utf-8").split() == ["/mine"]


def test_the_records_are_as_before_when_tracking_fails_at_its_very_end(project: Project) -> None:
    with opened(project.root) as repo, repo.config.edit() as config:
        config["core"]["autostage"] = True
    lock = project.root / ".git" / "index.lock"
    lock.touch()  # another git is at work: DVC has written its records, and cannot stage them
    with pytest.raises((DataError, Trouble)):
        add(project)
    assert leftovers(project) == []
    lock.unlink()
    version = add(project)
    lock.touch()
    with pytest.raises((DataError, Trouble)):
        add(project, "other", replace=True)
    assert pin(project, "datasets/mine") == version


def test_an_import_that_was_killed_leaves_nothing_in_the_way(project: Project) -> None:
    version = add(project)
    write_splits(project.root / "datasets" / ".mine.partial", "half")
    (project.root / "datasets" / "mine").rename(project.root / "datasets" / ".mine.old")
    assert pin(project, "datasets/mine") == version
    assert add(project, "other", replace=True).hash != version.hash
    assert leftovers(project) == [".gitignore", "mine", "mine.dvc"]


def test_two_imports_at_once_wait_for_each_other(project: Project, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from registry.project import Project\n"
        "from registry.dataset_versions import store_version; from tests.dvc_projects import write_splits\n"
        "root = Path(sys.argv[1]); p = Project(root, root / '.ft', root)\n"
        "store_version(p, sys.argv[2], lambda folder: write_splits(folder, sys.argv[2], 50), replace=False)\n"
    )
    start = [sys.executable, "-c", program, str(project.root)]
    running = [subprocess.Popen([*start, name], stderr=subprocess.PIPE, text=True) for name in ("a", "b", "c")]
    ends = [(each.communicate(timeout=60)[1], each.returncode) for each in running]
    assert ends == [("", 0)] * 3
    assert [each.path for each in tracked_datasets(project)] == ["datasets/a", "datasets/b", "datasets/c"]


def test_dvc_says_nothing_on_its_own(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    push(project, add(project))
    drop_cache(project)
    shutil.rmtree(project.root / "datasets" / "mine")
    pin(project, "datasets/mine")
    assert capfd.readouterr() == ("", "")
