"""Factors of low rank: the least error on the inputs, by every other way of finding it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.solvers.low_rank import factors, product, spectrum, whitening
from workers.techniques.low_rank import largest_rank, rank_for

SHAPES = [(24, 40), (40, 24), (32, 32)]


def problem(rows: int, columns: int, num_tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs whose columns are of very different size and depend on each other, and their Hessian."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    mixed = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    inputs = torch.randn(num_tokens, columns, generator=generator) @ mixed
    return weight, inputs, inputs.T @ inputs / num_tokens


def output_error(weight: Tensor, other: Tensor, inputs: Tensor) -> float:
    return float(((weight - other).double() @ inputs.double().T).square().sum() / inputs.shape[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_energy_of_the_discarded_singular_values(shape: tuple[int, int]) -> None:
    weight, inputs, hessian = problem(*shape)
    found = spectrum(weight, whitening(hessian, damping=0.0))
    whole = output_error(weight, torch.zeros_like(weight), inputs)
    for rank in (1, 7, 20):
        out_factor, in_factor = factors(weight, found, rank)
        assert out_factor.shape == (shape[0], rank)
        assert in_factor.shape == (rank, shape[1])
        error = output_error(weight, product(out_factor, in_factor), inputs)
        assert error == pytest.approx(float(found.energies[rank:].sum()), rel=1e-3, abs=1e-6 * whole)
        assert found.lost(rank) == pytest.approx(error / whole, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_factors_of_that_rank_err_less(shape: tuple[int, int]) -> None:
    """The outputs themselves, cut to the rank by their own SVD, are the least error there is: Eckart and Young."""
    weight, inputs, hessian = problem(*shape)
    ours = product(*factors(weight, spectrum(weight, whitening(hessian, damping=0.0)), 8))
    values = torch.linalg.svdvals((weight @ inputs.T).double())
    assert output_error(weight, ours, inputs) == pytest.approx(float(values[8:].square().sum() / 200), rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_svd_errs_more_on_the_inputs(shape: tuple[int, int]) -> None:
    weight, inputs, hessian = problem(*shape)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    plain = left[:, :8] * values[:8] @ right[:8]
    ours = product(*factors(weight, spectrum(weight, whitening(hessian, damping=0.01)), 8))
    assert output_error(weight, ours, inputs) < 0.8 * output_error(weight, plain, inputs)


def test_inputs_that_say_nothing_leave_plain_svd() -> None:
    weight, _, _ = problem(24, 40)
    found = spectrum(weight, whitening(torch.zeros(40, 40), damping=0.0))
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(
        product(*factors(weight, found, 5)), (left[:, :5] * values[:5] @ right[:5]).float(), rtol=1e-4, atol=1e-5
    )


def test_a_hessian_of_fewer_tokens_than_columns_is_enough() -> None:
    weight, inputs, hessian = problem(24, 40, num_tokens=6)
    ours = product(*factors(weight, spectrum(weight, whitening(hessian, damping=0.0)), 6))
    assert output_error(weight, ours, inputs) < 1e-8 * output_error(weight, torch.zeros_like(weight), inputs)


@pytest.mark.parametrize("energy", [0.1, 0.9, 0.999])
def test_the_rank_of_an_energy_is_the_smallest_that_keeps_it(energy: float) -> None:
    weight, _, hessian = problem(24, 40)
    found = spectrum(weight, whitening(hessian, damping=0.0))
    rank = found.rank_of(energy)
    assert found.lost(rank) <= 1 - energy + 1e-12
    assert rank == 1 or found.lost(rank - 1) > 1 - energy


@pytest.mark.parametrize("shape", [*SHAPES, (1, 5), (2, 2)])
def test_the_largest_rank_is_the_last_that_saves_weights(shape: tuple[int, int]) -> None:
    rows, columns = shape
    rank = largest_rank(rows, columns)
    assert rank * (rows + columns) < rows * columns <= (rank + 1) * (rows + columns)
    assert rank_for(1.0, rows, columns) * (rows + columns) == pytest.approx(rows * columns)
