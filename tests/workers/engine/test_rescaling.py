"""A scale taken over by what makes an input: the product stays what it was, to the last bit where it can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.architectures import Producer
from workers.engine.layer import Layer
from workers.engine.rescaling import take_over
from workers.solvers.quantization import Grid, quantize_to_nearest

SCALE = torch.tensor([0.25, 1.0, 2.0, 64.0])


def taken_over(
    producer: Producer, stored: dict[str, Tensor], made: Layer | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    changed: dict[str, Tensor] = {}
    return changed, take_over(producer, "norm", SCALE, stored.get, changed, made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_is_divided_without_rounding(dtype: torch.dtype) -> None:
    weight, bias = torch.tensor([0.3, -1.7, 0.0, 2.2], dtype=dtype), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=dtype)
    changed, scale = taken_over(Producer("norm", "norm"), {"norm.weight": weight, "norm.bias": bias})
    inputs = torch.randn(8, 4)
    before, after = (
        inputs * weight.float() + bias.float(),
        inputs * changed["norm.weight"].float() + changed["norm.bias"].float(),
    )
    assert changed["norm.weight"].dtype == dtype
    assert scale.tolist() == [0.25, 1.0, 1.0, 64.0], "nothing comes through a weight of zero but the bias"
    assert torch.equal(before / scale, after)


def test_a_norm_that_adds_one_tells_the_scale_that_it_really_has() -> None:
    weight = torch.tensor([0.31, -0.9, 0.0, 1.7], dtype=torch.bfloat16)
    changed, scale = taken_over(Producer("norm", "norm_plus_one"), {"norm.weight": weight})
    torch.testing.assert_close((1 + changed["norm.weight"].float()) * scale, 1 + weight.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(scale, SCALE, rtol=0.5, atol=0)


@pytest.mark.parametrize("stores_codes", [True, False])
def test_a_linear_layer_gives_divided_rows_after_it_was_quantized(stores_codes: bool) -> None:
    torch.manual_seed(0)
    layer = Layer("norm", torch.randn(4, 32), torch.bfloat16, stores_codes=stores_codes)
    layer.quantized = quantize_to_nearest(layer.weight, Grid(4, 16, True, torch.bfloat16), clip_search=False)
    before = layer.effective_weight()
    changed, scale = taken_over(Producer("norm", "linear"), {"norm.bias": torch.ones(4, dtype=torch.bfloat16)}, layer)
    assert torch.equal(layer.effective_weight() * scale.unsqueeze(-1), before)
    assert torch.equal(scale, SCALE)
    assert changed["norm.bias"].tolist() == [4.0, 1.0, 0.5, 1 / 64]


def test_a_row_whose_scale_would_be_rounded_is_left_alone() -> None:
    weight = torch.full((4, 16), 0.01)
    layer = Layer("norm", weight, torch.float16)
    layer.quantized = quantize_to_nearest(weight, Grid(8, 16, True, torch.float16), clip_search=False)
    before = layer.effective_weight()
    _, scale = taken_over(Producer("norm", "linear"), {}, layer)
    assert torch.equal(layer.effective_weight() * scale.unsqueeze(-1), before)
    stored = layer.quantized.scale
    assert torch.equal(stored.to(torch.float16).to(torch.float32), stored)
