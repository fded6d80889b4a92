"""Schemes: what their names say, and which group sizes they can have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

WeightScheme = Literal["W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W7A16", "W8A16"]
# One flat list each, not unions: then an error names every value that there is.
IntegerScheme = Literal["W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W7A16", "W8A16", "W8A8"]
Scheme = Literal["W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W7A16", "W8A16", "W8A8", "FP8", "NF4", "FP16", "BF16"]
# Block sizes that bitsandbytes knows, but for 2048 and 4096: CPUs with AVX-512 compile for a minute before those.
NORMAL_FLOAT_GROUP_SIZES = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class ActivationGrid:
    """The 8-bit codes of a layer's input: each token has a scale of its own, whenever the model runs."""

    is_float: bool  # float8 e4m3
    symmetric: bool  # no zero-point


@dataclass(frozen=True)
class SchemeFacts:
    """What the name of a scheme says."""

    num_bits: int  # of one weight
    is_float: bool = False  # FP8: e4m3
    is_normal: bool = False  # 4-bit NormalFloat
    group_sizes: tuple[int, ...] | None = None  # the only ones that there are
    # Each token of a layer's input is quantized like the weights, by a scale of its own, whenever the model runs.
    quantizes_activations: bool = False
    # A cast: every tensor of the model is stored in this type of torch's, and there are no codes.
    dtype: str | None = None


SCHEMES: Mapping[str, SchemeFacts] = {
    **{scheme: SchemeFacts(int(scheme[1])) for scheme in get_args(WeightScheme)},
    "W8A8": SchemeFacts(8, quantizes_activations=True),
    "FP8": SchemeFacts(8, is_float=True, quantizes_activations=True),
    "NF4": SchemeFacts(4, is_normal=True, group_sizes=NORMAL_FLOAT_GROUP_SIZES),
    "FP16": SchemeFacts(16, is_float=True, dtype="float16"),
    "BF16": SchemeFacts(16, is_float=True, dtype="bfloat16"),
}
# compressed-tensors lays out the other widths differently from release to release.
PACKED_BITS = frozenset({4, 8})

# Smaller groups would store more scale than code, and packed words hold eight 4-bit codes.
SMALLEST_GROUP = 16
GROUP_MULTIPLE = 8


def group_size_fits(in_features: int, size: int) -> bool:
    """Whether a layer of ``in_features`` columns can be stored in groups of ``size``."""
    return size >= SMALLEST_GROUP and size % GROUP_MULTIPLE == 0 and in_features % size == 0


def usable_group_size(in_features: int, requested: int | None, allowed: Sequence[int] | None = None) -> int:
    """The group size that a layer of ``in_features`` columns gets.

    ``requested`` if it divides the layer, else the largest smaller divisor that the format allows (of ``allowed``, if
    that is given), else one group for the whole row; None asks for the latter.
    """
    if requested is None:
        return in_features
    sizes: Sequence[int] = range(min(requested, in_features), SMALLEST_GROUP - 1, -1)
    if allowed is not None:
        sizes = [size for size in sorted(allowed, reverse=True) if size <= requested]
    return next((size for size in sizes if group_size_fits(in_features, size)), in_features)
