"""Scales of inputs: powers of two, the papers' formulas, and never worse than none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.solvers.hessians import hessian_of, inputs_of, output_error
from workers.solvers.quantization import Grid, quantize_to_nearest
from workers.solvers.scaling import LARGEST_EXPONENT, activation_aware_scale, power_of_two, smoothing_scale


def rounded(weight: Tensor) -> Tensor:
    return quantize_to_nearest(weight, Grid(4, 32, symmetric=True), clip_search=False).dequantize()


def with_outliers(seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and inputs of which some columns are far larger than the others, as those of language models are."""
    inputs = inputs_of(seed, 128)
    inputs[:, ::17] *= 30
    return torch.randn(48, 128, generator=torch.Generator().manual_seed(seed)), inputs


def test_scales_are_the_nearest_powers_of_two_around_one() -> None:
    scale = power_of_two(torch.tensor([1.0, 2.7, 16.0, 0.26]))
    assert scale.tolist() == [0.5, 1.0, 8.0, 0.125]
    assert torch.equal(scale.to(torch.bfloat16).to(torch.float32), scale)


def test_columns_of_which_nothing_is_known_keep_theirs() -> None:
    scale = power_of_two(torch.tensor([0.0, torch.inf, torch.nan, 4.0, 1.0]))
    assert scale[:3].tolist() == [1.0, 1.0, 1.0]
    assert power_of_two(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert power_of_two(torch.tensor([1e-30, 1e30])).log2().abs().max() == LARGEST_EXPONENT


def test_smoothing_lies_between_the_largest_inputs_and_the_largest_weights() -> None:
    largest = torch.tensor([64.0, 1.0, 4.0, 16.0])
    weights = [torch.tensor([[1.0, 0.5, 0.1, 1.0]]), torch.tensor([[-0.25, 1.0, -1.0, 0.0]])]
    assert smoothing_scale(largest, weights, 0.0).tolist() == [1.0] * 4
    assert smoothing_scale(largest, weights, 1.0).tolist() == [8.0, 0.125, 0.5, 2.0]
    assert smoothing_scale(largest, weights, 0.5).log2().tolist() == [2.0, -2.0, 0.0, 0.0]  # from 1.5, -1.5, -0.5, 0.5


@pytest.mark.parametrize("seed", range(3))
def test_an_activation_aware_scale_errs_less_where_inputs_have_outliers(seed: int) -> None:
    weight, inputs = with_outliers(seed)
    scale = activation_aware_scale([weight], hessian_of(inputs), [rounded])
    plain = output_error(weight, rounded(weight), inputs)
    scaled = output_error(weight, rounded(weight * scale) / scale, inputs)
    assert scaled < 0.8 * plain


def test_the_scale_is_the_best_of_those_tried_for_all_layers_together() -> None:
    weight, inputs = with_outliers(7)
    other = torch.randn(16, 128, generator=torch.Generator().manual_seed(8))
    hessian = hessian_of(inputs)
    scale = activation_aware_scale([weight, other], hessian, [rounded, rounded])

    def error(scale: Tensor) -> float:
        return sum(output_error(each, rounded(each * scale) / scale, inputs) for each in (weight, other))

    sizes = hessian.diagonal().sqrt()
    tried = [power_of_two(sizes.pow(step / 20)) for step in range(20)]
    assert error(scale) == pytest.approx(min(error(each) for each in tried), rel=1e-4)
