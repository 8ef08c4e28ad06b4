"""Prices of RunPod's cards: asked for once an hour, and a dated table where nobody answers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from registry.gpu_prices import CLOUDS, GpuPrice, gpu_prices, priced, seed_prices, source
from registry.runpod_api import GpuOffer
from registry.settings import Settings
from tests.fakes.runpod.started import standin

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there


def test_runpod_is_asked_once_an_hour(tmp_path: Path) -> None:
    with standin(tmp_path / "cloud") as cloud:
        settings = Settings(runpod_url=cloud.url, runpod_api_key=cloud.key)
        found = gpu_prices(tmp_path, settings)
        asked = len(cloud.requests("GET", "/v2/catalog/gpus"))
        assert gpu_prices(tmp_path, settings) == found
        assert (asked, len(cloud.requests("GET", "/v2/catalog/gpus"))) == (2, 2)
        by_card = {(each.gpu, each.cloud): each for each in found.of}
        assert by_card["NVIDIA A40", "secure"].usd_per_hour == 0.40
        assert by_card["NVIDIA A40", "community"].usd_per_hour == 0.35
        assert ("NVIDIA L4", "community") not in by_card
        assert "EU-RO-1" in by_card["NVIDIA A40", "secure"].data_centers
        assert source(found, time.time()) == "RunPod's catalogue, 0 min ago"
        _made_older(tmp_path, 3700)
        gpu_prices(tmp_path, settings)
        assert len(cloud.requests("GET", "/v2/catalog/gpus")) == 4
        _made_older(tmp_path, 4 * 3600)
    stale = gpu_prices(tmp_path, settings)
    assert stale.of == found.of
    assert source(stale, time.time()).startswith("RunPod's catalogue, 4 h ago (")


@pytest.mark.parametrize(("url", "key", "why"), [(NOWHERE, "", "no RunPod key"), (NOWHERE, "k" * 20, "cannot be")])
def test_without_a_key_or_a_network_the_table_is_taken_and_it_says_so(
    tmp_path: Path, url: str, key: str, why: str
) -> None:
    found = gpu_prices(tmp_path, Settings(runpod_url=url, runpod_api_key=key))
    assert (found.of, found.asked) == (seed_prices().of, None)
    said = source(found, time.time())
    assert said.startswith("the lowest of March 2026, not today's (")
    assert why in said
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_asked_for_again(tmp_path: Path) -> None:
    file = tmp_path / "runpod-prices.json"
    for text in ("", "[]", '{"of": [1], "asked": 1}', '{"of": []}'):
        file.write_text(text, encoding="utf-8")
        assert gpu_prices(tmp_path, Settings(runpod_url=NOWHERE)).asked is None


def test_a_price_from_the_future_is_asked_for_again(tmp_path: Path) -> None:
    future = {"of": [], "asked": time.time() + 1e6, "note": ""}
    (tmp_path / "runpod-prices.json").write_text(json.dumps(future), encoding="utf-8")
    assert gpu_prices(tmp_path, Settings(runpod_url=NOWHERE)).note


def test_a_card_that_a_cloud_does_not_have_has_no_price_there() -> None:
    offer = GpuOffer("NVIDIA L4", "L4", 24, 0.44, None, "LOW", ("EU-RO-1",))
    assert priced([offer], "secure") == [GpuPrice("NVIDIA L4", "L4", 24, "secure", 0.44, "LOW", ("EU-RO-1",))]
    assert priced([offer], "community") == []


def test_every_row_of_the_table_is_a_card_that_a_plan_knows() -> None:
    found = seed_prices()
    assert {each.cloud for each in found.of} == set(CLOUDS)
    assert all(each.usd_per_hour > 0 and each.memory_gb >= 24 for each in found.of)


def _made_older(home: Path, seconds: float) -> None:
    file = home / "runpod-prices.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, "asked": content["asked"] - seconds}), encoding="utf-8")
