"""How much of a card a training takes: arithmetic on the model's shape, the batch and the training stack.

The peak is what always lies there (base, adapter, its gradients and optimizer), what the forward pass leaves for the
backward pass, and the larger of two moments: the loss, with its logits, and the backward pass of one layer. Bytes
throughout. Where a number of bytes is given for "a number", it is one element of a tensor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from registry.card_profiles import CardProfile
from registry.geometry import Geometry
from registry.recipe import Train

Loss = Literal["full", "transposed", "upcast", "half", "chunks", "tiles"]
MIB = 1024**2
# NF4: 4 bits, and for every 64 weights a scale: 32 bits, or 8 bits and 32 more for every 256 scales (double quant).
NF4 = 0.5 + 4 / 64
NF4_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes of one logit at the loss. full: four 32-bit copies, the logits, shifted, log-softmax and gradient, as in
# transformers' own loss. transposed: one more, before cross-entropy. upcast: a kernel reads 16-bit logits and writes
# their gradient over them, but accelerate keeps a 32-bit copy of what the model returned, and of its gradient. half:
# 16-bit logits and their gradient. chunks: all 16-bit logits, and the gradient of an eighth of them at a time.
LOGIT: dict[Loss, float] = {"full": 4 * 4, "transposed": 5 * 4, "upcast": 2 + 4 + 4, "half": 2 + 2, "chunks": 2 + 2 / 8}
# TRL's fused head: so many tokens times so many of the vocabulary at once (trl/kernels/chunked_logprob.py).
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
# Of the CUDA context with its loaded kernels, of cuBLAS and bitsandbytes: outside PyTorch's allocator.
CONTEXT = 480 * MIB
# cuBLAS's and cuBLASLt's workspaces, which PyTorch's allocator holds from the first product on.
WORKSPACE = 72 * MIB
# PyTorch's allocator hands out 2 MiB and 20 MiB blocks: of what comes and goes with each batch so much is never free
# in one piece. Every batch has another length, so the blocks of one rarely fit the next.
FRAGMENTS = 0.06
# What no formula has: of 71 published peaks 93 % lie within this of it (`python -m tests.bench.bench_planner`).
SPREAD_LOW, SPREAD_HIGH = 0.12, 0.12


@dataclass(frozen=True)
class Stack:
    """What trains, as far as memory and time go.

    `adapter_4bit`, `adapter_16bit`: bytes of a number of adapter, gradient and optimizer (Adam has two of them).
    `embeddings_4bit`: of embeddings and head beside a 4-bit base. `stream`: of the residual stream beside a 4-bit base.
    `fused`: kernels of its own for MLP and norms, which keep fewer tensors for the backward pass.
    `offloads`: what is kept for the backward pass lies in the host's memory. `keeps_inputs`: bitsandbytes of 2023 kept
    the input of every 4-bit matrix for the backward pass, where nobody needs it. `attained`: of what large products
    reach on the card, what is left beside norms, rotary embeddings, copies and gaps. `launch`: seconds to start the
    kernels of one layer, there, again and back: some hundreds in eager PyTorch with LoRA on each matrix.
    """

    name: str
    loss: Loss
    adapter_4bit: int = 4
    adapter_16bit: int = 4
    embeddings_4bit: int = 2
    stream: int = 2
    fused: bool = False
    offloads: bool = False
    keeps_inputs: bool = False
    attained: float = 0.62
    launch: float = 5e-3


STACKS = {
    each.name: each
    for each in (
        # Ours: prepare_model_for_kbit_training makes 32-bit what is not 4-bit, and with it the residual stream; TRL
        # turns the adapter of a 4-bit base to bf16 and, since 1.16, never builds the logits.
        Stack("trl", "tiles", adapter_4bit=2, embeddings_4bit=4, stream=4),
        # Ours on a CPU: no casts to 32 bits, one quantization, and the tiles in PyTorch's own operations.
        Stack("trl-cpu", "tiles", adapter_4bit=2),
        # transformers' Trainer and older TRL, whose loss has full logits; hf32 after prepare_model_for_kbit_training.
        Stack("hf", "full"),
        Stack("hf32", "full", embeddings_4bit=4, stream=4),
        Stack("axolotl", "full"),
        Stack("liger", "tiles", fused=True, attained=0.70, launch=4e-3),
        Stack("unsloth", "tiles", fused=True, offloads=True, attained=0.75, launch=2.5e-3),
        Stack("unsloth2024", "upcast", fused=True, offloads=True, attained=0.75, launch=2.5e-3),
        # Compiled, with the loss in chunks; the one of 2024 before it had these.
        Stack("torchtune", "chunks", 2, 2, fused=True, attained=0.85, launch=1.5e-3),
        Stack("torchtune-offload", "chunks", 2, 2, fused=True, offloads=True, attained=0.85, launch=1.5e-3),
        Stack("torchtune2024", "transposed", 2, 2, fused=True, attained=0.80, launch=2.5e-3),
        Stack("litgpt", "half", 2, 2, keeps_inputs=True),
    )
}


@dataclass(frozen=True)
class Training:
    """The settings that memory and time depend on. `longest`: tokens to which the longest batch is padded.

    `packed`: a batch is one sequence, and a mask of each of its tokens against each keeps its rows apart.
    """

    batch: int
    longest: int
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    quantize: Literal["nf4", "none"] = "nf4"
    optimizer: str = "adamw"
    checkpointing: bool = True
    stack: str = "trl"
    double_quant: bool = True
    attention: Literal["flash", "eager"] = "flash"
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Of one step on the card: every row is padded to the longest."""
        return self.batch * self.longest

    @property
    def layout(self) -> Stack:
        return STACKS[self.stack]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Memory:
    """Bytes on the card by what takes them; `total` is the peak, and `low` to `high` what is likely to be measured."""

    parts: dict[str, int] = field(default_factory=dict)
    low: int = 0
    high: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """As torch.cuda.max_memory_allocated would say it."""
        return self.total - self.parts.get("context", 0) - self.parts.get("fragments", 0)

    @property
    def reserved(self) -> int:
        """As torch.cuda.max_memory_reserved would say it, and nvidia-smi less the CUDA context."""
        return self.total - self.parts.get("context", 0)

    def scaled(self, factor: float, low: float, high: float) -> Memory:
        """With every part times `factor`, and the interval from `low` to `high` times the new total."""
        parts = {name: round(value * factor) for name, value in self.parts.items()}
        total = sum(parts.values())
        return Memory(parts, round(total * low), round(total * high))

    def as_dict(self) -> dict[str, Any]:
        return {"parts": self.parts, "total": self.total, "low": self.low, "high": self.high}


