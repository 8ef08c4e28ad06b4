"""Adapters onto a network volume: a real S3 server stands for RunPod's S3 API of volumes."""

from __future__ import annotations

from typing import Any

import pytest

from registry.adapters import Version
from registry.errors import AdmissionError, BucketError, WrongInput
from registry.manifest import MANIFEST, write_manifest
from registry.project import Project
from registry.settings import Settings
from serving.volume_upload import upload_adapter
from tests.weed_server import JOBS, OWN, WeedServer

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


@pytest.fixture
def version(project: Project) -> Version:
    folder = project.home / "adapters" / "tickets" / "3"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    write_manifest(folder)
    return Version("tickets", 3, "run-3", "adapters/tickets/3", {}, 0.0, False)


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_S3_ACCESS_KEY", OWN[0])
    monkeypatch.setenv("RUNPOD_S3_SECRET_KEY", OWN[1])


def test_an_adapter_lies_where_the_workers_look_for_it(project: Project, version: Version, s3: WeedServer) -> None:
    for _ in range(2):
        path = upload_adapter(project, Settings(), version, JOBS, "EU-RO-1", url=s3.url)
    assert path == "/runpod-volume/adapters/tickets/3"
    listed = s3.client().list_objects_v2(Bucket=JOBS, Prefix="adapters/")["Contents"]
    assert {each["Key"] for each in listed} == {f"adapters/tickets/3/{name}" for name in [*FILES, MANIFEST]}
    found = s3.client().get_object(Bucket=JOBS, Key="adapters/tickets/3/adapter_model.safetensors")
    assert found["Body"].read() == b"weights"


def test_a_changed_adapter_stays_here(project: Project, version: Version) -> None:
    (project.home / version.folder / "adapter_config.json").write_bytes(b"[]")
    with pytest.raises(AdmissionError, match="adapter_config"):
        upload_adapter(project, Settings(), version, JOBS, "EU-RO-1")


@pytest.mark.parametrize(
    ("given", "says"),
    [({"data_center": "europe"}, "no data center"), ({"template": "me/tickets-{version}"}, "not on a network volume")],
)
def test_what_is_no_volume_is_refused(project: Project, version: Version, given: dict[str, Any], says: str) -> None:
    with pytest.raises(WrongInput, match=says):
        upload_adapter(project, Settings(), version, JOBS, **{"data_center": "EU-RO-1", **given})


def test_a_key_that_is_missing_or_wrong_is_told_of(
    project: Project, version: Version, s3: WeedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_S3_SECRET_KEY", "wrong")
    with pytest.raises(BucketError) as raised:
        upload_adapter(project, Settings(), version, JOBS, "EU-RO-1", url=s3.url)
    assert "RUNPOD_S3_SECRET_KEY" in raised.value.fix
    monkeypatch.delenv("RUNPOD_S3_ACCESS_KEY")
    with pytest.raises(BucketError, match="no key for RunPod's S3 API"):
        upload_adapter(project, Settings(), version, JOBS, "EU-RO-1", url=s3.url)
