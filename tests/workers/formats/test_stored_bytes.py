"""What a layer's tensors will take, said before there are any."""

import pytest
import torch

from workers.formats import bitsandbytes, compressed_tensors
from workers.recipe_rules import Packing
from workers.solvers.quantization import FLOAT8, Grid, QuantizedWeight, quantize_to_nearest, quantize_to_normal_float


@pytest.mark.parametrize("columns", [32, 96, 256])
@pytest.mark.parametrize(
    ("grid", "packing"),
    [
        (Grid(4, 32, True, torch.bfloat16), "pack-quantized"),
        (Grid(4, 16, False, torch.float32), "pack-quantized"),
        (Grid(8, 32, True, torch.float16), "pack-quantized"),
        (Grid(8, 32, False, torch.bfloat16), "pack-quantized"),
        (Grid(8, 32, True, torch.bfloat16), "int-quantized"),
        (Grid(8, 16, False, torch.float32), "int-quantized"),
        (Grid(8, 32, True, torch.bfloat16, is_float=True), "float-quantized"),
    ],
)
def test_compressed_tensors_takes_what_was_said(grid: Grid, packing: Packing, columns: int) -> None:
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(0))
    quantized = quantize_to_nearest(weight, grid, clip_search=False)
    assert quantized.codes.dtype == (FLOAT8 if grid.is_float else torch.int8)
    encoded = compressed_tensors.encode(quantized, packing)
    said = compressed_tensors.stored_bytes(24, columns, grid, packing)
    assert said == sum(tensor.nbytes for tensor in encoded.values())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (64, 1024)])
def test_bitsandbytes_takes_what_was_said_and_its_json(rows: int, columns: int, double_quant: bool) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    grid = Grid(4, 64, True, is_normal=True)
    quantized: QuantizedWeight = quantize_to_normal_float(weight, grid, double_quant=double_quant)
    encoded = bitsandbytes.encode(quantized, torch.bfloat16)
    said = bitsandbytes.stored_bytes(rows, columns, grid, double_quant=double_quant)
    json_bytes = sum(tensor.nbytes for name, tensor in encoded.items() if "quant_state" in name)
    assert said + json_bytes == sum(tensor.nbytes for tensor in encoded.values())