def training_of(train: Train, *, batch: int, longest: int, stack: str = "trl") -> Training:
    """The recipe's settings with this batch, on rows of at most `longest` tokens."""
    targets = train.lora.targets
    return Training(
        batch=batch,
        longest=longest,
        rank=train.lora.rank,
        targets=targets if isinstance(targets, str) else tuple(targets),
        quantize=train.quantize,
        optimizer=train.optimizer,
        checkpointing=train.checkpointing,
        stack=stack,
        packed=train.packing,
    )


def train_memory(geometry: Geometry, training: Training, card: CardProfile | None = None) -> Memory:
    """The peak. Of the CPU (`card.is_cpu`) it is the process's, without CUDA's parts."""
    training = on_card(training, card)
    kept, moment, what = _activations(geometry, training)
    parts = {"base": base_bytes(geometry, training)} | _adapter(geometry, training)
    parts |= {"kept for backward": kept, what: moment}
    parts |= {"mask": training.tokens**2} if training.packed else {}
    if card is not None and card.is_cpu:
        parts |= {"python and torch": 800 * MIB}
    else:
        parts |= {"workspace": WORKSPACE, "fragments": round((kept + moment) * FRAGMENTS), "context": CONTEXT}
    total = sum(parts.values())
    return Memory(parts, round(total * (1 - SPREAD_LOW)), round(total * (1 + SPREAD_HIGH)))


def on_card(training: Training, card: CardProfile | None) -> Training:
    """The settings as the trainer really uses them there: a CPU recomputes nothing (jobs/trainers/trl_sft.py)."""
    if card is None or not card.is_cpu or training.stack != "trl":
        return training
    return replace(training, stack="trl-cpu", checkpointing=False, double_quant=False)


def base_bytes(geometry: Geometry, training: Training) -> int:
    """The base model's weights. Embeddings, head and norms are never held in 4 bits."""
    if training.quantize == "none":
        return 2 * geometry.parameters
    quantized = NF4_DOUBLE if training.double_quant else NF4
    rest = training.layout.embeddings_4bit * (geometry.embeddings + geometry.norms)
    return round(quantized * geometry.linear) + rest


