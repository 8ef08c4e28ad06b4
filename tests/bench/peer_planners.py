"""What two other estimators say, in their own environment: questions on stdin, answers on stdout, both JSON.

Run by tests/bench/bench_planner.py, never imported: these packages are not ours.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

MIB, GIB = 1024**2, 1024**3
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    questions = json.load(sys.stdin)
    peers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"fitcheck": fitcheck, "canifinetune": canifinetune}
    print(json.dumps({name: _answers(ask, questions) for name, ask in peers.items()}))


def fitcheck(question: dict[str, Any]) -> dict[str, Any]:
    """It has one stack (transformers with full logits), and no model without a gate in its MLP."""
    from fitcheck.config_parser import ModelConfig  # type: ignore[import-not-found]
    from fitcheck.estimator import TrainingConfig, estimate  # type: ignore[import-not-found]
    from fitcheck.gpu_db import GpuSpec  # type: ignore[import-not-found]

    shape, training = question["geometry"], question["training"]
    if not shape["gated"]:
        raise ValueError("an MLP without a gate")
    model = ModelConfig("model", question["parameters"], shape["hidden"], shape["layers"], shape["heads"],
                        shape["kv_heads"], shape["intermediate"], shape["vocab"], shape["head_dim"],
                        shape["tied"])  # fmt: skip
    asked = TrainingConfig(
        precision="bf16",
        quantization="nf4" if training["quantize"] == "nf4" else "none",
        double_quant=training["quantize"] == "nf4" and training["double_quant"],
        optimizer="adamw" if training["optimizer"] == "adamw" else "adamw8bit",
        batch_size=training["batch"],
        seq_len=training["longest"],
        lora_rank=training["rank"],
        lora_targets=_targets(training),
        grad_checkpoint=training["checkpointing"],
        flash_attn=training["attention"] == "flash",
    )
    usable = question["size"] // MIB * 94 // 100
    report = estimate(model, asked, GpuSpec("card", question["size"] // MIB, usable))
    overhead = report.overhead_mib if question["allocated"] else 0
    return {"bytes": (report.total_mib - overhead) * MIB, "fits": report.verdict == "safe"}


def canifinetune(question: dict[str, Any]) -> dict[str, Any]:
    """It knows transformers with the stock loss or Liger's; the latter is asked where the stack fuses its loss."""
    from canifinetune.estimator.memory import EstimateRequest, estimate  # type: ignore[import-not-found]

    shape, training = question["geometry"], question["training"]
    fused = training["stack"] in ("unsloth", "torchtune", "torchtune-offload")
    four_bit = "nf4_double_quant" if training["double_quant"] else "nf4"
    override = {
        "family": "llama" if shape["gated"] else "gpt_neox", "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"], "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"], "intermediate_size": shape["intermediate"],
        "vocab_size": shape["vocab"], "tie_word_embeddings": shape["tied"], "total_params": question["parameters"],
    }  # fmt: skip
    # It has no list of matrices, only these; the nearest is asked.
    scope = "conservative" if set(_targets(training)) == {"q_proj", "v_proj"} else "all_linear"
    found = estimate(EstimateRequest(
        model_id="local/model", method="qlora" if training["quantize"] == "nf4" else "lora",
        quantization=four_bit if training["quantize"] == "nf4" else "none",
        seq_len=training["longest"], micro_batch_size=training["batch"], lora_rank=training["rank"],
        lora_target_scope=scope, optimizer="adamw_torch" if training["optimizer"] == "adamw" else training["optimizer"],
        gradient_checkpointing=training["checkpointing"], loss_backend="liger" if fused else "stock",
        attention_implementation="sdpa" if training["attention"] == "flash" else "eager",
        gpu_vram_gb=question["size"] / GIB, override=override, use_network=False,
    ))  # fmt: skip
    memory = found.memory
    beside = memory.safety_margin_gb + (memory.cuda_overhead_gb if question["allocated"] else 0)
    return {"bytes": (memory.total_estimated_gb - beside) * GIB, "fits": found.feasible == "yes"}


def _targets(training: dict[str, Any]) -> list[str]:
    return ALL if training["targets"] == "all-linear" else list(training["targets"])


def _answers(ask: Callable[[dict[str, Any]], dict[str, Any]], questions: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for question in questions:
        try:
            found[question["id"]] = ask(question)
        except Exception as error:  # what a peer cannot take, it says in its own way
            print(f"{ask.__name__}: {question['id']}: {error}", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
