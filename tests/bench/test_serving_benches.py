"""What the benchmarks of serving must notice: they are worth as much as the faults that they would find."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from registry.adapters import Version
from tests.bench.bench_adapters import Asked, figures
from tests.bench.bench_soak import growing, line
from tests.bench.opened_files import watching
from tests.bench.swap_replies import Move, Outage, Reply, across, judge

GOOD = Reply(200, "m@1", "ALPHA ALPHA", 10.0, 10.5, 11.0, stream=True)
WORDS = {"m@1": "alpha", "m@2": "beta"}
MOVES = [Move("m@1", "first", 0.0, 1.0), Move("m@2", "promote", 20.0, 20.5), Move("m@1", "rollback", 30.0, 30.4)]


def of_kind(reply: Reply, outages: tuple[Outage, ...] = ()) -> list[str]:
    return [name for name, found in judge([reply], MOVES, outages, WORDS).items() if found]


def test_replies_are_held_against_label_text_and_the_versions_in_force() -> None:
    assert of_kind(GOOD) == []
    assert of_kind(replace(GOOD, text="ALPHA BETA")) == ["mixed"]
    assert of_kind(replace(GOOD, text="hello")) == ["mixed"]
    assert of_kind(replace(GOOD, text="BETA")) == ["mislabelled"]
    assert of_kind(replace(GOOD, label="m@9")) == ["mislabelled"]
    late = replace(GOOD, began=20.6, first=21.0, ended=21.5)
    assert of_kind(late) == ["stale"], "it began after a reply of the next version was there"
    assert of_kind(replace(late, began=20.4)) == []
    assert of_kind(replace(GOOD, label="m@2", text="BETA")) == ["stale"], "not yet promoted"
    assert across([GOOD, replace(GOOD, began=19.9, ended=20.1)], MOVES) == 1


def test_an_error_is_excused_only_if_it_is_clean_and_the_engine_was_away() -> None:
    outage = (Outage(10.2, 12.0),)
    lost = replace(GOOD, status=503, text="", error="503", clean=True)
    assert of_kind(lost, outage) == ["told"]
    assert of_kind(replace(lost, clean=False), outage) == ["failed"]
    assert of_kind(replace(lost, began=12.1, ended=13.0), outage) == ["failed"]
    assert of_kind(lost) == ["failed"]


def test_a_slow_leak_is_told_from_noise() -> None:
    def samples(rise: float) -> list[dict[str, float]]:
        return [{"at": float(n), "rss": 45e6 + rise * n + (n % 7) * 1e5, "fds": 40.0, "tasks": 90.0 + n % 5,
                 "in_flight": 16.0} for n in range(200)]  # fmt: skip

    calm = {"in_flight": 0.0, "tasks": 2.0}
    lines = {name: line(samples(0), name) for name in ("rss", "fds", "tasks", "in_flight")}
    assert growing(lines, calm, calm) == []
    assert len(growing({"rss": line(samples(60_000), "rss")}, calm, calm)) == 1
    assert len(growing(lines, calm, {"in_flight": 1.0, "tasks": 3.0})) == 2


def test_a_wrong_adapter_is_counted() -> None:
    versions = {"m": Version("m", 1, "run", "folder", {}, 0.0, False)}
    asked = [Asked("m", GOOD, hit=True), Asked("m", replace(GOOD, text="BETA"), hit=False),
             Asked("m", replace(GOOD, label="n@1"), hit=True)]  # fmt: skip
    found = figures(asked, versions, {"m": "alpha"})
    assert (found["wrong"], found["failed"], found["hit_rate"]) == (2, 0, 0.667)


def test_reading_an_adapter_from_disk_is_noticed(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("one", "two")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"x")
        (folder / "other").write_bytes(b"x")

    async def look() -> dict[str, int]:
        with watching(folders) as opened:
            (folders["one"] / "adapter_model.safetensors").read_bytes()
            (folders["two"] / "other").read_bytes()
            opened.read()
            return {name: len(times) for name, times in opened.times.items()}

    assert asyncio.run(look()) == {"one": 1, "two": 0}
