"""SparseGPT on one weight (Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.solvers import compiled
from workers.solvers.hessian import InverseFactor, Outcome, energy_of, squared_norm
from workers.solvers.launching import LaunchedAsOne
from workers.solvers.pruning import kth_smallest, smallest_of_each_group, wanda_mask

BLOCK_COLUMNS = 128
# Weights that say where the bar lies for all columns to come, where there are more.
NUM_COMPARED = 1 << 18


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    factor: InverseFactor | None,
    sparsity: float,
    pattern: tuple[int, int] | None,
    *,
    zeros: Tensor | None = None,
) -> tuple[Tensor, Tensor, Outcome]:
    """Prune ``weight`` (float32, rows × K) so that its product with the calibration inputs changes least.

    ``hessian`` is K × K and symmetric; ``factor`` what :func:`workers.solvers.hessian.inverse_factor` made of it in the
    order of the columns, or None to choose as Wanda does and compensate nothing, as is done where compensation leaves
    float32. ``zeros`` are weights that an earlier stage pruned: they count towards ``sparsity`` and stay zero.

    Returns the new weight, the mask of its zeros, and the outcome. Exactly ``round(sparsity · weights)`` become zero
    (more where ``zeros`` has more); with ``pattern`` (N, M), all but N of every M consecutive columns.
    """
    energy = energy_of(weight, hessian)
    if factor is None:
        mask = wanda_mask(weight, hessian.diagonal().sqrt(), sparsity, pattern)
        if zeros is not None:
            mask = mask | zeros
        pruned = torch.where(mask, 0.0, weight)
        return pruned, mask, Outcome.uncompensated(weight - pruned, energy, hessian)
    prune = compiled.prune_columns if weight.device.type == "cpu" else _prune_columns
    # By the root of the loss, w / [H⁻¹]ⱼⱼ^½: the same order, and no square that is beyond float32. What is pruned of a
    # column whose input is always zero costs nothing.
    importance = torch.where(hessian.diagonal() == 0, 0.0, factor.factor.diagonal().reciprocal())
    columns = weight.shape[1]
    solved = weight.clone(memory_format=torch.contiguous_format)
    mask = torch.zeros_like(solved, dtype=torch.bool) if zeros is None else zeros.contiguous().clone()
    block = BLOCK_COLUMNS
    if pattern is not None:
        block = pattern[1] * max(1, BLOCK_COLUMNS // pattern[1])  # no group of M lies in two blocks
    squared_error, num_left = 0.0, round(sparsity * weight.numel())
    for first in range(0, columns, block):
        last = min(first + block, columns)
        if pattern is None:
            # A block is chosen when the errors of the earlier ones have reached it, and gets as many zeros as are
            # cheapest there among all columns to come: the paper has the same share of zeros in every block.
            cheapest = _cheapest(solved[:, first:], importance[first:], mask[:, first:], num_left, last - first)
            mask[:, first:last] |= cheapest
            num_left -= int(cheapest.sum())
        errors, squared = prune(solved, factor.factor, importance, mask, pattern, first, last)
        squared_error += squared
        if last < columns:
            solved[:, last:].addmm_(errors, factor.factor[first:last, last:], alpha=-1.0)
    if not math.isfinite(squared_error + squared_norm(solved)):  # somewhere what was carried on left float32
        return sparsegpt(weight, hessian, None, sparsity, pattern, zeros=zeros)
    return solved, mask, Outcome.solved(weight - solved, squared_error, energy, factor)


def _cheapest(weight: Tensor, importance: Tensor, pruned: Tensor, count: int, num_columns: int) -> Tensor:
    """Which of the first ``num_columns`` are among the ``count`` weights (rows × columns) whose loss costs least.

    Those already ``pruned`` come first. Where the bar lies is told by some of the rows if there are many weights, other
    ones for each number of columns: what it is off by, the columns after these make up for, as they get what is left.
    """
    rows, columns = weight.shape
    here = _loss(weight[:, :num_columns], importance[:num_columns], pruned[:, :num_columns]).flatten()
    num_later = rows * (columns - num_columns)
    wanted = min(count, len(here))
    if num_later > 0:
        step = min(rows, -(-weight.numel() // NUM_COMPARED))
        some = slice(columns // max(1, num_columns) % step, None, step)
        compared = _loss(weight[some], importance, pruned[some]).flatten()
        place = min(len(compared), max(1, round(count * len(compared) / weight.numel())))
        bar = kth_smallest(compared, place)
        # Of equal ones as large a part here as everywhere.
        share = (place - int((compared < bar).sum())) / max(1, int((compared == bar).sum()))
        found = int((here < bar).sum()) + round(share * int((here == bar).sum()))
        wanted = min(max(found, count - num_later), wanted)
    if wanted <= 0:
        return torch.zeros_like(pruned[:, :num_columns])
    most = kth_smallest(here, wanted)
    mask = here < most
    # Equal ones are taken in order, so that the same places are pruned on every machine.
    equal = torch.nonzero(here == most).flatten()
    mask[equal[: wanted - int(mask.sum())]] = True
    return mask.view(rows, -1)


def _loss(weight: Tensor, importance: Tensor, pruned: Tensor) -> Tensor:
    return (weight.abs() * importance).masked_fill_(pruned, -1.0)


def _prune_columns(
    weight: Tensor,
    factor: Tensor,
    importance: Tensor,
    mask: Tensor,
    pattern: tuple[int, int] | None,
    first: int,
    last: int,
) -> tuple[Tensor, float]:
    """The same as :func:`workers.solvers.compiled.prune_columns`, for devices other than the CPU.

    ``first`` is a multiple of M, and ``last`` too or the end.
    """
    here = slice(first, last)
    pruned, errors, mask[:, here] = _prune_block(
        weight[:, here],
        factor[here, here],
        importance[here],
        mask[:, here],
        num_kept=pattern[0] if pattern else 0,
        group_size=pattern[1] if pattern else 0,
    )
    weight[:, here] = pruned
    return errors, squared_norm(errors)


@LaunchedAsOne
def _prune_block(
    weight: Tensor, factor: Tensor, importance: Tensor, mask: Tensor, *, num_kept: int, group_size: int
) -> tuple[Tensor, ...]:
    """The block's new weights, the errors that are to be carried on, and the mask, grown if there are groups."""
    weight, mask = weight.T.contiguous(), mask.T.contiguous()  # columns are rows here: each is one piece of memory
    errors = torch.empty_like(weight)
    num_columns, diagonal = weight.shape[0], factor.diagonal()
    for column in range(num_columns):
        if group_size and column % group_size == 0 and column + group_size <= num_columns:
            group = slice(column, column + group_size)
            score = weight[group].abs() * importance[group].unsqueeze(-1)
            score.masked_fill_(mask[group], -1.0)
            mask[group] |= smallest_of_each_group(score.T, num_kept, group_size).T
        torch.mul(weight[column], mask[column], out=errors[column])
        errors[column].div_(diagonal[column])
        weight[column].masked_fill_(mask[column], 0.0)
        weight[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1.0)
    return weight.T, errors.T, mask.T
