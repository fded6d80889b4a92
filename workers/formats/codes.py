"""The codes of one layer, in the format that a recipe's output names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.formats import bitsandbytes, compressed_tensors
from workers.recipe_parts import Output
from workers.solvers.quantization import Grid, QuantizedWeight


def encode(quantized: QuantizedWeight, stored_dtype: torch.dtype, output: Output) -> dict[str, Tensor]:
    """The tensors that stand for a layer's weight, by their names within the layer.

    ``stored_dtype`` is the type of the checkpoint's weight.
    """
    if output.format == "bitsandbytes":
        return bitsandbytes.encode(quantized, stored_dtype)
    assert output.packing is not None
    return compressed_tensors.encode(quantized, output.packing)


def decode(encoded: Mapping[str, Tensor], grid: Grid, in_features: int, output: Output) -> Tensor:
    """The float32 weight that the tensors of :func:`encode` stand for."""
    if output.format == "bitsandbytes":
        return bitsandbytes.decode(encoded, grid)
    assert output.packing is not None
    return compressed_tensors.decode(encoded, grid, in_features, output.packing)
