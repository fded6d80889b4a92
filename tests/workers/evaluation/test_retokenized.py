"""A text that two tokenizers write differently: what is compared, against a computation by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.workers.opened import opened
from workers.errors import UserError
from workers.evaluation.pieces import Pair, Piece
from workers.evaluation.retokenized import (
    measure_retokenized,
    paired_contexts,
    paired_masked_windows,
    paired_sequences,
    paired_windows,
)


class Bigrams(torch.nn.Module):
    """Logits that hang on one token alone."""

    device = torch.device("cpu")

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


class Names:
    """A tokenizer as far as it is asked here."""

    all_special_ids = (0,)
    mask_token_id = 1

    def __init__(self, *names: str) -> None:
        self._names = names

    def get_vocab(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self._names)}


ALL, FEWER = Names("<s>", "<mask>", "a", "b", "gone", "c"), Names("<s>", "<mask>", "a", "b", "c")
PAIR = Pair(ALL, FEWER)
A, B, C = (Piece(([old], [new]), is_same=True) for old, new in ((2, 2), (3, 3), (5, 4)))
REWRITTEN = Piece(([4, 2], [3, 4, 4]), is_same=False)


@pytest.fixture
def tables() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 6, generator=generator), torch.randn(5, 5, generator=generator)


def measured(tables: tuple[torch.Tensor, torch.Tensor], windows: Any) -> Any:
    original, artifact = (opened(Bigrams(table)) for table in tables)
    return measure_retokenized(original, artifact, windows, PAIR, lambda _: None)


def test_a_loss_is_the_sum_over_a_piece_shared_among_the_original_s_tokens(
    tables: tuple[torch.Tensor, torch.Tensor],
) -> None:
    old, new = (table.double().log_softmax(dim=-1) for table in tables)
    measures = measured(tables, paired_windows([A, B, REWRITTEN, C], 100, 100))
    # a b gone a c, and a b b c c c
    expected = [-old[2, 3], -old[3, 4], -old[4, 2], -old[2, 5]]
    torch.testing.assert_close(measures.original_loss, torch.stack(expected), rtol=0, atol=1e-5)
    rewritten = -(new[3, 3] + new[3, 4] + new[4, 4]) / 2
    expected = [-new[2, 3], rewritten, rewritten, -new[4, 4]]
    torch.testing.assert_close(measures.loss, torch.stack(expected), rtol=0, atol=1e-5)
    assert measures.num_retokenized == 2
    # At b and at c both write the same token, after what each wrote before.
    kept = [0, 1, 2, 3, 5]
    divergences, agreements = [], []
    for before, after in ((2, 2), (2, 4)):
        restricted = tables[0].double()[before, kept].log_softmax(dim=-1)
        divergences.append(float((restricted.exp() * (restricted - new[after])).sum()))
        first = int(tables[0][before].argmax())
        agreements.append(float(first in kept and kept.index(first) == int(tables[1][after].argmax())))
    assert measures.divergence.tolist() == pytest.approx(divergences, abs=1e-5)
    assert measures.agreement.tolist() == agreements


def test_a_choice_that_the_artifact_has_not_is_disagreement() -> None:
    before, after = torch.zeros(6, 6), torch.zeros(5, 5)
    before[:, 4], before[:, 5], after[:, 4] = 2.0, 1.0, 1.0
    windows = paired_windows([A, C, B], 100, 100)
    assert measured((before, after), windows).agreement.tolist() == [0, 0]
    before[:, 4] = 0.0
    assert measured((before, after), windows).agreement.tolist() == [1, 1]


def test_where_nothing_is_written_alike_nothing_is_said_of_agreement(
    tables: tuple[torch.Tensor, torch.Tensor],
) -> None:
    report = measured(tables, paired_windows([A, REWRITTEN], 100, 100)).to_report()
    assert report["num_tokens"] == 2
    assert "kl_divergence" not in report
    assert "top1_agreement" not in report


def test_a_masked_piece_is_masked_as_a_whole() -> None:
    special = Piece(([0], [0]), is_same=True)
    (window,) = paired_masked_windows([([special], [REWRITTEN], [special])], PAIR)
    assert (window.original.ids.tolist(), window.artifact.ids.tolist()) == ([0, 1, 1, 0], [0, 1, 1, 1, 0])
    assert (window.original.targets.tolist(), window.artifact.targets.tolist()) == ([4, 2], [3, 4, 4])
    assert (window.of_original.tolist(), window.of_artifact.tolist()) == ([0, 0], [0, 0, 0])
    with pytest.raises(UserError) as caught:
        paired_masked_windows([([special], [], [special])], PAIR)
    assert caught.value.code == "empty_dataset"


def test_contexts_are_scored_where_enough_was_seen() -> None:
    text = [A, B, REWRITTEN, C, A, A, REWRITTEN, B]  # 10 tokens, and 12
    (window,) = paired_contexts(text, 10, 12, 6)
    # Before the second a the artifact has read six tokens: all that follows is scored.
    assert window.original.targets.tolist() == [2, 2, 4, 2, 3]
    assert window.artifact.targets.tolist() == [2, 2, 3, 4, 4, 3]
    (window,) = paired_contexts(text, 10, 12, 5)
    assert window.artifact.targets.tolist() == [2, 3, 4, 4, 3]
    # No model reads more than the length, and a piece is scored on both sides or on none.
    (window,) = paired_contexts(text, 9, 6, 3)
    assert window.artifact.ids.tolist() == [2, 3, 3, 4, 4, 4]
    assert (window.original.targets.tolist(), window.artifact.targets.tolist()) == ([5], [4])
    with pytest.raises(UserError) as caught:
        paired_contexts([A, B], 2, 8, 4)
    assert caught.value.code == "empty_dataset"


def test_a_long_text_is_cut_with_special_tokens_around_each_part() -> None:
    special = Piece(([0], [0]), is_same=True)
    found = paired_sequences([([special], [A, B, REWRITTEN, C], [special])] * 2, 9, 5)
    assert [body for _, body, _ in found] == [[A, B], [REWRITTEN], [C]]
    assert all((begin, end) == ([special], [special]) for begin, _, end in found)
