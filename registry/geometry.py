"""The shape of a language model, read from its config.json, and what follows from it: parameters, bytes per token.

`geometry_of` takes any decoder that transformers knows; `KNOWN` has the shapes of bases whose config is not here yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from registry.errors import BaseModelError

# The names that families give to the same number.
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
INTERMEDIATE = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
# Their MLP is two matrices, up and down; all the others have a gate beside them.
UNGATED = ("gpt_neox", "gpt2", "gptj", "gpt_bigcode", "falcon", "phi", "opt", "bloom", "starcoder2", "mpt")
# What LoRA calls the same matrices in EXAONE 3.5 and in fused families, by our own names.
ALIASES = {
    "out_proj": "o_proj", "dense": "o_proj", "c_fc_0": "gate_proj", "c_fc_1": "up_proj", "c_proj": "down_proj",
    "dense_h_to_4h": "up_proj", "dense_4h_to_h": "down_proj", "fc1": "up_proj", "fc2": "down_proj",
}  # fmt: skip
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Geometry:
    """`intermediate` is of one expert where there are several; `vision` counts parameters of an image tower."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    gated: bool = True
    experts: int = 1
    active_experts: int = 1
    max_positions: int = 2048
    vision: int = 0
    window: int | None = None

    @property
    def linear(self) -> int:
        """Parameters of the layers' matrices: what 4-bit quantization takes."""
        return self.layers * self._per_layer(self.experts) + self.vision

    @property
    def active(self) -> int:
        """Parameters that one token meets: the layers' matrices (of its experts only) and the head."""
        return self.layers * self._per_layer(self.active_experts) + self.hidden * self.vocab

    @property
    def embedding(self) -> int:
        return self.hidden * self.vocab

    @property
    def embeddings(self) -> int:
        """Parameters of the input embedding and of the head, which are one matrix where they are tied."""
        return self.embedding * (1 if self.tied else 2)

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        return self.linear + self.embeddings + self.norms

    @property
    def kv_width(self) -> int:
        """Numbers that one token leaves in the KV cache of one layer."""
        return 2 * self.kv_heads * self.head_dim

    def matrices(self) -> dict[str, tuple[int, int, int]]:
        """By name: inputs, outputs and how often it is there in a layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = {
            "q_proj": (self.hidden, q, 1),
            "k_proj": (self.hidden, kv, 1),
            "v_proj": (self.hidden, kv, 1),
            "o_proj": (q, self.hidden, 1),
            "up_proj": (self.hidden, self.intermediate, self.experts),
            "down_proj": (self.intermediate, self.hidden, self.experts),
        }
        return found | ({"gate_proj": (self.hidden, self.intermediate, self.experts)} if self.gated else {})

    def adapter(self, rank: int, targets: str | list[str] = "all-linear") -> int:
        """Parameters of a LoRA adapter on those matrices. A name that is none of the model's counts as the largest."""
        matrices = self.matrices()
        chosen = list(matrices) if isinstance(targets, str) else list(dict.fromkeys(_own_names(targets, matrices)))
        return self.layers * rank * sum((matrices[name][0] + matrices[name][1]) * matrices[name][2] for name in chosen)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _per_layer(self, experts: int) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + router + (3 if self.gated else 2) * self.hidden * self.intermediate * experts


def geometry_of(config: Mapping[str, Any], place: str = "config.json") -> Geometry:
    """Raises BaseModelError for a config that is of no decoder, and names the keys that are missing."""
    text = _text_part(config)
    missing = [names[0] for names in (HIDDEN, LAYERS, HEADS) if _number(text, names) is None]
    missing += [] if _number(text, ("vocab_size",)) else ["vocab_size"]
    if missing:
        raise BaseModelError(f"no {', '.join(missing)} here: this is not the config of a language model", place=place,
                             fix="check base.model; only decoders of text can be trained and served")  # fmt: skip
    hidden, heads = _need(text, HIDDEN), _need(text, HEADS)
    family = str(text.get("model_type", config.get("model_type", "")))
    experts = _number(text, ("num_local_experts", "num_experts", "n_routed_experts")) or 1
    width = _number(text, INTERMEDIATE) or 4 * hidden
    return Geometry(
        hidden=hidden,
        layers=_need(text, LAYERS),
        heads=heads,
        kv_heads=_kv_heads(text, family, heads),
        head_dim=_number(text, ("head_dim",)) or hidden // heads,
        intermediate=(_number(text, ("moe_intermediate_size",)) or width) if experts > 1 else width,
        vocab=_need(text, ("vocab_size",)),
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        gated=family not in UNGATED,
        experts=experts,
        active_experts=(_number(text, ("num_experts_per_tok", "num_experts_per_token")) or 1) if experts > 1 else 1,
        max_positions=_number(text, ("max_position_embeddings", "n_positions", "seq_length")) or 2048,
        vision=_vision(config),
        window=_window(text),
    )


def known_geometry(model: str) -> Geometry | None:
    """The shape of a base by its hub id, where its config.json is not here yet."""
    name = model.rsplit("/", 1)[-1].lower()
    for suffix in ("-instruct", "-chat", "-it", "-hf", "-bnb-4bit"):
        name = name.replace(suffix, "")
    return KNOWN.get(name)


