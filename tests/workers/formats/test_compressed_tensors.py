"""What we compute ourselves of compressed-tensors' format is what the library computes."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from workers.formats.compressed_tensors import input_quantizer, quantizer_of
from workers.techniques.schemes import ActivationGrid


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    "grid", [ActivationGrid(False, False), ActivationGrid(False, True), ActivationGrid(True, True)]
)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_inputs_are_quantized_as_the_library_does_it(grid: ActivationGrid, size: float, folded: bool) -> None:
    inputs = size * torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(0))
    inputs[0, 0] = 0.0
    inputs[0, 1].clamp_(min=0)
    inputs[0, 2].clamp_(max=0)
    inputs[1, :, 5] *= 1000
    if folded:  # as OPT reads its feed-forward layers
        inputs = inputs.reshape(-1, 96)
    arguments = QuantizationArgs(
        num_bits=8, type="float" if grid.is_float else "int", strategy="token", dynamic=True, symmetric=grid.symmetric
    )
    expected = quantizer_of(arguments)(inputs)
    before = inputs.clone()
    found = input_quantizer(grid)(inputs)
    assert torch.equal(found, expected)
    divisor = 2.0 ** torch.arange(-4, 92).remainder(9)
    assert torch.equal(input_quantizer(grid, divisor)(inputs), quantizer_of(arguments)(inputs / divisor))
    assert not torch.equal(found, inputs)
    assert torch.equal(inputs, before)
