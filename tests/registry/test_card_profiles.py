"""Card profiles: names as drivers, RunPod and people write them, and how much of the memory is to be had."""

from __future__ import annotations

import pytest

from registry.card_profiles import GIB, PROFILES, by_runpod_id, profile_of, sized_profile, usable_memory

NAMES = {
    "NVIDIA GeForce RTX 4070 SUPER": "RTX 4070 SUPER",
    "NVIDIA GeForce RTX 4070 Ti SUPER": "RTX 4070 Ti SUPER",
    "NVIDIA GeForce RTX 4070 Ti": "RTX 4070 Ti",
    "NVIDIA GeForce RTX 4070": "RTX 4070",
    "NVIDIA GeForce RTX 3070": "RTX 3070",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80GB",
    "NVIDIA A100-SXM4-40GB": "A100 SXM 40GB",
    "NVIDIA A100 80GB PCIe": "A100 PCIe 80GB",
    "NVIDIA A100-PCIE-40GB": "A100 PCIe 40GB",
    "NVIDIA H100 80GB HBM3": "H100 SXM 80GB",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200",
    "NVIDIA RTX A6000": "RTX A6000",
    "NVIDIA L40S": "L40S",
    "NVIDIA L40": "L40",
    "Tesla T4": "T4",
    "Tesla V100-SXM2-16GB": "V100 16GB",
    "rtx 4070 super": "RTX 4070 SUPER",
    "4070Ti": "RTX 4070 Ti",
    "4070TiSUPER": "RTX 4070 Ti SUPER",
    "cpu": "cpu",
    "CPU, 16 cores": "cpu",
}


@pytest.mark.parametrize("title", NAMES)
def test_a_card_is_known_by_its_drivers_name_and_by_a_persons(title: str) -> None:
    found = profile_of(title)
    assert found
    assert found.name == NAMES[title]


@pytest.mark.parametrize(
    "title",
    ["NVIDIA GeForce RTX 4070 Laptop GPU", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA GeForce GTX 1080", "Radeon", "", "Ti"],
)
def test_a_card_that_is_not_listed_is_not_taken_for_a_near_one(title: str) -> None:
    assert profile_of(title) is None


def test_of_two_sizes_the_name_alone_means_the_smaller_and_the_drivers_memory_decides() -> None:
    title = "NVIDIA GeForce RTX 4060 Ti"
    smaller, larger = profile_of(title), sized_profile(title, 16_380 * 1024**2)
    assert smaller
    assert larger
    assert (smaller.memory_gib, larger.memory_gib) == (8, 16)


def test_every_profile_is_found_by_its_own_name_and_by_its_runpod_id() -> None:
    for profile in PROFILES:
        assert profile_of(profile.name) == profile
        for gpu in profile.runpod:
            found = by_runpod_id(gpu)
            assert found
            assert found.runpod == profile.runpod


def test_abilities_follow_from_the_compute_capability() -> None:
    known = {name: profile_of(name) for name in ("T4", "RTX 3070", "RTX 4090", "RTX 5090", "H100 PCIe", "cpu")}
    assert {name: (each.bf16, each.fp16, each.fp8) for name, each in known.items() if each} == {
        "T4": (False, True, False),
        "RTX 3070": (True, True, False),
        "RTX 4090": (True, True, True),
        "RTX 5090": (True, True, True),
        "H100 PCIe": (True, True, True),
        "cpu": (True, False, False),
    }


def test_less_than_the_nominal_memory_can_be_used_and_least_where_a_desktop_or_ecc_takes_some() -> None:
    known = {name: profile_of(name) for name in ("RTX 3070", "RTX A6000", "A40", "T4")}
    usable = {name: each.usable / GIB for name, each in known.items() if each}
    assert 7.3 < usable["RTX 3070"] < 7.7
    assert 46.5 < usable["RTX A6000"] < 47.5
    assert 43.5 < usable["A40"] < 44.5  # its driver shows 45 GiB
    assert 14.3 < usable["T4"] < 15
    assert usable_memory(0, "any") == 0
