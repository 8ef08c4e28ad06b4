"""`python -m tests.bench.bench_bucket [MEGABYTES] [ROUNDS]`: a job's folder to a real S3 and back, beside boto3 alone.

Ours is Bucket.send and Bucket.fetch; theirs is boto3's upload_file and download_file, with its own settings, one after
another and eight at once. All on the same files, in rounds by turns. Prints one JSON line: medians in MB/s, and ours as
a share of the faster of theirs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from registry.bucket import Bucket, open_bucket
from registry.manifest import broken_files, write_manifest
from tests.weed_server import JOBS, weed_server

AT_ONCE = 8
MB = 1_000_000


def main() -> None:
    megabytes, rounds = (int(each) for each in [*sys.argv[1:], "200", "5"][:2])
    with tempfile.TemporaryDirectory() as name, weed_server() as server:
        folder = _job_folder(Path(name) / "job", megabytes * MB)
        print(json.dumps({"megabytes": megabytes, "rounds": rounds, **_measure(server, folder, rounds)}))


def _measure(server: Any, folder: Path, rounds: int) -> dict[str, Any]:
    bucket, client = open_bucket(server.settings("bench")), server.client()
    rates: dict[str, list[float]] = {}
    size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
    ways = _ways(bucket, client, folder, folder.parent / "back")
    for turn in range(rounds):
        for way in random.Random(turn).sample(sorted(ways), len(ways)):
            there, back = ways[way]
            _make_folders(folder, folder.parent / "back")
            for direction, carry in (("up", there), ("down", back)):
                began = time.perf_counter()
                carry()
                rates.setdefault(f"{way} {direction}", []).append(size / MB / (time.perf_counter() - began))
            assert not broken_files(folder.parent / "back")
            shutil.rmtree(folder.parent / "back")
    medians = {name: round(statistics.median(found), 1) for name, found in sorted(rates.items())}
    return {"mb_per_second": medians, **{f"ratio_{way}": _ratio(medians, way) for way in ("up", "down")}}


def _ways(
    bucket: Bucket, client: Any, folder: Path, target: Path
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    names = [each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()]

    def put(name: str) -> None:
        client.upload_file(str(folder / name), JOBS, f"plain/{name}")

    def get(name: str) -> None:
        client.download_file(JOBS, f"plain/{name}", str(target / name))

    def in_turn(carry: Callable[[str], None]) -> None:
        for name in names:
            carry(name)

    def at_once(carry: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(carry, names))

    return {
        "ours": (lambda: bucket.send(folder, "ours"), lambda: bucket.fetch("ours", target)),
        "boto3": (lambda: in_turn(put), lambda: in_turn(get)),
        "boto3 at once": (lambda: at_once(put), lambda: at_once(get)),
    }


def _make_folders(like: Path, target: Path) -> None:
    for each in like.rglob("*"):
        if each.is_dir():
            (target / each.relative_to(like)).mkdir(parents=True, exist_ok=True)


def _ratio(medians: dict[str, float], way: str) -> float:
    return round(medians[f"ours {way}"] / max(medians[f"boto3 {way}"], medians[f"boto3 at once {way}"]), 2)


def _job_folder(folder: Path, size: int) -> Path:
    """A checkpoint's few large files, an adapter, and the many small ones of data and progress."""
    parts = {
        "checkpoints/0001-200/optimizer.pt": 0.5, "checkpoints/0001-200/adapter_model.safetensors": 0.25,
        "adapter/adapter_model.safetensors": 0.2, **{f"data/part-{n:02d}.jsonl": 0.001 for n in range(50)},
    }  # fmt: skip
    for name, share in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(int(size * share)))
    write_manifest(folder)
    return folder


if __name__ == "__main__":
    main()
