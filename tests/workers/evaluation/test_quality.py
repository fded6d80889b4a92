"""Estimates with their errors, against samples whose errors are known."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.workers.opened import opened
from workers.errors import UserError
from workers.evaluation.estimates import TOKENS_PER_BATCH_MEAN, mean_with_error
from workers.evaluation.quality import TokenMeasures, masked_windows, measure, windows_of


def test_the_error_of_independent_values_is_the_textbooks() -> None:
    torch.manual_seed(0)
    values = torch.randn(TOKENS_PER_BATCH_MEAN * 400, dtype=torch.float64)
    estimate = mean_with_error(values)
    assert estimate.value == pytest.approx(float(values.mean()))
    assert estimate.standard_error == pytest.approx(1 / math.sqrt(values.numel()), rel=0.1)


def test_the_error_of_values_like_their_neighbours_is_larger() -> None:
    """A first-order autoregression of 0.9 has √19 times the error of independent values of its variance."""
    torch.manual_seed(0)
    noise = torch.randn(TOKENS_PER_BATCH_MEAN * 400, dtype=torch.float64)
    values, before = torch.empty_like(noise), 0.0
    for index, each in enumerate(noise.tolist()):
        before = 0.9 * before + each
        values[index] = before
    naive = float(values.std()) / math.sqrt(values.numel())
    assert mean_with_error(values).standard_error / naive == pytest.approx(math.sqrt(19), rel=0.2)


def test_ratios_are_paired_and_perplexities_are_exponentials() -> None:
    torch.manual_seed(0)
    original = torch.rand(4096, dtype=torch.float64) * 8
    loss = original + 0.1 + 0.001 * torch.randn(4096, dtype=torch.float64)
    ones = torch.ones(4096, dtype=torch.float64)
    report = TokenMeasures(4, 1025, original, loss, 0.2 * ones, ones).to_report()
    assert report["perplexity"] == pytest.approx(float(loss.mean().exp()))
    assert report["perplexity_ratio"] == pytest.approx(math.exp(0.1), rel=1e-3)
    assert report["perplexity_ratio_standard_error"] < report["perplexity_standard_error"] / 100
    assert (report["kl_divergence"], report["top1_agreement"]) == (pytest.approx(0.2), 1)
    assert (report["num_tokens"], report["num_windows"], report["max_seq_length"]) == (4096, 4, 1025)


def test_a_perplexity_beyond_all_numbers_is_none() -> None:
    class Certain(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            logits = torch.zeros(1, input_ids.shape[1], 4)
            logits[:, :, 0] = 1e6
            return SimpleNamespace(logits=logits)

    with pytest.raises(UserError) as caught:
        measure(opened(Certain()), opened(Certain()), windows_of(torch.tensor([1, 2, 3]), 3, 3), lambda _: None)
    assert caught.value.code == "non_finite_evaluation"


def test_windows_do_not_overlap_and_have_a_token_to_score() -> None:
    windows = windows_of(torch.arange(21), 21, 10)
    assert [window.ids.tolist() for window in windows] == [list(range(10)), list(range(10, 20))]
    assert [window.targets.tolist() for window in windows] == [list(range(1, 10)), list(range(11, 20))]
    with pytest.raises(UserError) as caught:
        windows_of(torch.arange(5), 5, 1)
    assert caught.value.code == "empty_dataset"


def test_a_seventh_of_the_ordinary_tokens_is_masked_and_always_the_same() -> None:
    sequences = [torch.tensor([0, *range(10, 50), 2]), torch.tensor([0, 11, 2]), torch.tensor([0, 2])]
    windows = masked_windows(sequences, 3, frozenset({0, 1, 2, 3}))
    assert [window.positions.numel() for window in windows] == [6, 1]
    for window, ids in zip(windows, sequences[:2], strict=True):
        assert torch.equal(window.targets, ids[window.positions])
        assert set(window.ids[window.positions].tolist()) == {3}
        assert torch.equal(window.ids.index_put((window.positions,), window.targets), ids)
    again = masked_windows(sequences, 3, frozenset({0, 1, 2, 3}))
    assert all(torch.equal(one.positions, other.positions) for one, other in zip(windows, again, strict=True))
    with pytest.raises(UserError) as caught:
        masked_windows(sequences[2:], 3, frozenset({0, 2}))
    assert caught.value.code == "empty_dataset"
