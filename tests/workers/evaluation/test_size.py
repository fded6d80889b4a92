"""What an opened model's weights prove: zeros, and no more values than codes."""

import torch
from torch import Tensor, nn

from tests.workers.opened import opened
from workers.evaluation.size import Packed, layers_off_grid, measure_sparsity, packed_bytes
from workers.formats.opening import Opened
from workers.solvers.quantization import Grid, quantize_to_nearest


def model_of(**weights: Tensor) -> Opened:
    """A model whose modules are linear layers with these weights."""
    model = nn.Module()
    for name, weight in weights.items():
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        model.add_module(name, layer)
    return opened(model)


def test_zeros_are_counted_and_layers_with_too_few_are_named() -> None:
    half = torch.tensor([[0.0, 1.0, 0.0, 2.0], [3.0, 0.0, 0.0, 4.0]])
    few = torch.tensor([[0.0, 1.0, 5.0, 2.0]])
    found = measure_sparsity(model_of(sparse=half, few=few), {"sparse": 0.5, "few": 0.5}, None)
    assert (found.num_weights, found.num_zeros, found.layers_below) == (12, 5, ("few",))
    assert found.fraction == 5 / 12
    model = model_of(sparse=half, few=few)
    assert measure_sparsity(model, {"sparse": 0.5, "few": 0.25}, None).layers_below == ()
    assert measure_sparsity(model, {"sparse": 0.75, "few": 0.25}, None).layers_below == ("sparse",)


def test_n_of_m_is_held_in_every_group_of_columns() -> None:
    clustered = torch.tensor([[0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0]])
    spread = torch.tensor([[0.0, 0.0, 2.0, 1.0, 2.0, 3.0, 0.0, 0.0]])
    found = measure_sparsity(model_of(clustered=clustered, spread=spread), {"clustered": 0.5, "spread": 0.5}, (2, 4))
    assert found.layers_below == ("clustered",)


def test_a_weight_off_its_grid_is_named() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    grid = Grid(3, 32, symmetric=True, scale_dtype=torch.bfloat16)
    values = quantize_to_nearest(weight, grid, clip_search=True).dequantize().to(torch.bfloat16)
    touched = values.clone()
    touched[3, 40:49] = torch.arange(9)
    model = model_of(on=values, off=touched, dense=weight)
    assert layers_off_grid(model, dict.fromkeys(("on", "off", "dense"), Packed(3, 32, 16))) == ["off", "dense"]
    # The same values in groups of 64 may be of two scales, so twice as many.
    assert layers_off_grid(model, {"on": Packed(4, 64, 16)}) == []


def test_packed_bytes_count_codes_scales_and_zero_points() -> None:
    model = model_of(a=torch.zeros(8, 64), b=torch.zeros(4, 32))
    num_weights, num_groups = 8 * 64 + 4 * 32, 8 * 2 + 4
    narrow, wide = Packed(3, 32, 16), Packed(3, 32, 19)
    assert packed_bytes(model, {"a": narrow, "b": narrow}) == (num_weights * 3 + num_groups * 16) // 8
    assert packed_bytes(model, {"a": wide, "b": wide}) == -(-(num_weights * 3 + num_groups * 19) // 8)
    mixed = packed_bytes(model, {"a": narrow, "b": Packed(8, 32, 16)})
    assert mixed == (8 * 64 * 3 + 4 * 32 * 8 + num_groups * 16) // 8
