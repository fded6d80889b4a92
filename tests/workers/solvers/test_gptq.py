"""GPTQ against the algorithm written down in float64, and against round-to-nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.solvers.hessians import hessian_of, inputs_of, output_error
from workers.solvers.gptq import _quantize_columns, gptq
from workers.solvers.hessian import NotPositiveDefiniteError, inverse_factor, towards_original
from workers.solvers.quantization import Grid, choose_scales, quantize_to_nearest


@pytest.mark.parametrize("columns", [48, 256, 300, 700])
def test_the_hessian_is_the_outer_product_of_the_inputs(columns: int) -> None:
    inputs = inputs_of(0, columns)
    exact = inputs.double().T @ inputs.double() / inputs.shape[0]
    hessian = hessian_of(inputs).double()
    assert torch.equal(hessian, hessian.T)
    torch.testing.assert_close(hessian, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("act_order", [True, False])
def test_the_factor_is_the_cholesky_factor_of_the_inverse(act_order: bool) -> None:
    hessian = hessian_of(inputs_of(1, 96))
    found = inverse_factor(hessian, act_order=act_order, damping=0.01)
    exact = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(96, dtype=torch.float64)
    exact = torch.linalg.cholesky(torch.linalg.inv(exact[found.order][:, found.order]), upper=True)
    torch.testing.assert_close(found.factor.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))
    if act_order:
        assert bool((hessian.diagonal()[found.order].diff() <= 0).all())


def test_damping_grows_until_a_singular_hessian_can_be_factored() -> None:
    hessian = -1e-3 * torch.eye(16)
    hessian[0, 0] = 1.0
    found = inverse_factor(hessian, act_order=True, damping=1e-3)
    assert found.damping == pytest.approx(0.1)


def test_a_hopeless_hessian_is_refused_by_name() -> None:
    with pytest.raises(NotPositiveDefiniteError):
        inverse_factor(torch.full((4, 4), float("nan")), act_order=True, damping=0.01)
    with pytest.raises(NotPositiveDefiniteError):
        inverse_factor(torch.ones(4, 4) - 3 * torch.eye(4), act_order=True, damping=0.01)


def test_dead_columns_are_rounded_to_nearest_and_touch_nothing() -> None:
    inputs = inputs_of(2, 64)
    inputs[:, 5] = 0.0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    hessian = hessian_of(inputs)
    factor = inverse_factor(hessian, act_order=True, damping=0.01)
    grid = Grid(4, 64, symmetric=True)
    quantized, outcome = gptq(weight, hessian, factor, grid, clip_search=False)
    nearest = quantize_to_nearest(weight, grid, clip_search=False)
    assert outcome.num_dead_columns == 1
    assert torch.equal(quantized.codes[:, 5], nearest.codes[:, 5])


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_those_of_the_algorithm_in_float64(act_order: bool, symmetric: bool) -> None:
    """Algorithm 1 of arXiv:2210.17323, a column at a time, without blocks."""
    columns, group_size = 192, 32
    inputs = inputs_of(3, columns)
    weight = torch.randn(12, columns, generator=torch.Generator().manual_seed(1))
    hessian, grid = hessian_of(inputs), Grid(4, group_size, symmetric)
    factor = inverse_factor(hessian, act_order=act_order, damping=0.01)
    scale, zero = choose_scales(weight, grid, clip_search=False)
    quantized, outcome = gptq(weight, hessian, factor, grid, clip_search=False)

    exact = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(exact[factor.order][:, factor.order]), upper=True)
    remaining, expected = weight.double()[:, factor.order], torch.zeros(12, columns)
    for column in range(columns):
        group = int(factor.order[column]) // group_size
        step, offset = scale[:, group].double(), zero[:, group].double()
        code = (torch.round(remaining[:, column] / step) + offset).clamp(grid.lowest, grid.highest)
        error = (remaining[:, column] - (code - offset) * step) / upper[column, column]
        remaining[:, column + 1 :] -= error.unsqueeze(1) * upper[column, column + 1 :]
        expected[:, int(factor.order[column])] = code
    # A value on the edge between two codes may fall to either side in float32, and the rest of its row follows.
    rows_alike = (quantized.codes == expected).all(dim=1).double().mean()
    assert float(rows_alike) >= 0.75
    got, best = (
        output_error(weight, each, inputs) for each in (quantized.dequantize(), restore(expected, scale, zero))
    )
    assert got == pytest.approx(best, rel=0.02)
    whole = output_error(weight, torch.zeros_like(weight), inputs)
    assert outcome.relative_error == pytest.approx(got / whole, rel=0.01)


def restore(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    size = codes.shape[1] // scale.shape[1]
    return (codes - zero.float().repeat_interleave(size, 1)) * scale.repeat_interleave(size, 1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), num_bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans())
def test_the_output_is_closer_than_after_rounding_to_nearest(seed: int, num_bits: int, symmetric: bool) -> None:
    inputs = inputs_of(seed, 64)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    hessian, grid = hessian_of(inputs), Grid(num_bits, 32, symmetric)
    factor = inverse_factor(hessian, act_order=True, damping=0.01)
    ours, _ = gptq(weight, hessian, factor, grid, clip_search=True)
    nearest = quantize_to_nearest(weight, grid, clip_search=False)
    assert output_error(weight, ours.dequantize(), inputs) < output_error(weight, nearest.dequantize(), inputs)


def test_pruned_weights_stay_zero_and_the_others_make_up_for_them() -> None:
    inputs = inputs_of(4, 64)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    zeros = weight.abs() < 0.6
    weight = torch.where(zeros, 0.0, weight)
    hessian, grid = hessian_of(inputs), Grid(4, 32, symmetric=False)
    factor = inverse_factor(hessian, act_order=True, damping=0.01)
    ours, _ = gptq(weight, hessian, factor, grid, clip_search=True, zeros=zeros)
    nearest = quantize_to_nearest(weight, grid, clip_search=True, zeros=zeros)
    assert bool((ours.dequantize()[zeros] == 0).all())
    assert output_error(weight, ours.dequantize(), inputs) < output_error(weight, nearest.dequantize(), inputs)


def test_compiled_columns_and_torch_columns_agree() -> None:
    from workers.solvers import compiled

    inputs = inputs_of(5, 300)
    weight = torch.randn(24, 300, generator=torch.Generator().manual_seed(3))
    grid = Grid(4, 300, symmetric=True)
    factor = inverse_factor(hessian_of(inputs), act_order=True, damping=0.01)
    scale, zero = choose_scales(weight, grid, clip_search=False)
    zeros = weight.abs() < 0.1
    arguments = (factor.factor, scale, zero, factor.order // 300, zeros, grid.lowest, grid.highest, 128)
    codes, error = compiled.quantize_columns(weight.clone(), *arguments)
    plain_codes, plain_error = _quantize_columns(weight.clone(), *arguments)
    assert float((codes == plain_codes).double().mean()) > 0.99
    assert error == pytest.approx(plain_error, rel=0.01)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_result_does_not_depend_on_the_number_of_solver_threads(num_threads: int) -> None:
    weight, grid = torch.randn(7, 64, generator=torch.Generator().manual_seed(4)), Grid(4, 32, symmetric=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        found, _ = choose_scales(weight, grid, clip_search=True)
    finally:
        torch.set_num_threads(before)
    one, _ = choose_scales(weight[:1], grid, clip_search=True)
    assert torch.equal(found[:1], one)


def test_errors_that_leave_float32_are_not_carried_on() -> None:
    weight = (torch.rand(8, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 3e38
    hessian, grid = hessian_of(inputs_of(4, 256)), Grid(2, 32, symmetric=True)
    factor = inverse_factor(hessian, act_order=True, damping=0.01)
    quantized, outcome = gptq(weight, hessian, factor, grid, clip_search=False)
    assert torch.equal(quantized.codes, quantize_to_nearest(weight, grid, clip_search=False).codes)
    assert outcome.damping is None
    assert 0.05 < outcome.relative_error < 0.5


def test_the_weight_that_is_aimed_at_gives_the_original_output_on_the_changed_input() -> None:
    torch.manual_seed(0)
    original = inputs_of(3, 64)
    changed = original + 0.3 * torch.randn(original.shape)
    weight = torch.randn(8, 64)
    tokens = original.shape[0]
    hessian = hessian_of(changed)
    drift = (original - changed).T @ changed / tokens * (hessian[0, 0] / (changed.T @ changed / tokens)[0, 0])
    for act_order in (False, True):
        factor = inverse_factor(hessian, act_order=act_order, damping=1e-6)
        aimed = towards_original(weight, drift, factor, strength=1.0)
        expected = torch.linalg.lstsq(changed.double(), (original @ weight.T).double()).solution.T
        torch.testing.assert_close(aimed.double(), expected, rtol=1e-2, atol=1e-2)
