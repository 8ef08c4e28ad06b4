"""The bytes that the formulas say a layer keeps for its backward pass are those that autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from registry.geometry import geometry_of
from registry.train_memory import Training, layer_bytes

SHAPE = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2,
         "vocab_size": 1000, "max_position_embeddings": 2048, "tie_word_embeddings": False}  # fmt: skip
BATCH, LENGTH, RANK = 2, 256, 8


@pytest.mark.training
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("quantize", ["nf4", "none"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_layer_keeps_as_much_as_the_formula_says(
    tmp_path: Path, quantize: Literal["nf4", "none"], packed: bool
) -> None:
    """With PEFT and bitsandbytes as the trainer uses them; three layers less two, so that nothing else counts."""
    kept = [_kept(_model(tmp_path / str(layers), layers, quantize), packed) for layers in (2, 3)]
    measured = (kept[1] - kept[0]) / (BATCH * LENGTH)
    shape = geometry_of({**SHAPE, "num_hidden_layers": 3})
    said = layer_bytes(shape, Training(BATCH, LENGTH, RANK, quantize=quantize, packed=packed))
    assert said == pytest.approx(measured, rel=0.06)


def _model(folder: Path, layers: int, quantize: str) -> Any:
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers))
    plain.to(torch.bfloat16).save_pretrained(folder)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model: Any = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=nf4 if quantize == "nf4" else None
    )
    if quantize == "nf4":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train()


def _kept(model: Any, packed: bool) -> int:
    """Bytes of the storages that a forward pass leaves for the backward pass, without the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # the tensors too, or a freed storage's address would come again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))
    # A pack of rows of 64 tokens: one sequence, whose position ids begin anew.
    given = {"input_ids": rows.view(1, -1), "position_ids": (torch.arange(BATCH * LENGTH) % 64)[None]}
    asked = {**given, "use_cache": False} if packed else {"input_ids": rows}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        out = model.base_model.model.model(**asked)
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
