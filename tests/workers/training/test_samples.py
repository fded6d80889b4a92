"""The training text as samples: none twice in an epoch, none of the held-out ones among those trained on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from workers.errors import UserError
from workers.techniques.training_options import Augmentation
from workers.training.samples import NOT_SCORED, Augmented, Order, Samples, collate, divide, write_index


def written(folder: Path, rows: list[list[int]], labels: list[int] | None = None) -> Samples:
    folder.mkdir(parents=True)
    np.array([token for row in rows for token in row], dtype=np.int32).tofile(folder / "tokens.bin")
    write_index(folder, [len(row) for row in rows], labels or [])
    return Samples(folder)


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    samples = written(tmp_path / "samples", [[1, 2, 3], [4], [5, 6]], [0, 1, 0])
    assert [samples.ids(number).tolist() for number in range(3)] == [[1, 2, 3], [4], [5, 6]]
    assert [samples.length(number) for number in range(3)] == [3, 1, 2]
    assert [samples.label(number) for number in range(3)] == [0, 1, 0]


def test_what_is_held_out_is_never_trained_on_in_any_copy(tmp_path: Path) -> None:
    samples = written(tmp_path / "samples", [[number % 20, 7] for number in range(60)])
    division = divide(samples, 0.1, seed=0)
    kept = {tuple(samples.ids(number).tolist()) for number in division.held_out.tolist()}
    assert len(division.held_out) == 6
    assert not kept & {tuple(samples.ids(number).tolist()) for number in division.training.tolist()}
    others = {(number, 7) for number in range(20)} - kept
    assert others == {tuple(samples.ids(number).tolist()) for number in division.training.tolist()}


@pytest.mark.parametrize("rows", [[[1, 2]] * 3, [[1, 2]] * 40])
def test_too_little_text_is_refused(rows: list[list[int]], tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        divide(written(tmp_path / "samples", rows), 0.1, seed=0)
    assert (raised.value.code, raised.value.param) == ("too_little_text", "recipe.training.dataset")


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
