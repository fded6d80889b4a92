"""Texts as an encoder reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.models import write_tokenizer
from tests.workers.attempts import TEXTS
from workers.engine.text import chosen_sequences, of_one_length, sequences
from workers.errors import UserError

PARAM = "recipe.calibration.dataset"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 384, is_encoder=True)
    return AutoTokenizer.from_pretrained(folder)


def test_a_text_that_fits_is_what_the_tokenizer_makes_of_it(tokenizer: Any) -> None:
    found = sequences(tokenizer, TEXTS[:5], 512, param=PARAM, cuts=True)
    assert [ids.tolist() for ids in found] == [tokenizer(text)["input_ids"] for text in TEXTS[:5]]


def test_a_longer_text_is_cut_or_loses_its_end_with_special_tokens_around_each_piece(tokenizer: Any) -> None:
    whole = tokenizer(TEXTS[0])["input_ids"]
    pieces = [ids.tolist() for ids in sequences(tokenizer, TEXTS[:1], 10, param=PARAM, cuts=True)]
    assert [token for piece in pieces for token in piece[1:-1]] == whole[1:-1]
    assert all(len(piece) <= 10 and (piece[0], piece[-1]) == (whole[0], whole[-1]) for piece in pieces)
    (truncated,) = sequences(tokenizer, TEXTS[:1], 10, param=PARAM, cuts=False)
    assert truncated.tolist() == [*whole[:9], whole[-1]]


def test_sequences_are_gathered_by_length_without_padding() -> None:
    found = [torch.full((length,), number) for number, length in enumerate((4, 2, 4, 3, 2, 4))]
    gathered = of_one_length(found)
    assert [numbers for numbers, _ in gathered] == [[1, 4], [3], [0, 2, 5]]
    assert [tuple(ids.shape) for _, ids in gathered] == [(2, 2), (1, 3), (3, 4)]
    for numbers, ids in gathered:
        assert all(torch.equal(row, found[number]) for number, row in zip(numbers, ids, strict=True))


def test_a_choice_of_sequences_is_the_seeds() -> None:
    found = [torch.tensor([number]) for number in range(100)]
    chosen = [int(ids) for ids in chosen_sequences(found, 10, 7)]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 10
    assert chosen == [int(ids) for ids in chosen_sequences(found, 10, 7)]
    assert chosen != [int(ids) for ids in chosen_sequences(found, 10, 8)]
    assert len(chosen_sequences(found[:5], 10, 7)) == 5


def test_text_of_a_few_tokens_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError) as caught:
        sequences(tokenizer, ["a"], 64, param=PARAM, cuts=True)
    assert (caught.value.code, caught.value.param) == ("empty_dataset", PARAM)
