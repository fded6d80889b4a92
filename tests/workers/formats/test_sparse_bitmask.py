"""The bitmask form of a weight gives it back bit for bit, and is only taken where it is smaller."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.formats.sparse_bitmask import decode, encode

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def sparse(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) >= density, 0.0)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 40),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_a_weight_comes_back_bit_for_bit(
    rows: int, columns: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    weight = sparse(rows, columns, density, dtype, seed)
    weight[0, 0] = -0.0
    encoded = encode("a.weight", weight)
    decoded = decode(encoded)
    assert decoded.keys() == {"a.weight"}
    assert same_bits(decoded["a.weight"], weight)
    assert sum(tensor.nbytes for tensor in encoded.values()) <= weight.nbytes


def test_bits_are_in_the_order_that_the_loader_tells() -> None:
    weight = sparse(3, 24, 0.4, torch.bfloat16, 0)
    encoded = encode("a.weight", weight)
    bitmask, values = encoded["a.weight_bitmask"], iter(encoded["a.weight_values"])
    assert (bitmask.dtype, tuple(bitmask.shape)) == (torch.uint8, (3, 3))
    for row in range(3):
        for column in range(24):
            bit = int(bitmask[row, column // 8]) >> (column % 8) & 1
            assert float(weight[row, column]) == (float(next(values)) if bit else 0.0)
    assert next(values, None) is None


def test_a_weight_whose_bitmask_gains_nothing_stays_as_it_is() -> None:
    # A bit for each 16-bit weight is won back from a sixteenth of zeros on, not before.
    weight = torch.ones(4, 32, dtype=torch.bfloat16)
    weight[:, :2] = 0
    assert encode("a.weight", weight).keys() == {"a.weight"}
    weight[0, 2] = 0
    assert encode("a.weight", weight).keys() == {"a.weight_bitmask", "a.weight_values"}
    assert encode("a.weight", torch.zeros(4, 30)).keys() == {"a.weight"}


def test_a_weight_that_lies_transposed_is_read_in_its_own_order() -> None:
    weight = sparse(16, 8, 0.5, torch.float32, 1).T
    assert torch.equal(decode(encode("a.weight", weight))["a.weight"], weight)
