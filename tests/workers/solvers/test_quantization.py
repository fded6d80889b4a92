"""Grids: nearest codes against brute force in float64, and what the clip search may never do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.solvers import quantization
from workers.solvers.quantization import Grid, choose_scales, quantize_to_nearest


def weight_of(seed: int, rows: int = 8, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def squared_error(weight: Tensor, restored: Tensor) -> Tensor:
    return (weight.double() - restored.double()).square()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 64])
def test_every_code_is_the_nearest_of_its_grid(symmetric: bool, num_bits: int, group_size: int) -> None:
    weight = weight_of(1)
    quantized = quantize_to_nearest(weight, Grid(num_bits, group_size, symmetric), clip_search=False)
    codes = torch.arange(quantized.grid.lowest, quantized.grid.highest + 1, dtype=torch.float64)
    scale = quantized.scale.double().repeat_interleave(group_size, dim=1).unsqueeze(-1)
    zero = quantized.zero_point.double().repeat_interleave(group_size, dim=1).unsqueeze(-1)
    best = ((codes - zero) * scale - weight.double().unsqueeze(-1)).square().amin(dim=-1)
    torch.testing.assert_close(squared_error(weight, quantized.dequantize()), best, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 5, 8])
def test_without_a_search_the_largest_weight_of_each_group_is_exact(num_bits: int) -> None:
    weight, grid = weight_of(7), Grid(num_bits, 32, symmetric=True)
    quantized = quantize_to_nearest(weight, grid, clip_search=False)
    groups, restored = weight.view(-1, 32), quantized.dequantize().view(-1, 32)
    largest = groups.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(restored.gather(1, largest), groups.gather(1, largest), rtol=1e-6, atol=0)
    assert set(quantized.codes.view(-1, 32).gather(1, largest).flatten().tolist()) == {grid.lowest}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), symmetric=st.booleans(), num_bits=st.sampled_from([2, 3, 4, 8]))
def test_the_clip_search_never_makes_a_group_worse(seed: int, symmetric: bool, num_bits: int) -> None:
    weight = weight_of(seed)
    grid = Grid(num_bits, 32, symmetric)
    plain = squared_error(weight, quantize_to_nearest(weight, grid, clip_search=False).dequantize())
    searched = squared_error(weight, quantize_to_nearest(weight, grid, clip_search=True).dequantize())
    per_group = (searched - plain).view(8, 2, 32).sum(dim=-1)
    assert float(per_group.max()) <= 1e-5 * float(plain.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_search_and_torch_search_agree(dtype: torch.dtype, symmetric: bool) -> None:
    weight, importance = weight_of(3, 16, 128), weight_of(4, 1, 128)[0].square()
    grid = Grid(4, 32, symmetric, dtype)
    compiled = choose_scales(weight, grid, clip_search=True, importance=importance)
    plain = quantization._search_scales(weight.view(16, 4, 32), importance.view(1, 4, 32), grid=grid)
    # Errors that tie to the last bit may be ordered differently; nothing else may differ.
    assert float(torch.isclose(compiled[0], plain[0], rtol=1e-6).double().mean()) > 0.98
    assert float((compiled[1] != plain[1]).double().mean()) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip_search", [True, False])
def test_scales_survive_being_stored(dtype: torch.dtype, clip_search: bool) -> None:
    scale, _ = choose_scales(weight_of(5), Grid(4, 32, symmetric=True, scale_dtype=dtype), clip_search=clip_search)
    assert torch.equal(scale, scale.to(dtype).to(torch.float32))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip_search", [True, False])
def test_pruned_weights_and_groups_of_zeros_stay_exactly_zero(symmetric: bool, clip_search: bool) -> None:
    weight = weight_of(6) + 3.0
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    zeros[0] = True
    weight = torch.where(zeros, 0.0, weight)
    restored = quantize_to_nearest(weight, Grid(4, 32, symmetric), clip_search=clip_search, zeros=zeros).dequantize()
    assert bool((restored[zeros] == 0).all())
    assert bool(torch.isfinite(restored).all())


@pytest.mark.parametrize("clip_search", [False, True])
def test_small_weights_of_float16_checkpoints_are_not_lost(clip_search: bool) -> None:
    """An 8-bit scale of weights below 0.008 is less than float16's smallest normal number."""
    weight = 1e-3 * weight_of(4)
    grid = Grid(8, 64, symmetric=True, scale_dtype=torch.float16)
    quantized = quantize_to_nearest(weight, grid, clip_search=clip_search)
    assert torch.equal(quantized.scale.to(torch.float16).to(torch.float32), quantized.scale)
    assert float(squared_error(weight, quantized.dequantize()).sum() / weight.double().square().sum()) < 1e-3


@pytest.mark.parametrize("clip_search", [False, True])
def test_weights_below_the_scales_of_float16_keep_what_float16_can_say(clip_search: bool) -> None:
    step = 2.0**-24  # the smallest number of float16
    weight = torch.randint(-100, 101, (4, 64), generator=torch.Generator().manual_seed(0)) * step
    quantized = quantize_to_nearest(weight, Grid(8, 64, True, torch.float16), clip_search=clip_search)
    assert torch.equal(quantized.dequantize(), weight)
    grid = Grid(8, 64, True, torch.float16, is_float=True)
    torch.testing.assert_close(
        quantize_to_nearest(weight, grid, clip_search=False).dequantize(), weight, rtol=0.07, atol=0
    )


@pytest.mark.parametrize("clip_search", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_numbers_of_a_type_stay_finite_in_it(
    dtype: torch.dtype, num_bits: int, symmetric: bool, clip_search: bool
) -> None:
    largest = torch.finfo(dtype).max
    weight = largest * (2 * torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) - 1)
    weight[torch.arange(64), torch.arange(64) % 32] = largest
    weight[1::2] *= -1
    weight[::4] = weight[::4].abs()
    restored = quantize_to_nearest(weight, Grid(num_bits, 32, symmetric, dtype), clip_search=clip_search).dequantize()
    assert bool(restored.to(dtype).isfinite().all())
    most = 3 / (2**num_bits - 1) + 2 * torch.finfo(dtype).eps
    assert bool(((restored / largest - weight / largest).abs() < most).all())


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_float8_codes_are_within_half_a_step(scale_dtype: torch.dtype) -> None:
    weight = weight_of(5)
    weight[0, 0] = torch.finfo(scale_dtype).max
    quantized = quantize_to_nearest(weight, Grid(8, 64, True, scale_dtype, is_float=True), clip_search=False)
    assert bool(quantized.dequantize().to(scale_dtype).isfinite().all())
    assert quantized.codes.dtype == torch.float8_e4m3fn
    restored = quantized.dequantize()
    # Four significant bits: half a step is 1/16 of a normal number, and 2^-10 scales below.
    allowed = torch.maximum(weight.abs() / 16, quantized.scale * 2**-10) * 1.001
    assert bool(((restored - weight).abs() <= allowed).all())
    assert bool((quantized.codes.to(torch.float32).abs().amax(dim=1) > 400).all())
