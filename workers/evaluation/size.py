"""How large an artifact is, and the zeros that pruning promised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def weights_bytes(folder: Path) -> int:
    """Bytes of the weight files of a checkpoint folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@dataclass(frozen=True)
class Sparsity:
    """Zeros among the weights of the layers that were pruned."""

    num_weights: int
    num_zeros: int
    layers_below: tuple[str, ...]  # layers with fewer zeros than asked for

    @property
    def fraction(self) -> float:
        """Zeros as a fraction of the weights."""
        return self.num_zeros / self.num_weights if self.num_weights else 0.0


def measure_sparsity(model: Any, layers: list[str], sparsity: float, pattern: tuple[int, int] | None) -> Sparsity:
    """Count zeros in the named layers of an opened model and hold them against what was asked for.

    With ``pattern`` (N, M) every M consecutive columns must have at most N that are not zero.
    """
    num_weights = num_zeros = 0
    below = []
    for name in layers:
        weight = model.get_submodule(name).weight
        zero = weight == 0
        num_weights += zero.numel()
        num_zeros += int(zero.sum())
        if not _has_zeros(zero, sparsity, pattern):
            below.append(name)
    return Sparsity(num_weights, num_zeros, tuple(below))


def _has_zeros(zero: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> bool:
    if pattern is None:
        return int(zero.sum()) >= round(sparsity * zero.numel())
    n, m = pattern
    whole = zero.shape[1] - zero.shape[1] % m
    kept = (~zero[:, :whole]).reshape(zero.shape[0], -1, m).sum(dim=-1)
    return bool(torch.all(kept <= n))
