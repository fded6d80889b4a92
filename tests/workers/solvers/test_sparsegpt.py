"""SparseGPT against the algorithm written down in float64, and against masks without compensation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.solvers.hessians import hessian_of, inputs_of, output_error
from workers.solvers import compiled
from workers.solvers.hessian import inverse_factor
from workers.solvers.pruning import magnitude_mask, wanda_mask
from workers.solvers.sparsegpt import BLOCK_COLUMNS, _prune_columns, sparsegpt


def weight_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def solve(
    weight: Tensor, inputs: Tensor, sparsity: float, pattern: tuple[int, int] | None, zeros: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    hessian = hessian_of(inputs)
    factor = inverse_factor(hessian, act_order=False, damping=0.01)
    solved, mask, outcome = sparsegpt(weight, hessian, factor, sparsity, pattern, zeros=zeros)
    return solved, mask, outcome.relative_error


def test_weights_are_those_of_the_algorithm_in_float64() -> None:
    """Algorithm 1 of arXiv:2301.00774, a column at a time, masks chosen by blocks of 128 columns."""
    columns, sparsity = 300, 0.5
    inputs, weight = inputs_of(3, columns), weight_of(24, columns, 1)
    solved, mask, _ = solve(weight, inputs, sparsity, None)
    hessian = hessian_of(inputs).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    exact = weight.double().clone()
    for column in range(columns):
        if column % BLOCK_COLUMNS == 0:
            block = slice(column, column + BLOCK_COLUMNS)
            scores = exact[:, block].square() / upper.diagonal()[block].square()
            # What the block may prune was rounded once for the whole matrix: the masks must agree on the order.
            chosen = mask[:, block]
            assert scores[chosen].max() <= scores[~chosen].min() * (1 + 1e-3)
        error = torch.where(mask[:, column], exact[:, column] / upper[column, column], 0.0)
        exact[:, column:] -= error.unsqueeze(1) * upper[column, column:].unsqueeze(0)
        exact[mask[:, column], column] = 0.0
    assert int(mask.sum()) == round(sparsity * weight.numel())
    torch.testing.assert_close(solved.double(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


def test_columns_that_matter_less_lose_more() -> None:
    columns = 2 * BLOCK_COLUMNS
    weight, inputs = weight_of(32, columns), inputs_of(4, columns)
    inputs[:, :BLOCK_COLUMNS] *= 10.0
    _, mask, _ = solve(weight, inputs, 0.5, None)
    assert int(mask.sum()) == weight.numel() // 2
    assert float(mask[:, :BLOCK_COLUMNS].double().mean()) < 0.4


def test_errors_that_leave_float32_are_not_carried_on() -> None:
    """Inputs that are nearly the same carry all of an error on, and a weight near the end of float32 is soon beyond."""
    inputs, weight = inputs_of(4, 2 * BLOCK_COLUMNS), torch.full((8, 2 * BLOCK_COLUMNS), 3e38)
    hessian = hessian_of(inputs)
    factor = inverse_factor(hessian, act_order=False, damping=0.01)
    solved, mask, outcome = sparsegpt(weight, hessian, factor, 0.5, None)
    assert outcome.damping is None
    assert int(mask.sum()) == weight.numel() // 2
    assert torch.equal(solved, torch.where(mask, 0.0, weight))


def test_a_bar_told_by_some_of_the_rows_is_nearly_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = weight_of(256, 4 * BLOCK_COLUMNS), inputs_of(4, 4 * BLOCK_COLUMNS)
    inputs[:, :BLOCK_COLUMNS] *= 3.0
    _, mask, error = solve(weight, inputs, 0.5, None)
    monkeypatch.setattr("workers.solvers.sparsegpt.NUM_COMPARED", 16 * 4 * BLOCK_COLUMNS)  # 16 of the rows
    _, told, about = solve(weight, inputs, 0.5, None)
    assert int(told.sum()) == int(mask.sum()) == weight.numel() // 2
    assert not torch.equal(told, mask)
    assert about == pytest.approx(error, rel=0.02)


def test_equal_weights_are_pruned_everywhere_alike() -> None:
    weight, inputs = torch.ones(16, 4 * BLOCK_COLUMNS), torch.eye(4 * BLOCK_COLUMNS)
    _, mask, _ = solve(weight, inputs, 0.5, None)
    assert mask.view(16, 4, BLOCK_COLUMNS).sum(dim=(0, 2)).tolist() == [16 * BLOCK_COLUMNS // 2] * 4


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, None), (0.8, None), (0.5, (2, 4)), (0.75, (1, 4))])
def test_compensation_beats_wanda_and_wanda_beats_magnitude(sparsity: float, pattern: tuple[int, int] | None) -> None:
    inputs, weight = inputs_of(5, 256), weight_of(48, 256)
    norms = hessian_of(inputs).diagonal().sqrt()
    solved, _, relative_error = solve(weight, inputs, sparsity, pattern)
    by_wanda = torch.where(wanda_mask(weight, norms, sparsity, pattern), 0.0, weight)
    by_magnitude = torch.where(magnitude_mask(weight, sparsity, pattern), 0.0, weight)
    errors = [output_error(weight, other, inputs) for other in (solved, by_wanda, by_magnitude)]
    assert errors == sorted(errors)
    assert errors[0] < 0.85 * errors[1]
    whole = float((weight.double() @ inputs.double().T).square().sum())
    assert relative_error == pytest.approx(errors[0] / whole, rel=0.01)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 9),
    columns=st.integers(2, 300),
    sparsity=st.floats(0.01, 0.99),
    earlier=st.sampled_from([0.0, 0.2, 0.6]),
)
def test_exactly_as_many_zeros_as_asked_for(
    seed: int, rows: int, columns: int, sparsity: float, earlier: float
) -> None:
    weight = weight_of(rows, columns, seed)
    zeros = magnitude_mask(weight, earlier, None) if earlier else None
    if zeros is not None:
        weight = torch.where(zeros, 0.0, weight)
    solved, mask, _ = solve(weight, inputs_of(seed, columns, 64), sparsity, None, zeros)
    wanted = round(sparsity * weight.numel())
    assert bool((solved[mask] == 0).all())
    assert int(mask.sum()) >= wanted
    if zeros is None:
        assert int(mask.sum()) == wanted
    else:
        assert bool(mask[zeros].all()), "what an earlier stage pruned stays pruned"


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    pattern=st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (3, 5), (90, 200)]),
    columns=st.integers(5, 333),
)
def test_every_group_of_m_keeps_exactly_n(seed: int, pattern: tuple[int, int], columns: int) -> None:
    n, m = pattern
    solved, mask, _ = solve(weight_of(6, columns, seed), inputs_of(seed, columns, 64), 1 - n / m, pattern)
    whole = columns - columns % m
    assert bool(((~mask[:, :whole]).reshape(6, -1, m).sum(dim=-1) == n).all())
    assert not bool(mask[:, whole:].any())
    assert bool((solved[mask] == 0).all())


@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 5)])
def test_the_compiled_loop_and_the_one_of_other_devices_agree(pattern: tuple[int, int] | None) -> None:
    inputs, weight = inputs_of(7, 100), weight_of(16, 100)
    factor = inverse_factor(hessian_of(inputs), act_order=False, damping=0.01).factor
    importance = factor.diagonal().square().reciprocal()
    chosen = torch.zeros_like(weight, dtype=torch.bool) if pattern else magnitude_mask(weight, 0.5, None)
    found = []
    for prune in (compiled.prune_columns, _prune_columns):
        solved, mask = weight.clone(), chosen.clone()
        errors, squared = prune(solved, factor, importance, mask, pattern, 20, 100)
        found.append((solved, mask, errors, torch.tensor(squared)))
    assert torch.equal(found[0][1], found[1][1])
    for one, other in zip(*found, strict=True):
        if one.dtype != torch.bool:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_columns_without_input_are_pruned_first() -> None:
    inputs = inputs_of(2, 64)
    inputs[:, 5] = 0.0
    _, mask, _ = solve(weight_of(8, 64), inputs, 0.1, None)
    assert bool(mask[:, 5].all())


def test_without_a_factor_nothing_is_compensated() -> None:
    inputs, weight = inputs_of(2, 64), weight_of(8, 64)
    hessian = hessian_of(inputs)
    solved, mask, outcome = sparsegpt(weight, hessian, None, 0.5, None)
    assert torch.equal(solved, torch.where(mask, 0.0, weight))
    assert outcome.damping is None
