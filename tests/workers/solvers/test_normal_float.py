"""NF4: its table against the paper's definition, and nearest codes against brute force and bitsandbytes' own."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import pytest
import torch
from bitsandbytes import functional as untyped
from torch import Tensor

from workers.solvers.normal_float import NF4, dynamic8, nearest_normal_float, quantize_scales
from workers.solvers.quantization import Grid, QuantizedWeight, quantize_to_normal_float

functional: Any = untyped


def weight_of(rows: int = 32, columns: int = 512) -> Tensor:
    """Rows of very different sizes, pruned weights, a block of zeros, and halfway cases."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 2, rows).unsqueeze(-1)
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    weight[1, :64] = 0
    weight[2, :15] = (NF4[:-1] + NF4[1:]) / 2
    weight[2, 15:64] = 1
    return weight


def quantized(weight: Tensor, group_size: int = 64, *, double_quant: bool = False) -> QuantizedWeight:
    grid = Grid(4, group_size, symmetric=True, is_normal=True)
    return quantize_to_normal_float(weight, grid, double_quant=double_quant)


def packed(codes: Tensor) -> Tensor:
    pairs = codes.to(torch.uint8).view(-1)
    return (pairs[0::2] << 4 | pairs[1::2]).view(-1, 1)


def test_the_table_holds_the_quantiles_that_the_paper_defines() -> None:
    """Equally spaced probabilities from 0.9677083 to 0.5, 7 steps for negative values and 8 for positive ones."""
    outermost = NormalDist().inv_cdf(0.9677083)

    def half(steps: int) -> list[float]:
        probabilities = [0.9677083 + (0.5 - 0.9677083) * step / steps for step in range(steps)]
        return [NormalDist().inv_cdf(probability) / outermost for probability in probabilities]

    expected = [*(-value for value in half(7)), *half(8)]
    torch.testing.assert_close(NF4, torch.tensor(sorted([*expected, 0.0])), rtol=1e-5, atol=1e-6)


def test_both_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(NF4, functional.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic8(), functional.create_dynamic_map())


@pytest.mark.parametrize("group_size", [32, 64, 256])
def test_codes_and_scales_are_those_that_bitsandbytes_chooses(group_size: int) -> None:
    weight = weight_of()
    ours = quantized(weight, group_size)
    theirs, state = functional.quantize_4bit(weight, blocksize=group_size, quant_type="nf4")
    assert torch.equal(ours.scale.view(-1), state.absmax)
    assert torch.equal(packed(ours.codes), theirs)
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("double_quant", [True, False])
def test_every_code_is_the_nearest_under_the_scale_that_is_read_back(double_quant: bool) -> None:
    weight = weight_of()
    found = quantized(weight, double_quant=double_quant)
    scale = found.scale.double().repeat_interleave(64, dim=1)
    best = (NF4.double() * scale.unsqueeze(-1) - weight.double().unsqueeze(-1)).abs().amin(dim=-1)
    error = (found.dequantize().double() - weight.double()).abs()
    assert bool((error - best <= 1e-6 * scale.abs()).all())
    assert bool((found.dequantize()[weight == 0] == 0).all())


def test_scales_of_scales_lose_less_than_bitsandbytes_does() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    theirs = functional.dequantize_4bit(
        *functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    )
    ours = quantized(weight, double_quant=True).dequantize()
    assert float((ours - weight).square().mean()) < float((theirs - weight).square().mean())


def test_each_scale_goes_to_the_nearest_8_bit_code() -> None:
    scale = torch.rand(300, generator=torch.Generator().manual_seed(2))
    found = quantize_scales(scale)
    assert found.scale.numel() == 2
    assert found.offset == float(scale.mean())
    of_each = found.scale.double().repeat_interleave(256)[:300].unsqueeze(-1)
    candidates = dynamic8().double() * of_each + found.offset
    best = (candidates - scale.double().unsqueeze(-1)).abs().amin(dim=-1)
    torch.testing.assert_close((found.dequantize().double() - scale.double()).abs(), best, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("scale", [0.0, 1e-40, -0.5])
def test_odd_scales_give_codes_all_the_same(scale: float) -> None:
    """A code for a scale may stand for next to nothing, or for less than nothing."""
    weight = torch.tensor([[0.0, 0.25, -0.5, 1e-41]])
    codes = nearest_normal_float(weight, torch.tensor([[scale]]))
    assert int(codes[0, 0]) == 7
    values = NF4[codes.to(torch.int64)] * scale
    best = (NF4.double() * scale - weight.double().unsqueeze(-1)).abs().amin(dim=-1)
    torch.testing.assert_close((values.double() - weight.double()).abs(), best, rtol=1e-5, atol=1e-37)
