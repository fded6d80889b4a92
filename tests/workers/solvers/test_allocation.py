"""Sparsity by layer: exactly as many zeros as were asked for, and never more error than with one sparsity for all."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.solvers.allocation import NUM_STEPS, ErrorCurve, allocate, error_curve
from workers.solvers.pruning import wanda_mask


def error_at(curve: ErrorCurve, num_zeros: int) -> float:
    place = num_zeros / curve.num_weights * NUM_STEPS
    below = min(int(place), NUM_STEPS - 1)
    first, second = float(curve.errors[below]), float(curve.errors[below + 1])
    return first + (place - below) * (second - first)


def curves_of(*weights: Tensor) -> dict[str, ErrorCurve]:
    return {f"layer.{index}": error_curve(weight, torch.ones(weight.shape[1])) for index, weight in enumerate(weights)}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sparsity=st.floats(0.01, 0.99),
    bound=st.floats(0.01, 0.5),
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(8, 60)), min_size=1, max_size=6),
)
def test_the_zeros_add_up_and_stay_within_the_bound(
    seed: int, sparsity: float, bound: float, shapes: list[tuple[int, int]]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    curves = curves_of(*(torch.randn(shape, generator=generator) ** 3 for shape in shapes))
    counts = allocate(curves, sparsity, bound)
    assert sum(counts.values()) == round(sparsity * sum(rows * columns for rows, columns in shapes))
    for name, count in counts.items():
        assert 0 <= count <= curves[name].num_weights
        assert abs(count - sparsity * curves[name].num_weights) <= bound * curves[name].num_weights + 1


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_no_other_split_loses_less(sparsity: float) -> None:
    """Held against every split of two layers' zeros on the curves' steps."""
    generator = torch.Generator().manual_seed(0)
    curves = curves_of(torch.randn(20, 40, generator=generator), torch.randn(20, 40, generator=generator).sign() + 0.01)
    counts = allocate(curves, sparsity, bound=0.1)
    found = sum(error_at(curve, counts[name]) for name, curve in curves.items())
    total, (first, second) = sum(counts.values()), curves.values()
    low, high = round((sparsity - 0.1) * 800), round((sparsity + 0.1) * 800)
    best = min(
        error_at(first, count) + error_at(second, total - count)
        for count in range(low, high + 1)
        if low <= total - count <= high
    )
    assert found <= best + 1e-3


def test_layers_that_lose_more_are_pruned_less() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(64, 64, generator=generator).sign() * (1 + 0.01 * torch.rand(64, 64, generator=generator))
    skewed = torch.randn(64, 64, generator=generator) ** 5
    counts = allocate(curves_of(even, skewed), 0.5, 0.1)
    assert counts["layer.0"] < counts["layer.1"]
    assert counts["layer.1"] - counts["layer.0"] == pytest.approx(0.2 * 64 * 64, abs=64)


def test_a_curve_says_what_wanda_loses() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(16, NUM_STEPS, generator=generator), torch.rand(NUM_STEPS, generator=generator)
    curve = error_curve(weight, norms)
    energy = (weight * norms).square()
    for step, sparsity in ((50, 0.25), (100, 0.5), (150, 0.75)):
        lost = energy[wanda_mask(weight, norms, sparsity, None)].sum() / energy.sum()
        assert float(curve.errors[step]) == pytest.approx(float(lost), rel=1e-4)
    assert all(first <= second for first, second in itertools.pairwise(curve.errors.tolist()))
    assert (float(curve.errors[0]), float(curve.errors[-1])) == pytest.approx((0.0, 1.0))


def test_layers_of_zeros_take_their_share() -> None:
    counts = allocate(curves_of(torch.zeros(8, 16), torch.randn(8, 16)), 0.5, 0.1)
    assert sum(counts.values()) == 128
