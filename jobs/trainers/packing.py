"""Rows packed one behind another (`train.packing`), and the proof that they do not see each other.

A micro-batch is one sequence without padding; position ids that begin anew at each row tell transformers where the
mask has to cut. No row is cut: longer ones than `train.max_length` are an error before this.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from registry.errors import RecipeError

# For SFTConfig: its collator for packs. The rows are packed already: TRL would do it again for the smoke's few rows.
ARGUMENTS: dict[str, Any] = {"packing": True, "eval_packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
# Of two rows in a pack the second one's logits may change by this part of their spread when the first is another.
# They were equal to the bit where rows are kept apart, and differed by two spreads and more where they are not.
APART = 0.02
ROW = 16


def pack(rows: Dataset, max_length: int) -> Dataset:
    """The rows as packs, with `seq_lengths`; the same rows give the same packs in the same order."""
    # In one go: TRL packs a thousand rows at a time, and registry/packing.py would count other packs than there are.
    return pack_dataset(rows, max_length, "bfd", {"batch_size": len(rows)})


def check_rows_stay_apart(model: Any) -> None:
    """Raises RecipeError for a model that lets a packed row see the one before it.

    transformers builds the mask from position ids only for attentions that it knows, and without a word builds none
    where there is a cache: what was trained would have learnt from its neighbours.
    """
    was_training = model.training
    model.eval()
    first, other, second = _three_rows(int(model.config.get_text_config().vocab_size))
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
        beside, beside_other = (_logits(model, [each, second])[-ROW:] for each in (first, other))
    model.train(was_training)
    if float((beside - beside_other).abs().max()) > APART * float(beside.std()):
        raise RecipeError(
            "train.packing: the attention of this base model does not keep packed rows apart",
            fix="set train.packing to false",
        )


def _three_rows(vocabulary: int) -> tuple[list[int], list[int], list[int]]:
    """The third is the first again, which a model that sees it would copy."""
    ids = [at * 7919 % vocabulary for at in range(1, 2 * ROW + 1)]
    return ids[:ROW], ids[ROW:], ids[:ROW]


def _logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """As the trainer asks (TRL's compute_loss), of one pack."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    made = collate([{"input_ids": [id_ for row in rows for id_ in row], "seq_lengths": [len(each) for each in rows]}])
    on_device = {name: part.to(model.device) if torch.is_tensor(part) else part for name, part in made.items()}
    on_device.pop("labels")
    return model(**on_device, use_cache=False).logits[0].float()  # type: ignore[no-any-return]
