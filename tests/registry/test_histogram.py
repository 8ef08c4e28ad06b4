"""Histograms of token lengths: what they say of a split, and how they are kept."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest

from registry.histogram import (
    Histogram,
    Lengths,
    histogram_of,
    histogram_path,
    lengths_of,
    load_histogram,
    save_histogram,
)

ROWS = [10, 10, 10, 20, 30, 100]
TRAIN = lengths_of(ROWS)
MADE = Histogram("0123.dir", "f" * 64, {"train": TRAIN, "eval": lengths_of([5]), "test": lengths_of([])})


def test_a_split_is_counted() -> None:
    assert Lengths(((10, 3), (20, 1), (30, 1), (100, 1))) == TRAIN
    assert (TRAIN.rows, TRAIN.tokens, TRAIN.longest, TRAIN.mean) == (6, 180, 100, 30.0)
    assert (TRAIN.over(30), TRAIN.over(29), TRAIN.over(100)) == (1, 2, 0)


@pytest.mark.parametrize(("part", "length"), [(0, 10), (0.5, 10), (0.51, 20), (0.8, 30), (0.99, 100), (1, 100)])
def test_quantiles_are_lengths_that_occur(part: float, length: int) -> None:
    assert TRAIN.quantile(part) == length


@pytest.mark.parametrize("most", [1, 2, 3, 5, 6, 7, None])
def test_fewer_rows_are_alike_and_the_longest_is_among_them(most: int | None) -> None:
    thinned = TRAIN.thinned(most)
    assert thinned.rows == min(most or 6, 6)
    assert thinned.longest == 100
    many = lengths_of(ROWS * 100)
    assert many.thinned(300).mean == pytest.approx(TRAIN.mean, rel=0.01)


def test_a_split_without_rows_has_no_length() -> None:
    empty = lengths_of([])
    assert (empty.rows, empty.longest, empty.mean, empty.quantile(0.5), empty.padded(8)) == (0, 0, 0.0, 0, 0.0)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_padding_to_the_longest_of_a_batch_is_expected_as_it_is_drawn(batch: int) -> None:
    draw = random.Random(3)
    drawn = statistics.fmean(max(draw.choices(ROWS, k=batch)) for _ in range(40_000))
    assert TRAIN.padded(batch) == pytest.approx(drawn, rel=0.02)
    assert TRAIN.padded(1) == pytest.approx(TRAIN.mean)


def test_a_histogram_is_found_again_by_data_and_tokenizer(tmp_path: Path) -> None:
    assert load_histogram(tmp_path, MADE.dataset, MADE.tokenizer) is None
    save_histogram(tmp_path, MADE)
    assert load_histogram(tmp_path, MADE.dataset, MADE.tokenizer) == MADE
    assert load_histogram(tmp_path, "4567.dir", MADE.tokenizer) is None
    assert load_histogram(tmp_path, MADE.dataset, "e" * 64) is None
    assert [each.name for each in (tmp_path / "histograms").iterdir()] == [f"0123.dir-{'f' * 16}.json"]
    assert histogram_of(MADE.as_dict()) == MADE


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"dataset": "0123.dir", "splits": {"train": [[1]]}}', "null"])
def test_a_damaged_file_is_counted_again(tmp_path: Path, text: str) -> None:
    save_histogram(tmp_path, MADE)
    histogram_path(tmp_path, MADE.dataset, MADE.tokenizer).write_text(text, encoding="utf-8")
    assert load_histogram(tmp_path, MADE.dataset, MADE.tokenizer) is None


def test_another_tokenizer_whose_digest_begins_alike_is_not_taken_for_it(tmp_path: Path) -> None:
    save_histogram(tmp_path, MADE)
    assert load_histogram(tmp_path, MADE.dataset, "f" * 63 + "e") is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "histograms").write_text("in the way", encoding="utf-8")
    save_histogram(tmp_path, MADE)
    assert load_histogram(tmp_path, MADE.dataset, MADE.tokenizer) is None
