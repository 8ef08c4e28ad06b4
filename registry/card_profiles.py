"""What is known of a kind of card before a driver has spoken of one: memory, bandwidth, speed, RunPod's name of it.

Numbers are the vendor's data sheets: dense 16-bit tensor throughput with 32-bit sums (GeForce cards run that at half
of the rate on their boxes), without sparsity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True)
class CardProfile:
    """`memory_gib` is nominal, `bandwidth_gbs` in 1e9 bytes a second, `tflops` dense 16-bit; `compute`: CUDA's name.

    `ecc`: GDDR6 that keeps its check bits in itself, a sixteenth of it: the driver shows 15 GiB of a T4's 16.
    """

    name: str
    memory_gib: float
    bandwidth_gbs: float
    tflops: float
    compute: str
    runpod: tuple[str, ...] = ()
    ecc: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.compute == ""

    @property
    def bf16(self) -> bool:
        """Without it a model trains in fp16, which overflows where bf16 does not."""
        return self.is_cpu or self.generation >= 8.0

    @property
    def fp16(self) -> bool:
        return not self.is_cpu

    @property
    def fp8(self) -> bool:
        return self.generation >= 8.9

    @property
    def generation(self) -> float:
        """The compute capability as a number; 0 for the CPU."""
        return float(self.compute or 0)

    @property
    def visible(self) -> int:
        """Bytes as the driver counts them."""
        return int(self.memory_gib * GIB * (15 / 16 if self.ecc else 1))

    @property
    def usable(self) -> int:
        """Bytes that one program can hold, of the nominal memory."""
        return 0 if self.is_cpu else usable_memory(self.visible, self.name)


def usable_memory(total: int, title: str) -> int:
    """Bytes that programs can hold on a card of `total` bytes: the driver keeps some, and a desktop a few windows.

    NVML's total of an 8 GB card is 8,188 MiB, of which 7,700 are to be had; ECC memory shows less than its nominal.
    """
    desktop = bool(re.search(r"geforce|\brtx \d{4}\b(?! ada)|titan", title, re.IGNORECASE))
    return max(0, int(total * 0.98) - (300 if desktop else 150) * 1024**2)


def profile_of(title: str) -> CardProfile | None:
    """The profile of a card by the driver's name of it, RunPod's or a person's; None for a card that is not listed.

    Of a name that comes in two sizes ("RTX 4060 Ti") this is the smaller one: `sized_profile` knows the memory.
    """
    found = _matching(title)
    return min(found, key=lambda each: each.memory_gib) if found else None


def sized_profile(title: str, memory: int) -> CardProfile | None:
    """The profile with that name whose memory is nearest to what the driver says (bytes)."""
    found = _matching(title)
    return min(found, key=lambda each: abs(each.memory_gib * GIB - memory)) if found else None


def by_runpod_id(gpu: str) -> CardProfile | None:
    return next((each for each in PROFILES if gpu in each.runpod), None)


def _matching(title: str) -> list[CardProfile]:
    if re.match(r"cpu\b", title, re.IGNORECASE):  # registry/cards.py: "CPU, 16 cores"
        return [CPU]
    exact = [each for each in PROFILES if title in each.runpod or title.lower() == each.name.lower()]
    words = _words(title)
    return exact or [each for each in PROFILES if _words(each.name) == words] or _of_all_sizes(words)


def _of_all_sizes(words: tuple[str, ...]) -> list[CardProfile]:
    """ "RTX 4060 Ti" means the two of them, "NVIDIA A100 80GB" those of that size, a laptop's card none."""
    if "laptop" in words or "max-q" in words or not words:
        return []
    return [each for each in PROFILES if set(words) <= set(_words(each.name)) and _same_number(words, each)]


def _same_number(words: tuple[str, ...], profile: CardProfile) -> bool:
    """The words that are left over may only be a size or a form, never a `ti` or a `super`."""
    left = set(_words(profile.name)) - set(words)
    return all(re.fullmatch(r"\d+gb|sxm|pcie", each) for each in left)


def _words(title: str) -> tuple[str, ...]:
    text = re.sub(r"[-_/]+", " ", title.lower())
    text = re.sub(r"(\d+) ?(?:gb|gib|g)\b", r"\1gb", text)
    text = re.sub(r"\bsxm\d\b", "sxm", text).replace("hbm3", "sxm").replace("hbm2", "")
    text = re.sub(r"\b(rtx|gtx) ?(?=\d)", r"\1 ", text)
    text = re.sub(r"\b(\d{4}) ?(ti|super)", r"\1 \2 ", text)
    dropped = {"nvidia", "geforce", "tesla", "rtx", "gpu", "graphics", "card", "generation"}
    return tuple(sorted({each for each in text.split() if each not in dropped}))


