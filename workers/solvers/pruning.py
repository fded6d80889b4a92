"""Masks of pruning: which weights become zero."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude_mask(weight: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """True where a weight (rows × columns) is among the smallest.

    Unstructured: exactly ``round(sparsity · weights)`` of the whole matrix. With ``pattern`` (N, M): all but the N
    largest of every M consecutive columns; columns that do not fill a group of M are left alone.
    """
    magnitude = weight.abs()
    if pattern is not None:
        return smallest_of_each_group(magnitude, *pattern)
    count = round(sparsity * weight.numel())
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    # A stable order, so that equal weights are pruned in the same places on every machine.
    mask[torch.argsort(magnitude.flatten(), stable=True)[:count]] = True
    return mask.view_as(weight)


def smallest_of_each_group(score: Tensor, n: int, m: int) -> Tensor:
    """True for all but the ``n`` highest scores of every ``m`` consecutive columns (score: rows × columns)."""
    rows, columns = score.shape
    whole = columns - columns % m
    order = torch.argsort(score[:, :whole].reshape(rows, -1, m), dim=-1, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., : m - n], value=True)
    return torch.nn.functional.pad(mask.view(rows, whole), (0, columns - whole), value=False)
