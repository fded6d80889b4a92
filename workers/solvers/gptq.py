"""GPTQ on one weight (Frantar et al. 2022, arXiv:2210.17323, algorithm 1), with static groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.solvers import compiled
from workers.solvers.hessian import InverseFactor, Outcome, energy_of
from workers.solvers.launching import LaunchedAsOne
from workers.solvers.quantization import Grid, QuantizedWeight, choose_scales, quantize_to_nearest

BLOCK_COLUMNS = 128


def gptq(
    weight: Tensor,
    hessian: Tensor,
    factor: InverseFactor | None,
    grid: Grid,
    *,
    clip_search: bool,
    zeros: Tensor | None = None,
) -> tuple[QuantizedWeight, Outcome]:
    """Quantize ``weight`` (float32, rows × K) so that its product with the calibration inputs changes least.

    ``hessian`` is K × K and symmetric, ``factor`` what :func:`workers.solvers.hessian.inverse_factor` made of it, or
    None to round to nearest, as is done where errors cannot be carried on within float32. Scales are chosen before any
    column changes (static groups), so a column keeps its group whatever the order. Pruned weights (``zeros``) stay
    exactly zero and their error is compensated as well.
    """
    if factor is None:
        quantized = quantize_to_nearest(weight, grid, clip_search=clip_search, zeros=zeros)
        change = weight - quantized.dequantize()
        return quantized, Outcome.uncompensated(change, energy_of(weight, hessian), hessian)
    scale, zero_point = choose_scales(
        weight, grid, clip_search=clip_search, importance=hessian.diagonal().contiguous() if clip_search else None
    )
    order = factor.order
    group_of = order // grid.group_size
    ordered = weight[:, order].contiguous()
    pruned = None if zeros is None else zeros[:, order].contiguous()
    quantize = compiled.quantize_columns if weight.device.type == "cpu" else _quantize_columns
    energy = energy_of(weight, hessian)
    codes, squared_error = quantize(
        ordered, factor.factor, scale, zero_point, group_of, pruned, grid.lowest, grid.highest, BLOCK_COLUMNS
    )
    del ordered
    if not math.isfinite(squared_error):  # somewhere the errors that were carried on left float32
        return gptq(weight, hessian, None, grid, clip_search=clip_search, zeros=zeros)
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    quantized = QuantizedWeight(restored, scale, zero_point, grid)
    return quantized, Outcome.solved(quantized.dequantize().sub_(weight), squared_error, energy, factor)


def _quantize_columns(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_of: Tensor,
    pruned: Tensor | None,
    lowest: int,
    highest: int,
    block_columns: int,
) -> tuple[Tensor, float]:
    """The same as :func:`workers.solvers.compiled.quantize_columns`, for devices other than the CPU."""
    rows, columns = weight.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=weight.device)
    scales, zeros = scale[:, group_of], zero_point.to(torch.float32)[:, group_of]
    diagonal = factor.diagonal()
    squared_error = torch.zeros((), dtype=torch.float64, device=weight.device)
    for first in range(0, columns, block_columns):
        last = min(first + block_columns, columns)
        here = slice(first, last)
        codes[:, here], errors = _quantize_block(
            weight[:, here],
            factor[here, here],
            scales[:, here],
            zeros[:, here],
            None if pruned is None else pruned[:, here],
            lowest=lowest,
            highest=highest,
        )
        errors /= diagonal[here]
        weight[:, last:].addmm_(errors, factor[here, last:], alpha=-1.0)
        squared_error += torch.linalg.vector_norm(errors, dtype=torch.float64).square()
    return codes, float(squared_error)


@LaunchedAsOne
def _quantize_block(
    weight: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, pruned: Tensor | None, *, lowest: int, highest: int
) -> tuple[Tensor, ...]:
    """Codes of a block of columns, and what each column lost (float32, before its division by the diagonal)."""
    weight = weight.T.contiguous()  # columns are rows here, so that each is one piece of memory
    scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    kept = None if pruned is None else ~pruned.T.contiguous()
    carried = factor / factor.diagonal().unsqueeze(-1)
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    for column in range(weight.shape[0]):
        offset = zeros[column]
        code = torch.div(weight[column], scales[column]).round_().add_(offset).clamp_(lowest, highest)
        torch.sub(code, offset, out=codes[column])
        if kept is not None:
            codes[column].mul_(kept[column])
        torch.addcmul(weight[column], codes[column], scales[column], value=-1.0, out=errors[column])
        weight[column + 1 :].addr_(carried[column, column + 1 :], errors[column], alpha=-1.0)
    return (codes + zeros).to(torch.int8).T, errors.T
