"""Masks of pruning: which weights become zero."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def magnitude_mask(weight: Tensor, sparsity: float, pattern: tuple[int, int] | None, *, part: float = 1.0) -> Tensor:
    """True where a weight (rows × columns) is among the smallest.

    Unstructured: exactly ``round(sparsity · weights)`` of the whole matrix. With ``pattern`` (N, M): all but the N
    largest of every M consecutive columns; columns that do not fill a group of M are left alone. Only the smallest
    ``part`` (0 to 1) of these weights are taken, rounded to whole ones.
    """
    magnitude, count = weight.abs(), sparsity * weight.numel()
    if pattern is not None:
        mask = smallest_of_each_group(magnitude, *pattern)
        if part == 1:
            return mask
        magnitude, count = torch.where(mask, magnitude, torch.inf), float(mask.sum())
    return _smallest_of_rows(magnitude.reshape(1, -1), [round(part * count)]).view_as(weight)


def wanda_mask(weight: Tensor, input_norms: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """True where |weight| (rows × columns) times its input's norm (columns) is among the smallest of its row.

    Unstructured: ``round(sparsity · weights)`` in all, the same number in each row give or take one. With ``pattern``
    (N, M): all but the N largest of every M consecutive columns. Wanda (Sun et al. 2023, arXiv:2306.11695).
    """
    score = weight.abs() * input_norms
    if pattern is not None:
        return smallest_of_each_group(score, *pattern)
    rows, columns = weight.shape
    # Counts that add up to the whole matrix's, whatever the rounding of a single row.
    edges = [round(sparsity * columns * row) for row in range(rows + 1)]
    return _smallest_of_rows(score, [after - before for before, after in pairwise(edges)])


def _smallest_of_rows(score: Tensor, counts: list[int]) -> Tensor:
    """True for the smallest of each row of ``score`` (rows × columns): ``counts`` of them, one number or one less."""
    most = max(counts)
    if most == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    # Rows that are to lose one fewer lose one fewer of those that are equal to it.
    last = kth_smallest(score, most)
    below, equal = score < last, score == last
    wanted = torch.tensor(counts, device=score.device).unsqueeze(1)
    # The first of equal ones, on every machine.
    return below | (equal & (equal.cumsum(dim=1) <= wanted - below.sum(dim=1, keepdim=True)))


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest, counted from 1, along the last dimension, of which that one is left."""
    if values.device.type == "cpu":  # numpy selects in rows with the widest instructions, in a third of torch's time
        return torch.from_numpy(np.partition(values.numpy(), k - 1, axis=-1)[..., k - 1 : k].copy())
    return values.kthvalue(k, dim=-1, keepdim=True).values


def smallest_of_each_group(score: Tensor, n: int, m: int) -> Tensor:
    """True for all but the ``n`` highest scores of every ``m`` consecutive columns (score: rows × columns)."""
    rows, columns = score.shape
    whole = columns - columns % m
    order = torch.argsort(score[:, :whole].reshape(rows, -1, m), dim=-1, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., : m - n], value=True)
    return torch.nn.functional.pad(mask.view(rows, whole), (0, columns - whole), value=False)
