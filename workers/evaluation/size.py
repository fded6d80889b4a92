"""How large an artifact is, and the zeros and few values that its stages promised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.formats.opening import Readable

_VALUES_AT_A_TIME = 1 << 22  # that are sorted, with the number of each


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


def measure_sparsity(model: Readable, sparsities: Mapping[str, float], pattern: tuple[int, int] | None) -> Sparsity:
    """Count zeros in the named layers of an opened model and hold them against the sparsity that each was to get.

    With ``pattern`` (N, M) every M consecutive columns must have at most N that are not zero.
    """
    num_weights = num_zeros = 0
    below = []
    for name, sparsity in sparsities.items():
        weight = model.linear_weight(name)
        zero = weight == 0
        num_weights += zero.numel()
        num_zeros += int(zero.sum())
        if not _has_zeros(zero, sparsity, pattern):
            below.append(name)
    return Sparsity(num_weights, num_zeros, tuple(below))


@dataclass(frozen=True)
class Packed:
    """How the codes of a layer would be packed."""

    num_bits: int
    group_size: int
    scale_bits: float  # of each group, with its zero-point


def layers_off_grid(model: Readable, layers: Mapping[str, Packed]) -> list[str]:
    """Those layers of an opened model that hold, in some group, more values than their codes stand for."""
    return [
        name
        for name, packed in layers.items()
        if _most_values(model.linear_weight(name), packed.group_size) > 1 << packed.num_bits
    ]


def packed_bytes(model: Readable, layers: Mapping[str, Packed]) -> int:
    """What the layers would take as packed codes."""
    bits = 0.0
    for name, packed in layers.items():
        num_weights = model.linear_weight(name).numel()
        bits += num_weights * packed.num_bits + num_weights // packed.group_size * packed.scale_bits
    return math.ceil(bits / 8)


def _most_values(weight: Tensor, group_size: int) -> int:
    """The largest number of distinct values in a group of a weight (rows × columns)."""
    most = 0
    for groups in torch.split(weight.reshape(-1, group_size), max(1, _VALUES_AT_A_TIME // group_size)):
        values = groups.sort(dim=-1).values
        most = max(most, 1 + int((values[:, 1:] != values[:, :-1]).sum(dim=-1).max()))
    return most


def _has_zeros(zero: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> bool:
    if pattern is None:
        return int(zero.sum()) >= round(sparsity * zero.numel())
    n, m = pattern
    whole = zero.shape[1] - zero.shape[1] % m
    kept = (~zero[:, :whole]).reshape(zero.shape[0], -1, m).sum(dim=-1)
    return bool(torch.all(kept <= n))
