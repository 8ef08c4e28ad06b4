"""Manifests: whole means every file as it was, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.manifest import MANIFEST, broken_files, manifest_digest, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "adapter"
    (made / "sub").mkdir(parents=True)
    (made / "weights").write_bytes(b"abc")
    (made / "sub" / "größe.json").write_text("{}")
    return made


def test_a_whole_folder_has_nothing_broken(folder: Path) -> None:
    digest = write_manifest(folder, step=3)
    content = read_manifest(folder)
    assert content is not None
    assert content["step"] == 3
    assert set(content["files"]) == {"weights", "sub/größe.json"}
    assert content["files"]["weights"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert broken_files(folder) == []
    assert digest == manifest_digest(folder)
    assert write_manifest(folder, step=3) == digest
    assert write_manifest(folder, step=4) != digest


def test_changed_missing_and_additional_files_are_named(folder: Path) -> None:
    write_manifest(folder)
    (folder / "weights").write_bytes(b"abd")
    (folder / "sub" / "größe.json").unlink()
    (folder / "sub" / "new").touch()
    assert broken_files(folder) == ["sub/größe.json", "sub/new", "weights"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"files": []}', "\udcff"])
def test_without_a_readable_manifest_nothing_is_whole(folder: Path, text: str | None) -> None:
    if text is not None:
        (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_manifest(folder) is None
    assert broken_files(folder) == [MANIFEST]
