"""The inner loops of quantization and pruning, compiled for the CPU with numba.

Every row of a weight is independent, so rows are dealt to threads.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from workers.solvers.hessian import squared_norm
from workers.solvers.threads import over_parts

# Sums may be reordered so that they vectorize; NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract", "arcp", "nsz"}


@njit(nogil=True, cache=True, fastmath=_FAST)
def _group_error(group, weights, scale, zero, lowest, highest):
    inverse = np.float32(1.0) / scale
    total = np.float32(0.0)
    for i in range(group.shape[0]):
        code = np.rint(group[i] * inverse) + zero
        code = min(max(code, lowest), highest)
        difference = (code - zero) * scale - group[i]
        total += difference * difference * weights[i]
    return total


@njit(nogil=True, cache=True)
def _round_mantissa(value, dropped):
    """A float32 rounded to nearest even after its lowest ``dropped`` bits are given up."""
    if dropped == 0:
        return value
    bits = np.float32(value).view(np.uint32)
    one = np.uint32(1)
    half = (one << np.uint32(dropped - 1)) - one
    rounded = bits + half + ((bits >> np.uint32(dropped)) & one)
    return np.uint32((rounded >> np.uint32(dropped)) << np.uint32(dropped)).view(np.float32)


@njit(nogil=True, cache=True)
def _search_rows(
    groups,
    importance,
    shrink,
    lowest,
    highest,
    symmetric,
    dropped,
    tiny,
    step_below_tiny,
    most,
    scales,
    zeros,
):
    span = np.float32(highest - lowest)
    low_code, high_code = np.float32(lowest), np.float32(highest)
    for row in range(groups.shape[0]):
        for index in range(groups.shape[1]):
            group = groups[row, index]
            low, high = np.float32(0.0), np.float32(0.0)
            for value in group:
                low = min(low, value)
                high = max(high, value)
            best_scale, best_zero = scales[row, index], np.float32(zeros[row, index])
            # Where no error is a number, as of weights whose squares are none, this one remains.
            best_error = _group_error(group, importance[index], best_scale, best_zero, low_code, high_code)
            for step in range(shrink.shape[0]):
                for sign in range(2 if symmetric else 1):
                    # Factors first: twice a large weight, or the range of two, may be beyond float32.
                    if symmetric:
                        scale = max(-low, high) * (np.float32(2.0) * shrink[step] / span)
                        if sign == 1:
                            scale = -scale
                    else:
                        scale = high * (shrink[step] / span) - low * (shrink[step] / span)
                    if abs(scale) >= tiny:
                        scale = _round_mantissa(scale, dropped)
                    else:
                        size = np.ceil(abs(scale) / step_below_tiny) * step_below_tiny
                        scale = size if scale > np.float32(0.0) else -size
                    if scale == np.float32(0.0):
                        scale = np.float32(1.0)
                    zero = np.float32(0.0)
                    if not symmetric:
                        zero = min(max(np.rint(low_code - low * shrink[step] / scale), low_code), high_code)
                    if abs(scale) * max(zero - low_code, high_code - zero) > most:
                        continue  # the last code would be infinity
                    error = _group_error(group, importance[index], scale, zero, low_code, high_code)
                    if error < best_error:
                        best_error, best_scale, best_zero = error, scale, zero
            scales[row, index] = best_scale
            zeros[row, index] = np.int8(best_zero)


# Bits of a float32's mantissa that a scale loses when it is stored in a narrower type.
_DROPPED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def search_scales(
    groups: Tensor,
    importance: Tensor,
    shrink: Tensor,
    covering: tuple[Tensor, Tensor],
    lowest: int,
    highest: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of least weighted squared error for each group.

    ``groups`` is rows × groups × group_size and ``importance`` groups × group_size, both float32 on the CPU;
    ``covering`` has the scales and zero-points that are to be improved on. Returns float32 scales, already rounded to
    ``scale_dtype``, and int8 zero-points, both rows × groups.
    """
    rows = groups.shape[0]
    scales, zeros = (tensor.numpy().copy() for tensor in covering)
    values, weights, factors = groups.numpy(), importance.contiguous().numpy(), shrink.numpy()
    dropped = _DROPPED_BITS[scale_dtype]
    # Below its smallest normal number a type has even steps: in float16 an 8-bit scale soon is there.
    tiny = np.float32(torch.finfo(scale_dtype).tiny)
    step_below_tiny = np.float32(torch.finfo(scale_dtype).smallest_normal * torch.finfo(scale_dtype).eps)
    most = np.float32(torch.finfo(scale_dtype).max)

    def search(part: slice) -> None:
        _search_rows(
            values[part], weights, factors, lowest, highest, symmetric, dropped, tiny, step_below_tiny, most,
            scales[part], zeros[part],
        )  # fmt: skip

    over_parts(rows, search)
    return torch.from_numpy(scales), torch.from_numpy(zeros)