def _adapter(geometry: Geometry, training: Training) -> dict[str, int]:
    targets = training.targets if isinstance(training.targets, str) else list(training.targets)
    size = geometry.adapter(training.rank, targets)
    width = training.layout.adapter_4bit if training.quantize == "nf4" else training.layout.adapter_16bit
    # Two moments of a byte each, and a 32-bit scale for every 256 of each; the paged ones may leave the card.
    eighth = {"adamw": 2.0 * width, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 0.0}[training.optimizer]
    return {"adapter": size * width, "gradients": size * width, "optimizer": round(size * eighth)}


def _activations(geometry: Geometry, training: Training) -> tuple[int, int, str]:
    """What stays from forward to backward pass; the larger moment above it, and its name."""
    tokens, stack = training.tokens, training.layout
    stream = stack.stream if training.quantize == "nf4" else 2
    layer = tokens * layer_bytes(geometry, training)
    backward = tokens * _backward_bytes(geometry, stream)
    loss = _loss_bytes(geometry, training, stream)
    if training.checkpointing:
        boundary = tokens * geometry.hidden * stream
        # The boundary that is being fetched and the one that comes next are on the card.
        kept = 2 * boundary if stack.offloads else geometry.layers * boundary
        moment, what = layer + backward, "one layer again"
    else:
        kept, moment, what = geometry.layers * layer, backward, "backward pass"
    # One layer's matrix is unpacked to 16 bits whenever it is used.
    unpacked = 2 * geometry.hidden * geometry.intermediate if training.quantize == "nf4" else 0
    return (kept, loss, "logits and loss") if loss > moment + unpacked else (kept, moment + unpacked, what)


def layer_bytes(geometry: Geometry, training: Training) -> int:
    """What autograd keeps of one layer, for each token.

    Eager: two norms in 32 bits; the inputs of q, k, v, o, gate and up that the adapter's gradient needs; q, k, v; and
    the MLP's gate, its activation, up and their product. Flash attention keeps no scores. With TRL, PEFT and
    bitsandbytes this is what autograd really saves (tests/jobs/test_saved_tensors.py).
    """
    hidden, inner = geometry.hidden, geometry.intermediate * geometry.active_experts
    # With a mask keys and values are repeated for each head, and each layer turns the mask into 16-bit numbers.
    keys = geometry.heads if training.packed else geometry.kv_heads
    mask = 2 * training.tokens if training.packed else 0
    attention = (geometry.heads + 2 * keys) * geometry.head_dim
    # Softmax in 32 bits, and its 16-bit copy that is multiplied with the values.
    scores = geometry.heads * training.longest * (4 + 2) if training.attention == "eager" else 0
    wide = training.layout.stream if training.quantize == "nf4" else 2
    if training.layout.fused:
        return 2 * attention + scores + mask + 14 * hidden + (4 if geometry.gated else 2) * inner
    # RMSNorm upcasts what it gets; LayerNorm, which the families without a gate have, keeps it as it is.
    norms, inputs = 2 * (4 if geometry.gated else 2) * hidden, 6 * 2 * hidden
    # With a 32-bit stream the MLP's tensors are 32-bit too; the adapter has a 16-bit copy of their product.
    mlp = (3 if geometry.gated else 1) * wide * inner + 2 * inner
    ranks = 2 * training.rank * (7 if geometry.gated else 6)
    again = 2 * (3 * hidden + inner) if training.layout.keeps_inputs and training.quantize == "nf4" else 0
    return norms + inputs + 2 * attention + scores + mask + mlp + ranks + again


def _backward_bytes(geometry: Geometry, stream: int) -> int:
    """Gradients that are there at once in a layer's backward pass, for each token: of the MLP's product and its two
    factors, and of the stream."""
    return stream * (2 * geometry.intermediate * geometry.active_experts + 2 * geometry.hidden)


def _loss_bytes(geometry: Geometry, training: Training, stream: int) -> int:
    tokens, stack = training.tokens, training.layout
    if stack.loss in LOGIT:
        return round(tokens * geometry.vocab * LOGIT[stack.loss])
    tile = min(tokens, TILE_TOKENS) * min(geometry.vocab, TILE_VOCABULARY) * 2
    if stack.name == "trl-cpu":  # without Triton's kernel a tile has four copies in 32 bits
        tile *= 1 + 4 * 2
    # A part of the head in 16 bits, the last hidden states, and their gradient in 32 bits.
    return tile + 2 * min(geometry.vocab, TILE_VOCABULARY) * geometry.hidden + tokens * geometry.hidden * (stream + 4)
