"""Products that need not be exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workers.engine import device
from workers.engine.device import inexact_products

BIAS = 1000.0  # bfloat16 has steps of 4 there


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    transposed: nn.Module = Conv1D(32, 64)  # type: ignore[no-untyped-call]
    made = [nn.Linear(64, 32), nn.Linear(64, 32, bias=False), transposed]
    for layer in made:
        if isinstance(layer.bias, Tensor):
            nn.init.constant_(layer.bias, BIAS)
    return made


@pytest.mark.parametrize("layer", layers(), ids=str)
@torch.inference_mode()
def test_a_linear_layer_rounds_its_factors_and_neither_bias_nor_type(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module
) -> None:
    monkeypatch.setattr(device, "_multiplies_bfloat16", lambda: True)
    inputs = torch.randn(2, 3, 64)
    exact: Tensor = layer(inputs)
    with inexact_products():
        rounded: Tensor = layer(inputs)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    product = exact - BIAS if float(exact.mean()) > BIAS / 2 else exact
    assert torch.linalg.vector_norm(rounded - exact) < 2**-6 * torch.linalg.vector_norm(product)
    assert torch.equal(layer(inputs), exact)


@torch.inference_mode()
def test_where_the_processor_has_no_bfloat16_products_stay_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _precision: None)
    layer, inputs = layers()[0], torch.randn(3, 64)
    exact = layer(inputs)
    with inexact_products():
        assert torch.equal(layer(inputs), exact)