@njit(nogil=True, cache=True, fastmath={"contract"})
def _quantize_rows(
    weight,
    factor,
    scales,
    zeros,
    group_of,
    pruned,
    lowest,
    highest,
    first,
    last,
    codes,
    errors,
):
    for row in range(weight.shape[0]):
        values = weight[row]
        for column in range(first, last):
            group = group_of[column]
            scale, zero = scales[row, group], np.float32(zeros[row, group])
            code = np.rint(values[column] / scale) + zero
            code = min(max(code, np.float32(lowest)), np.float32(highest))
            if pruned.shape[0] > 0 and pruned[row, column]:
                code = zero
            codes[row, column] = np.int8(code)
            error = (values[column] - (code - zero) * scale) / factor[column, column]
            errors[row, column - first] = error
            for later in range(column + 1, last):
                values[later] -= error * factor[column, later]


def quantize_columns(
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
    """Codes (int8, rows × columns) of ``weight``, each column's error carried on to the columns after it.

    Also returns the squared error of the product with the inputs, which is the sum of the carried errors' squares.

    ``weight`` (float32, rows × columns, contiguous, overwritten) and ``pruned`` are in the order of quantization;
    ``group_of`` (int64, columns) gives each column's group; ``factor`` is the upper Cholesky factor of the inverse
    Hessian. Inside a block of columns the error goes on at once, beyond it in one product.
    """
    rows, columns = weight.shape
    codes = np.empty((rows, columns), dtype=np.int8)
    squared_error = 0.0
    errors = np.empty((rows, block_columns), dtype=np.float32)
    mask = np.empty((0, 0), dtype=np.bool_) if pruned is None else pruned.numpy()
    values, triangle = weight.numpy(), factor.numpy()
    scales, zeros, groups = scale.numpy(), zero_point.numpy(), group_of.numpy()
    for first in range(0, columns, block_columns):
        last = min(first + block_columns, columns)

        def quantize(part: slice, first: int = first, last: int = last) -> None:
            _quantize_rows(
                values[part], triangle, scales[part], zeros[part], groups, mask[part], lowest, highest, first, last,
                codes[part], errors[part],
            )  # fmt: skip

        over_parts(rows, quantize)
        carried = torch.from_numpy(errors[:, : last - first])
        squared_error += squared_norm(carried)
        if last < columns:
            weight[:, last:].addmm_(carried, factor[first:last, last:], alpha=-1.0)
    return torch.from_numpy(codes), squared_error


@njit(nogil=True, cache=True, fastmath={"contract"})
def _prune_rows(weight, factor, importance, mask, keep, group_size, first, last, errors):
    columns = weight.shape[1]
    score = np.empty(max(group_size, 1), dtype=np.float32)
    for row in range(weight.shape[0]):
        values = weight[row]
        for column in range(first, last):
            if group_size > 0 and column % group_size == 0 and column + group_size <= columns:
                num_pruned = 0
                for i in range(group_size):
                    score[i] = abs(values[column + i]) * importance[column + i]
                    if mask[row, column + i]:
                        num_pruned += 1
                while num_pruned < group_size - keep:
                    best = -1
                    for i in range(group_size):
                        if not mask[row, column + i] and (best < 0 or score[i] < score[best]):
                            best = i
                    mask[row, column + best] = True
                    num_pruned += 1
            if not mask[row, column]:
                errors[row, column - first] = 0.0
                continue
            error = values[column] / factor[column, column]
            errors[row, column - first] = error
            values[column] = 0.0
            for later in range(column + 1, last):
                values[later] -= error * factor[column, later]


def prune_columns(
    weight: Tensor,
    factor: Tensor,
    importance: Tensor,
    mask: Tensor,
    pattern: tuple[int, int] | None,
    first: int,
    last: int,
) -> tuple[Tensor, float]:
    """Prune columns ``first`` to ``last`` of ``weight`` under ``mask``, each one's error carried on inside the block.

    ``weight`` (float32, rows × columns) and ``mask`` (boolean) are contiguous and changed in place. With ``pattern``
    (N, M) the mask is grown here: in every M columns that begin at a multiple of M, all but the N weights whose size
    times ``importance`` (float32, columns) is largest. ``factor`` is the upper Cholesky factor of the inverse Hessian.

    Returns the errors (float32, rows × columns of the block), to be carried on to later blocks, and the sum of their
    squares, which is the squared error of the product with the inputs.
    """
    rows = weight.shape[0]
    errors = np.empty((rows, last - first), dtype=np.float32)
    keep, group_size = pattern or (0, 0)
    values, triangle, weights, pruned = weight.numpy(), factor.numpy(), importance.contiguous().numpy(), mask.numpy()

    def prune(part: slice) -> None:
        _prune_rows(values[part], triangle, weights, pruned[part], keep, group_size, first, last, errors[part])

    over_parts(rows, prune)
    carried = torch.from_numpy(errors)
    return carried, squared_norm(carried)