def _geforce(name: str, memory: float, bandwidth: float, tflops: float, compute: str) -> CardProfile:
    plain = re.sub(r" \d+GB$", "", name)
    return CardProfile(name, memory, bandwidth, tflops, compute, (f"NVIDIA GeForce {plain}",))


CPU = CardProfile("cpu", 0, 40, 0.3, "")
PROFILES = (
    _geforce("RTX 3060", 12, 360, 25.6, "8.6"),
    _geforce("RTX 3060 Ti", 8, 448, 32.4, "8.6"),
    _geforce("RTX 3070", 8, 448, 40.6, "8.6"),
    _geforce("RTX 3070 Ti", 8, 608, 43.5, "8.6"),
    _geforce("RTX 3080 10GB", 10, 760, 59.5, "8.6"),
    _geforce("RTX 3080 12GB", 12, 912, 61.3, "8.6"),
    _geforce("RTX 3080 Ti", 12, 912, 68.2, "8.6"),
    _geforce("RTX 3090", 24, 936, 71.2, "8.6"),
    _geforce("RTX 3090 Ti", 24, 1008, 80.0, "8.6"),
    _geforce("RTX 4060", 8, 272, 30.2, "8.9"),
    _geforce("RTX 4060 Ti 8GB", 8, 288, 44.1, "8.9"),
    _geforce("RTX 4060 Ti 16GB", 16, 288, 44.1, "8.9"),
    _geforce("RTX 4070", 12, 504, 58.3, "8.9"),
    _geforce("RTX 4070 SUPER", 12, 504, 70.9, "8.9"),
    _geforce("RTX 4070 Ti", 12, 504, 80.2, "8.9"),
    _geforce("RTX 4070 Ti SUPER", 16, 672, 88.2, "8.9"),
    _geforce("RTX 4080", 16, 717, 97.5, "8.9"),
    _geforce("RTX 4080 SUPER", 16, 736, 104.4, "8.9"),
    _geforce("RTX 4090", 24, 1008, 165.2, "8.9"),
    _geforce("RTX 5060 Ti 8GB", 8, 448, 47.4, "12.0"),
    _geforce("RTX 5060 Ti 16GB", 16, 448, 47.4, "12.0"),
    _geforce("RTX 5070", 12, 672, 61.7, "12.0"),
    _geforce("RTX 5070 Ti", 16, 896, 87.9, "12.0"),
    _geforce("RTX 5080", 16, 960, 112.6, "12.0"),
    _geforce("RTX 5090", 32, 1792, 209.5, "12.0"),
    CardProfile("A40", 48, 696, 149.7, "8.6", ("NVIDIA A40",), ecc=True),
    CardProfile("RTX A5000", 24, 768, 111.1, "8.6", ("NVIDIA RTX A5000",)),
    CardProfile("RTX A6000", 48, 768, 154.8, "8.6", ("NVIDIA RTX A6000",)),
    CardProfile("RTX 6000 Ada", 48, 960, 182.1, "8.9", ("NVIDIA RTX 6000 Ada Generation",)),
    CardProfile("L4", 24, 300, 60.5, "8.9", ("NVIDIA L4",), ecc=True),
    CardProfile("L40", 48, 864, 181.0, "8.9", ("NVIDIA L40",), ecc=True),
    CardProfile("L40S", 48, 864, 181.0, "8.9", ("NVIDIA L40S",), ecc=True),
    CardProfile("A100 PCIe 40GB", 40, 1555, 312, "8.0"),
    CardProfile("A100 SXM 40GB", 40, 1555, 312, "8.0"),
    CardProfile("A100 PCIe 80GB", 80, 1935, 312, "8.0", ("NVIDIA A100 80GB PCIe",)),
    CardProfile("A100 SXM 80GB", 80, 2039, 312, "8.0", ("NVIDIA A100-SXM4-80GB",)),
    CardProfile("H100 PCIe", 80, 2039, 756, "9.0", ("NVIDIA H100 PCIe",)),
    CardProfile("H100 SXM 80GB", 80, 3352, 989, "9.0", ("NVIDIA H100 80GB HBM3",)),
    CardProfile("H100 NVL", 94, 3938, 835, "9.0", ("NVIDIA H100 NVL",)),
    CardProfile("H200", 141, 4800, 989, "9.0", ("NVIDIA H200",)),
    CardProfile("H200 NVL", 141, 4800, 835, "9.0", ("NVIDIA H200 NVL",)),
    CardProfile("T4", 16, 320, 65, "7.5", ("Tesla T4",), ecc=True),
    CardProfile("V100 16GB", 16, 900, 125, "7.0", ("Tesla V100-SXM2-16GB",)),
    CardProfile("V100 32GB", 32, 900, 125, "7.0", ("Tesla V100-SXM2-32GB",)),
    CPU,
)
