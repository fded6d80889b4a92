"""Passes over activations: to the bit what the operations they stand for give, on any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from workers.solvers.activations import _round_tokens, column_sums, round_tokens


@pytest.fixture(params=[1, 2, 5])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def activations(size: float = 1.0) -> torch.Tensor:
    inputs = size * torch.randn(3, 40, 97, generator=torch.Generator().manual_seed(0))
    inputs[0, 0] = 0.0
    inputs[0, 1].clamp_(min=0)
    inputs[0, 2].clamp_(max=0)
    inputs[1, :, 5] *= 1000
    return inputs


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_tokens_are_rounded_as_by_the_operations_of_other_devices(
    size: float, is_transposed: bool, symmetric: bool
) -> None:
    inputs = activations(size)
    if is_transposed:
        inputs = inputs.transpose(0, 1)
    divisor = 2.0 ** torch.randint(-3, 4, (97,), generator=torch.Generator().manual_seed(1))
    before = inputs.clone()
    expected = _round_tokens(inputs, symmetric=symmetric)
    assert torch.equal(round_tokens(inputs, None, symmetric=symmetric), expected)
    expected = _round_tokens(inputs / divisor, symmetric=symmetric)
    assert torch.equal(round_tokens(inputs, divisor, symmetric=symmetric), expected)
    assert torch.equal(inputs, before)


def test_without_symmetry_a_token_has_255_steps_from_its_smallest_value_to_its_largest() -> None:
    inputs = activations()
    inputs[2] = inputs[2].abs() + 1.0  # whose codes begin at zero all the same
    low, high = inputs.amin(dim=-1).clamp(max=0), inputs.amax(dim=-1).clamp(min=0)
    error = (round_tokens(inputs, None, symmetric=False) - inputs).abs().amax(dim=-1)
    assert bool((error <= (high - low) / 255 * 0.5001).all())
    symmetric_error = (round_tokens(inputs, None, symmetric=True) - inputs).abs().amax(dim=-1)
    assert bool((symmetric_error[2] > 1.9 * error[2]).all())


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other(value: float, symmetric: bool) -> None:
    inputs = activations()
    inputs[1, 7, 3] = value
    found = round_tokens(inputs, None, symmetric=symmetric)
    expected = _round_tokens(inputs, symmetric=symmetric)
    assert torch.equal(found.isnan(), expected.isnan())
    assert bool(found[1, 7].isnan().any())
    assert not bool(found[1, 8].isnan().any())


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_sums_of_columns_are_those_of_float64(size: float) -> None:
    rows = activations(size).view(-1, 97)
    squares, largest = column_sums(rows)
    torch.testing.assert_close(squares, rows.double().square().sum(dim=0), rtol=1e-12, atol=0)
    assert torch.equal(largest, rows.abs().amax(dim=0))


def test_the_sum_of_a_column_that_is_not_finite_is_not() -> None:
    rows = activations().view(-1, 97)
    rows[3, 4], rows[5, 6] = float("nan"), float("inf")
    squares, _ = column_sums(rows)
    assert (~squares.isfinite()).nonzero().flatten().tolist() == [4, 6]