def _own_names(targets: list[str], matrices: Mapping[str, Any]) -> Iterator[str]:
    largest = max(matrices, key=lambda name: sum(matrices[name][:2]))
    for given in targets:
        for name in FUSED.get(given, (ALIASES.get(given, given),)):
            yield name if name in matrices else largest


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Vision and audio models keep the language model's numbers in a part of their own."""
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(config.get(key), dict):
            return _text_part(config[key])
    return config


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _need(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    found = _number(config, names)
    assert found is not None  # geometry_of has looked
    return found


def _kv_heads(text: Mapping[str, Any], family: str, heads: int) -> int:
    # The first Falcon says by a switch that all heads share one; its config has no number for it.
    if family == "falcon" and text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    return _number(text, KV_HEADS) or heads


def _vision(config: Mapping[str, Any]) -> int:
    part = config.get("vision_config")
    if not isinstance(part, dict):
        return 0
    hidden = _number(part, (*HIDDEN, "embed_dim")) or 1024
    layers = _number(part, (*LAYERS, "depth")) or 24
    inner = _number(part, INTERMEDIATE) or 4 * hidden
    return layers * (4 * hidden * hidden + 2 * hidden * inner)


def _window(text: Mapping[str, Any]) -> int | None:
    """Only where every layer has it: Gemma's layers take turns, and half of them look back over everything."""
    kinds = text.get("layer_types") or []
    taken_in_turns = "sliding_window_pattern" in text or str(text.get("model_type", "")).startswith("gemma")
    if taken_in_turns or any(kind != "sliding_attention" for kind in kinds) or not text.get("use_sliding_window", True):
        return None
    return _number(text, ("sliding_window",))


def _llama(
    shape: tuple[int, int, int, int, int, int],
    *,
    tied: bool = False,
    head_dim: int | None = None,
    positions: int = 32768,
) -> Geometry:
    hidden, layers, heads, kv_heads, intermediate, vocab = shape
    width = head_dim or hidden // heads
    return Geometry(hidden, layers, heads, kv_heads, width, intermediate, vocab, tied, max_positions=positions)


# From the config.json of each (those of the Llama family as Lightning-AI/litgpt lists them), without their suffixes.
KNOWN = {
    "smollm2-135m": _llama((576, 30, 9, 3, 1536, 49152), tied=True, positions=8192),
    "smollm2-360m": _llama((960, 32, 15, 5, 2560, 49152), tied=True, positions=8192),
    "smollm2-1.7b": _llama((2048, 24, 32, 32, 8192, 49152), tied=True, positions=8192),
    "tinyllama-1.1b-v1.0": _llama((2048, 22, 32, 4, 5632, 32000), positions=2048),
    "qwen2.5-0.5b": _llama((896, 24, 14, 2, 4864, 151936), tied=True),
    "qwen2.5-1.5b": _llama((1536, 28, 12, 2, 8960, 151936), tied=True),
    "qwen2.5-3b": _llama((2048, 36, 16, 2, 11008, 151936), tied=True),
    "qwen2.5-7b": _llama((3584, 28, 28, 4, 18944, 152064)),
    "qwen2.5-coder-7b": _llama((3584, 28, 28, 4, 18944, 152064)),
    "qwen2.5-14b": _llama((5120, 48, 40, 8, 13824, 152064)),
    "qwen2.5-32b": _llama((5120, 64, 40, 8, 27648, 152064)),
    "qwen2.5-72b": _llama((8192, 80, 64, 8, 29568, 152064)),
    "qwen3-0.6b": _llama((1024, 28, 16, 8, 3072, 151936), tied=True, head_dim=128, positions=40960),
    "qwen3-1.7b": _llama((2048, 28, 16, 8, 6144, 151936), tied=True, head_dim=128, positions=40960),
    "qwen3-4b": _llama((2560, 36, 32, 8, 9728, 151936), tied=True, head_dim=128, positions=40960),
    "qwen3-8b": _llama((4096, 36, 32, 8, 12288, 151936), head_dim=128, positions=40960),
    "qwen3-14b": _llama((5120, 40, 40, 8, 17408, 151936), head_dim=128, positions=40960),
    "qwen3-32b": _llama((5120, 64, 64, 8, 25600, 151936), head_dim=128, positions=40960),
    "llama-2-7b": _llama((4096, 32, 32, 32, 11008, 32000), positions=4096),
    "llama-2-13b": _llama((5120, 40, 40, 40, 13824, 32000), positions=4096),
    "llama-2-70b": _llama((8192, 80, 64, 8, 28672, 32000), positions=4096),
    "llama-3.2-1b": _llama((2048, 16, 32, 8, 8192, 128256), tied=True, positions=131072),
    "llama-3.2-3b": _llama((3072, 28, 24, 8, 8192, 128256), tied=True, positions=131072),
    "llama-3-8b": _llama((4096, 32, 32, 8, 14336, 128256), positions=8192),
    "llama-3.1-8b": _llama((4096, 32, 32, 8, 14336, 128256), positions=131072),
    "llama-3.1-70b": _llama((8192, 80, 64, 8, 28672, 128256), positions=131072),
    "llama-3.3-70b": _llama((8192, 80, 64, 8, 28672, 128256), positions=131072),
    "llama-3-korean-bllossom-8b": _llama((4096, 32, 32, 8, 14336, 128256), positions=8192),
    "llama-3.2-korean-bllossom-3b": _llama((3072, 28, 24, 8, 8192, 128256), tied=True, positions=131072),
    "mistral-7b-v0.3": _llama((4096, 32, 32, 8, 14336, 32768)),
    "mistral-7b-v0.1": _llama((4096, 32, 32, 8, 14336, 32000)),
    "solar-10.7b-v1.0": _llama((4096, 48, 32, 8, 14336, 32000), positions=4096),
    "phi-3-mini-4k": _llama((3072, 32, 32, 32, 8192, 32064), positions=4096),
    "exaone-3.5-2.4b": _llama((2560, 30, 32, 8, 7168, 102400), tied=True),
    "exaone-3.5-7.8b": _llama((4096, 32, 32, 8, 14336, 102400)),
    "polyglot-ko-1.3b": Geometry(2048, 24, 16, 16, 128, 8192, 30080, gated=False),
}
