"""The bucket: conditional writes that let one of many win, and a check that refuses what cannot be relied on."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from registry.bucket import Bucket, Changed, open_bucket
from registry.errors import BucketError
from registry.manifest import broken_files, write_manifest
from registry.settings import Settings
from tests.conftest import all_at_once
from tests.fakes.broken_line import line_to
from tests.weed_server import OTHER, POD, READER, WeedServer

PREPARE = """
import json, sys
from pathlib import Path
from registry.bucket import Changed, open_bucket
from registry.settings import Settings
bucket = open_bucket(Settings(**json.loads(Path("settings.json").read_text())))
seen = bucket.get("lease")
"""
ACT = """
try:
    bucket.put("lease", str(id(bucket)).encode(), if_match=seen and seen.etag, if_absent=seen is None)
    print("won")
except Changed:
    print("lost")
"""


class Forgetful(BaseHTTPRequestHandler):
    """An S3 door that stores, lists nothing, knows no key, and takes no notice of conditions."""

    kept: dict[str, bytes]

    def do_PUT(self) -> None:
        self.kept[urlsplit(self.path).path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b"")

    def do_GET(self) -> None:
        listing = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
        self._answer(200, listing if "list-type" in self.path else self.kept[urlsplit(self.path).path])

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("ETag", '"always-the-same"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def door(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@pytest.fixture
def bucket(s3: WeedServer, request: pytest.FixtureRequest) -> Bucket:
    return open_bucket(s3.settings(f"bucket/{request.node.name}"))


def files(folder: Path, count: int = 12) -> Path:
    for number in range(count):
        file = folder / f"part-{number % 3}" / f"{number}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([number]) * (100_000 + number))
    write_manifest(folder)
    return folder


def refusal(settings: Settings) -> str:
    began = time.monotonic()
    with pytest.raises(BucketError) as caught:
        open_bucket(settings).check()
    assert time.monotonic() - began < 15
    assert caught.value.fix
    return str(caught.value)


def test_a_usable_bucket_passes_and_nothing_is_left_in_it(bucket: Bucket) -> None:
    bucket.check()
    assert bucket.names("") == []


def test_what_is_written_is_read_again_with_the_servers_clock(bucket: Bucket) -> None:
    etag = bucket.put("a/b", b"1")
    found = bucket.get("a/b")
    assert found is not None
    assert (found.body, found.etag) == (b"1", etag)
    assert abs(found.now - time.time()) < 5
    assert bucket.get("a") is None


def test_a_condition_that_does_not_hold_changes_nothing(bucket: Bucket) -> None:
    first = bucket.put("lease", b"1", if_absent=True)
    with pytest.raises(Changed):
        bucket.put("lease", b"2", if_absent=True)
    second = bucket.put("lease", b"3", if_match=first)
    with pytest.raises(Changed):
        bucket.put("lease", b"4", if_match=first)
    with pytest.raises(Changed):
        bucket.put("nothing", b"5", if_match=second)
    found = bucket.get("lease")
    assert found is not None
    assert (found.body, found.etag) == (b"3", second)
    assert bucket.get("nothing") is None


def test_a_write_that_broke_off_leaves_what_was_there(bucket: Bucket, s3: WeedServer) -> None:
    etag = bucket.put("lease", b"whole")
    with line_to(s3.url) as line:
        broken = open_bucket(s3.settings(bucket.prefix, s3_endpoint=line.url))
        line.lose_body()
        with pytest.raises(BucketError, match="it does not answer"):
            broken.put("lease", b"never whole", if_match=etag)
    time.sleep(0.5)
    found = bucket.get("lease")
    assert found is not None
    assert found.body == b"whole"


def test_of_processes_that_write_at_once_one_wins(s3: WeedServer, tmp_path: Path) -> None:
    settings = s3.settings(f"race/{tmp_path.name}")
    (tmp_path / "settings.json").write_text(settings.model_dump_json(include={
        "bucket", "s3_endpoint", "s3_access_key", "s3_secret_key"}))  # fmt: skip
    assert all_at_once(4, PREPARE, ACT, tmp_path) == ["lost", "lost", "lost", "won"]
    assert all_at_once(4, PREPARE, ACT, tmp_path) == ["lost", "lost", "lost", "won"]


def test_a_folder_comes_back_as_it_was_sent(bucket: Bucket, tmp_path: Path) -> None:
    bucket.send(files(tmp_path / "there"), "some/folder")
    bucket.fetch("some/folder", tmp_path / "back")
    assert broken_files(tmp_path / "back") == []
    assert len(bucket.names("some/folder/")) == 13


def test_a_folders_manifest_is_sent_last(bucket: Bucket, tmp_path: Path) -> None:
    folder = files(tmp_path / "there")
    names = [each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()]
    with pytest.raises(OSError, match="not-there"):
        bucket.send(folder, "half", only=[*names, "not-there"])
    assert "half/MANIFEST.json" not in [each.key for each in bucket.names("half/")]


def test_a_deleted_folder_takes_no_neighbour_along(bucket: Bucket) -> None:
    for key in ("jobs/1/a", "jobs/1/b", "jobs/10/a", "jobs/1"):
        bucket.put(key, b"x")
    bucket.delete("jobs/1")
    assert [each.key for each in bucket.names("jobs/")] == ["jobs/1", "jobs/10/a"]
    assert [each.key for each in bucket.names("jobs/", after="jobs/1")] == ["jobs/10/a"]


def test_a_name_that_leads_out_of_the_folder_is_refused(bucket: Bucket, s3: WeedServer, tmp_path: Path) -> None:
    bucket.put("job/fine", b"1")
    with pytest.raises(BucketError, match="a name that no job folder has"):
        bucket.fetch("job", tmp_path / "in", only=["../out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bucket": "s3://ft-nowhere/x"}, "there is no bucket ft-nowhere"),
        ({"s3_access_key": "nobody"}, r"the key is wrong \(InvalidAccessKeyId\)"),
        ({"s3_secret_key": "guessed"}, r"the key is wrong \(SignatureDoesNotMatch\)"),
        ({"s3_access_key": POD[0], "s3_secret_key": POD[1], "bucket": f"s3://{OTHER}/x"}, "the key may not do that"),
        ({"s3_endpoint": "http://127.0.0.1:9"}, "it does not answer"),
    ],
)
def test_what_cannot_be_used_is_refused_in_seconds(s3: WeedServer, wrong: dict[str, str], said: str) -> None:
    text = refusal(s3.settings("checked", **wrong))
    assert re.search(said, text), text


def test_a_bucket_that_may_only_be_read_is_refused(s3: WeedServer) -> None:
    text = refusal(s3.settings("checked", s3_access_key=READER[0], s3_secret_key=READER[1]))
    assert "cannot write .check/" in text
    assert "the key may not do that" in text


def test_an_endpoint_that_takes_no_notice_of_conditions_is_refused(s3: WeedServer) -> None:
    with door(type("Fresh", (Forgetful,), {"kept": {}})) as url:
        text = refusal(s3.settings("checked", s3_endpoint=url))
    assert "it writes whatever If-None-Match says: two trainers could both publish" in text
    assert "take an endpoint with conditional writes" in text


def test_without_a_bucket_the_next_step_is_said() -> None:
    for text in ("", "ft-jobs/desk", "s3://"):
        with pytest.raises(BucketError, match=r"write `bucket: s3://NAME/PREFIX` into ft\.yaml"):
            open_bucket(Settings(bucket=text))
