"""What is done to every activation of the calibration text, in one pass over it.

Composed of torch's operations each step would read and write all of them anew: memory takes longer than arithmetic.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from workers.solvers.threads import over_parts

_INT8 = torch.iinfo(torch.int8)


def column_sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column of ``rows`` (float32, tokens × columns) the sum of squares, float64, and the largest |x|, float32.

    Where a column has a NaN its sum is NaN, and its largest |x| may be another's.
    """
    if rows.device.type != "cpu":
        return rows.square().sum(dim=0, dtype=torch.float64), rows.abs().amax(dim=0)
    values = rows.contiguous().numpy()
    squares, largest = np.zeros(rows.shape[1], dtype=np.float64), np.zeros(rows.shape[1], dtype=np.float32)
    over_parts(rows.shape[1], lambda part: _sum_columns(values, part.start, part.stop, squares[part], largest[part]))
    return torch.from_numpy(squares), torch.from_numpy(largest)


@njit(nogil=True, cache=True)
def _sum_columns(values, first, last, squares, largest):
    for row in range(values.shape[0]):
        part = values[row, first:last]  # of whole rows: columns cut from a matrix are not read in wide pieces
        for column in range(last - first):
            value = part[column]
            squares[column] += np.float64(value) * np.float64(value)
            largest[column] = max(largest[column], abs(value))


def token_scale(inputs: Tensor, most: float) -> Tensor:
    """What brings the largest |x| of each token of ``inputs`` (… × columns) to ``most``: … × 1."""
    low, high = torch.aminmax(inputs, dim=-1, keepdim=True)
    scale = torch.maximum(low.neg_(), high).div_(most)
    return scale.masked_fill_(scale == 0, torch.finfo(scale.dtype).eps)


def round_tokens(inputs: Tensor, divisor: Tensor | None, *, symmetric: bool) -> Tensor:
    """``inputs`` (float32, … × columns) over ``divisor`` (columns), each token rounded to 8 bits, at full width again.

    As compressed-tensors does it with dynamic scales: 255 even steps, from −max |x| to max |x| where ``symmetric``,
    else from the smallest x, or zero, to the largest.
    """
    if inputs.device.type != "cpu":
        return _round_tokens(inputs if divisor is None else inputs / divisor, symmetric=symmetric)
    rounded = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    rows = inputs.reshape(-1, inputs.shape[-1])
    values, results = rows.contiguous().numpy(), rounded.view(rows.shape).numpy()
    divisors = np.empty(0, dtype=np.float32) if divisor is None else divisor.contiguous().numpy()
    over_parts(rows.shape[0], lambda part: _round_rows(values[part], divisors, results[part], symmetric))
    return rounded


def _round_tokens(inputs: Tensor, *, symmetric: bool) -> Tensor:
    """The same without a divisor, for devices other than the CPU."""
    steps = _INT8.max - _INT8.min
    if symmetric:
        scale = token_scale(inputs, steps / 2)
        return torch.div(inputs, scale).clamp_(_INT8.min, _INT8.max).round_().mul_(scale)
    low, high = torch.aminmax(inputs, dim=-1, keepdim=True)
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    scale = (high - low).div_(steps)
    scale.masked_fill_(scale == 0, torch.finfo(scale.dtype).eps)
    zero_point = (_INT8.min - low / scale).clamp_(_INT8.min, _INT8.max).round_()
    codes = torch.div(inputs, scale).add_(zero_point).clamp_(_INT8.min, _INT8.max).round_()
    return codes.sub_(zero_point).mul_(scale)


@njit(nogil=True, cache=True, error_model="numpy")  # which does not look for divisors of zero, one by one
def _round_rows(values, divisors, results, symmetric):
    lowest, highest, steps = np.float32(-128.0), np.float32(127.0), np.float32(255.0)
    size_bits = np.int32(0x7FFFFFFF)  # all but the sign's
    for row in range(values.shape[0]):
        result = results[row]
        if divisors.shape[0] > 0:
            for column in range(values.shape[1]):
                result[column] = values[row, column] / divisors[column]
        else:
            for column in range(values.shape[1]):
                result[column] = values[row, column]
        # Compared as integers, with the size of negative ones turned round, floats are in order and a NaN is at one
        # end: as everywhere, it makes NaN of its token.
        smallest, largest = np.int32(0), np.int32(0)
        for column in range(values.shape[1]):
            bits = np.float32(result[column]).view(np.int32)
            bits = np.int32(bits ^ ((bits >> 31) & size_bits))
            smallest, largest = np.int32(min(smallest, bits)), np.int32(max(largest, bits))
        zero_point = np.float32(0.0)
        if symmetric:
            scale = np.int32(max(largest, ~smallest)).view(np.float32) / (steps / np.float32(2.0))
        else:
            low = np.int32(smallest ^ ((smallest >> 31) & size_bits)).view(np.float32)
            scale = (np.int32(largest).view(np.float32) - low) / steps
            if scale != np.float32(0.0):
                zero_point = np.rint(min(max(lowest - low / scale, lowest), highest))
        if scale == np.float32(0.0):
            scale = np.float32(1.1920928955078125e-07)
        for column in range(values.shape[1]):
            code = min(max(result[column] / scale + zero_point, lowest), highest)
            result[column] = (np.rint(code) - zero_point) * scale
