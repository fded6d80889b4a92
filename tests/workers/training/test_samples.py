"""The training text as samples: none twice in an epoch, none of the held-out ones among those trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.models import write_tokenizer
from workers.errors import UserError
from workers.techniques.training_options import Augmentation
from workers.training.samples import (
    NOT_SCORED,
    Augmented,
    Order,
    Samples,
    collate,
    divide,
    write_index,
    write_sequences,
)
from workers.training.seeds import seed_of
from workers.training.sides import Sides


def written(
    folder: Path, rows: list[list[int]], labels: list[int] | None = None, is_held_out: list[bool] | None = None
) -> Samples:
    folder.mkdir(parents=True)
    np.array([token for row in rows for token in row], dtype=np.int32).tofile(folder / "tokens.bin")
    write_index(folder, [len(row) for row in rows], labels or [], is_held_out or [False] * len(rows))
    return Samples(folder)


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    samples = written(tmp_path / "samples", [[1, 2, 3], [4], [5, 6]], [0, 1, 0])
    assert [samples.ids(number).tolist() for number in range(3)] == [[1, 2, 3], [4], [5, 6]]
    assert [samples.length(number) for number in range(3)] == [3, 1, 2]
    assert [samples.label(number) for number in range(3)] == [0, 1, 0]


def sides(folder: Path, texts: list[str], fraction: float = 0.1, seed: int = 0) -> Sides:
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Sides(path, fraction, seed)


def test_what_is_held_out_is_never_trained_on_in_any_copy(tmp_path: Path) -> None:
    found = sides(tmp_path, [f"Text  {number % 20} of  all" for number in range(60)] + ["text 3 OF all"])
    kept, seen = ({" ".join(text.lower().split()) for text, _ in found(side)} for side in (True, False))
    assert len(kept) == 2
    assert not kept & seen
    assert len(kept | seen) == 20


def test_which_text_is_held_out_hangs_on_the_text_alone(tmp_path: Path) -> None:
    texts = [f"Text {number}" for number in range(50)]
    first, other = (set(sides(tmp_path, each)(held_out=True)) for each in (texts, texts[::-1]))
    assert first == other
    assert set(sides(tmp_path, texts, seed=1)(held_out=True)) != first


def test_a_text_of_one_document_has_two_sides(tmp_path: Path) -> None:
    book = " ".join(f"word{number}" for number in range(5_000))
    found = sides(tmp_path, [book])
    kept, seen = ("".join(text for text, _ in found(side)) for side in (True, False))
    assert 0 < len(kept) < 0.3 * len(seen)
    assert sorted((kept + " " + seen).split()) == sorted(book.split())


def test_the_last_of_many_texts_may_be_short(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", 384, is_encoder=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    labelled = [(f"text {number}", number % 2) for number in range(1_000)] + [("ok", 0)]
    (tmp_path / "samples").mkdir()
    write_sequences(lambda held_out: labelled[-1:] if held_out else labelled, tokenizer, 32, tmp_path / "samples")
    samples = Samples(tmp_path / "samples")
    assert len(samples) == 1_002
    assert [samples.is_held_out(number) for number in (0, 1_000, 1_001)] == [False, False, True]
    assert [samples.label(number) for number in (0, 1, 1_000)] == [0, 1, 0]


@pytest.mark.parametrize("is_held_out", [[False] * 3 + [True], [False] * 40, [True] * 40])
def test_too_little_text_is_refused(is_held_out: list[bool], tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        divide(written(tmp_path / "samples", [[1, 2]] * len(is_held_out), is_held_out=is_held_out))
    assert (raised.value.code, raised.value.param) == ("too_little_text", "recipe.training.dataset")


def test_no_two_seeds_are_one() -> None:
    seeds = {seed_of(seed, step, number) for seed in (0, 1, 2**31 - 1) for step in range(40) for number in range(40)}
    assert len(seeds) == 3 * 40 * 40
    assert max(seeds) < 2**63


def test_each_sample_is_read_once_an_epoch_and_in_another_order_in_the_next() -> None:
    numbers = torch.arange(100, 110)
    order = Order(numbers, seed=3)
    read = [number for step in range(10) for number in order.batch(step, 3)]
    epochs = [read[:10], read[10:20], read[20:30]]
    assert all(Counter(epoch) == Counter(numbers.tolist()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # Whoever begins in the middle reads the same.
    assert Order(numbers, seed=3).batch(5, 3) == read[15:18]


def test_the_first_epoch_may_have_an_order_of_its_own() -> None:
    numbers = torch.arange(6)
    order = Order(numbers, seed=3, first_epoch=numbers.flip(0))
    assert order.batch(0, 6) == [5, 4, 3, 2, 1, 0]
    assert sorted(order.batch(1, 6)) == [0, 1, 2, 3, 4, 5]


def test_shorter_samples_are_padded_where_nothing_is_scored(tmp_path: Path) -> None:
    samples = written(tmp_path / "samples", [[1, 2, 3], [4, 5]])
    batch = collate(samples, [0, 1], 9, None, causal=True)
    assert batch.ids.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [[2, 3, NOT_SCORED], [5, NOT_SCORED, NOT_SCORED]]


def test_a_classifier_is_asked_for_classes(tmp_path: Path) -> None:
    samples = written(tmp_path / "samples", [[1, 2, 3], [4, 5]], [1, 0])
    batch = collate(samples, [1, 0], 9, None, causal=False)
    assert batch.targets is not None
    assert batch.targets.tolist() == [0, 1]


def test_tokens_are_masked_and_left_out_as_often_as_asked_for(tmp_path: Path) -> None:
    ids = torch.arange(10, 4010)
    changed = Augmented(Augmentation(mask_probability=0.2, delete_probability=0.3), 1, [10, 4009], seed=5)
    aim, read = changed(ids, 0)
    assert aim.numel() / ids.numel() == pytest.approx(0.7, abs=0.03)
    assert float((read == 1).float().mean()) == pytest.approx(0.2, abs=0.03)
    assert [int(each) for each in (aim[0], aim[-1], read[0], read[-1])] == [10, 4009, 10, 4009]  # special ones stay
    assert torch.equal(read[read != 1], aim[read != 1])
    again = changed(ids, 0)
    assert torch.equal(again[1], read)
    assert not torch.equal(changed(ids, 1)[1], read)
