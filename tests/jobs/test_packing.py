"""Packed rows do not see each other, a step on packs is the step on their rows, and a killed job goes on with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from jobs.claim import OK
from jobs.trainer import run_job
from jobs.trainers.chat_tokens import encode
from jobs.trainers.packing import check_rows_stay_apart, pack
from registry.errors import RecipeError
from registry.histogram import Lengths, lengths_of
from registry.packing import packs
from registry.plan import steps_of
from registry.recipe import Train
from tests.conftest import TinyBase, started
from tests.jobs.test_trainer import Job, make_job, result_of, until, write_split

pytestmark = [pytest.mark.training, pytest.mark.filterwarnings("default")]

LENGTHS = (24, 32, 8, 3)


@pytest.fixture
def make(tiny_base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    monkeypatch.setenv("FT_CACHE", str(tiny_base.cache))

    def made(name: str, count: int = 40, **train: Any) -> Job:
        job = make_job(
            tmp_path / name,
            tiny_base.model,
            tiny_base.cache,
            **{"max_steps": None, "smoke": False, "max_length": 256, **train},
        )
        write_split(job.folder.data, "train", varied(count))
        return job

    return made


def varied(count: int) -> list[dict[str, Any]]:
    """Rows of many lengths, each with an answer of its own."""
    return [
        {"messages": [
            {"role": "user", "content": f"Message {n}" + " is about the parcel" * (n % 7) + ". Which queue?"},
            {"role": "assistant", "content": f"queue {n * 37 % 101}"},
        ]}
        for n in range(count)
    ]  # fmt: skip


def lengths(tiny_base: TinyBase, count: int) -> Lengths:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base.folder)
    return lengths_of(len(encode(tokenizer, row["messages"]).input_ids) for row in varied(count))


def losses(job: Job, epoch: int = 1) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in job.folder.progress() if "loss" in line and line["epoch"] == epoch}


def joined(rows: list[list[int]]) -> list[int]:
    return [id_ for row in rows for id_ in row]


def batch(rows: list[list[int]]) -> dict[str, Any]:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    made = collate([{"input_ids": joined(rows), "seq_lengths": [len(row) for row in rows]}])
    return {name: part for name, part in made.items() if name != "labels"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_has_the_logits_that_it_has_alone(tiny_base: TinyBase, attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base.folder, dtype=torch.float32, attn_implementation=attention)
    check_rows_stay_apart(model.eval())
    torch.manual_seed(1)
    rows = [torch.randint(0, 2048, (length,)).tolist() for length in LENGTHS]
    with torch.no_grad():
        packed = model(**batch(rows), use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])
        seen = model(input_ids=torch.tensor([joined(rows)])).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    assert (seen[LENGTHS[0] :] - alone[LENGTHS[0] :]).abs().max() > 1000 * 1e-5  # where nothing keeps them apart


def test_a_base_whose_attention_lets_rows_see_each_other_is_refused(tiny_base: TinyBase) -> None:
    AttentionInterface.register("without_a_mask", sdpa_attention_forward)
    model = AutoModelForCausalLM.from_pretrained(tiny_base.folder, attn_implementation="without_a_mask")
    with pytest.raises(RecipeError, match="does not keep packed rows apart") as refused:
        check_rows_stay_apart(model)
    assert refused.value.fix == "set train.packing to false"


def test_no_row_is_cut_or_lost_and_the_packs_are_those_of_the_plan() -> None:
    rows = [[at % 250] * (1 + at * 7919 % 96) for at in range(2500)]  # more than TRL packs at a time by itself
    packed = pack(Dataset.from_dict({"input_ids": rows, "labels": rows}), 96)
    found = [
        ids[sum(sizes[:at]) : sum(sizes[: at + 1])]
        for ids, sizes in zip(packed["input_ids"], packed["seq_lengths"], strict=True)
        for at in range(len(sizes))
    ]
    assert sorted(found) == sorted(rows)
    assert packed["labels"] == packed["input_ids"]
    assert pack(Dataset.from_dict({"input_ids": rows, "labels": rows}), 96)[:] == packed[:]
    assert lengths_of(map(len, packed["input_ids"])).counts == packs(lengths_of(map(len, rows)).counts, 96)


def test_a_step_on_packs_is_the_step_on_their_rows(make: Callable[..., Job]) -> None:
    """All rows in one step, so that loss and gradient must be the same."""
    found = []
    for packing, size in ((False, 40), (True, 4), (True, 40)):
        job = make(f"{packing}-{size}", packing=packing, batch=size, accumulate=40 // size, max_steps=1)
        assert run_job(job.folder) == OK
        (line,) = [each for each in job.folder.progress() if "loss" in each]
        result = result_of(job)
        found.append([line["loss"], line["grad_norm"], result["eval_loss"], result["tokens"]])
    assert found[1] == pytest.approx(found[0], rel=0.01)
    assert found[2] == pytest.approx(found[0], rel=0.01)


def test_it_trains_in_4_bits_too(make: Callable[..., Job]) -> None:
    job = make("nf4", packing=True, quantize="nf4", max_steps=2)
    assert run_job(job.folder) == OK
    assert result_of(job)["steps"] == 2


def test_steps_are_those_of_the_plan_and_a_smoke_changes_nothing(tiny_base: TinyBase, make: Callable[..., Job]) -> None:
    there, found = lengths(tiny_base, 90), []
    for smoke in (True, False):
        job = make(f"smoke-{smoke}", 90, packing=True, batch=2, accumulate=2, epochs=2, smoke=smoke)
        assert run_job(job.folder) == OK
        found.append((losses(job), (job.folder.adapter / "adapter_model.safetensors").read_bytes()))
        result = result_of(job)
        number = sum(count for _, count in packs(there.counts, 256))
        assert number < 45
        assert result["steps"] == steps_of(Train(epochs=2), number, 2, 2) == len(losses(job))
        assert result["tokens"] == 2 * there.tokens
        assert 240 < result["longest"] <= 256
    assert found[0] == found[1]


def test_after_a_kill_it_goes_on_with_the_same_packs_in_the_same_order(make: Callable[..., Job]) -> None:
    settings = {"packing": True, "batch": 2, "epochs": 6, "checkpoint_steps": 4, "learning_rate": 5e-3}
    whole, job = make("whole", 120, **settings), make("killed", 120, **settings)
    assert run_job(whole.folder) == OK
    with started(job.command, env={**os.environ, **job.env}) as trainer:
        until(trainer, lambda: len(job.folder.complete_checkpoints()) >= 2)
        trainer.kill()
        trainer.wait(30)
    begun = int(job.folder.complete_checkpoints()[0].name.split("-")[1])
    change = {"after": 1, "class": "out_of_memory", "train": {"batch": 1, "accumulate": 2}, "anew": False}
    job.folder.add_attempt(change)  # half of the batch: a step has as many packs as before
    assert run_job(job.folder) == OK
    assert job.begins() == [0, begun]
    undisturbed, second = losses(whole), losses(job, epoch=2)
    assert list(second) == list(range(begun + 1, max(undisturbed) + 1))
    expected = [undisturbed[step] for step in second]
    assert list(second.values()) == pytest.approx(expected, rel=0.005)
    assert expected[1:] != pytest.approx(expected[:-1], rel=0.005), "another order would show"
