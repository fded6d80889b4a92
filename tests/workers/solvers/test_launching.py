"""Operations launched as one give what they give one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.solvers.launching import LaunchedAsOne

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on CUDA alone")


def powers(values: Tensor, factors: Tensor | None, *, count: int) -> tuple[Tensor, ...]:
    """``count`` powers of ``values``, times ``factors``."""
    found = [values]
    for _ in range(count):
        found.append(found[-1] * values)
    last = found[-1]
    return (last if factors is None else last * factors,)


def test_without_an_accelerator_the_function_is_called_as_it_is() -> None:
    values = torch.randn(4, 8)
    torch.testing.assert_close(LaunchedAsOne(powers)(values, None, count=3)[0], values**4)


@on_cuda
@pytest.mark.parametrize("has_factors", [False, True])
def test_a_captured_function_reads_its_arguments_anew(has_factors: bool) -> None:
    launched = LaunchedAsOne(powers)
    for shape in ((4, 8), (16, 3), (4, 8)):
        for count in (2, 5):
            values = torch.randn(shape, device="cuda")
            factors = torch.randn(shape, device="cuda") if has_factors else None
            before = values.clone()
            found = launched(values, factors, count=count)[0]
            torch.testing.assert_close(found, powers(values, factors, count=count)[0])
            assert torch.equal(values, before)


@on_cuda
def test_a_result_is_not_overwritten_by_the_next_call() -> None:
    launched = LaunchedAsOne(powers)
    one = torch.full((2, 2), 2.0, device="cuda")
    first = launched(one, None, count=1)[0]
    launched(one * 3, None, count=1)
    assert torch.equal(first, torch.full((2, 2), 4.0, device="cuda"))
