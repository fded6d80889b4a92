"""Grids: choose scales, round weights to codes, and turn codes back into weights.

A weight is rows × columns (out_features × in_features). Columns are cut into groups of ``group_size``; each row
has one scale, and one zero-point if not symmetric, for each group: value = (code − zero_point) · scale. A code of
NormalFloat is the index of its value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.solvers import compiled
from workers.solvers.launching import LaunchedAsOne
from workers.solvers.normal_float import NF4, QuantizedScales, nearest_normal_float, quantize_scales

# Shrinking factors tried for each scale. Below about half the range, clipping costs more than it gains at 4 bits.
NUM_CLIP_STEPS = 24
SMALLEST_CLIP = 0.5
# Rows whose scales are searched at a time where every try is a tensor of its own.
_ROWS_AT_A_TIME = 1024


FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Grid:
    """Which codes there are, and which columns share a scale."""

    num_bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype = torch.float32
    is_float: bool = False  # codes are float8 e4m3: values between are nearer to each other where they are small
    is_normal: bool = False  # codes are 4-bit NormalFloat

    @property
    def lowest(self) -> int:
        """The smallest integer code; codes are signed, as compressed-tensors stores them."""
        return -(1 << (self.num_bits - 1))

    @property
    def highest(self) -> int:
        """The largest integer code."""
        return (1 << (self.num_bits - 1)) - 1

    @property
    def largest_code(self) -> float:
        """How many steps there are from zero to the largest weight of a group that reaches to both sides of it."""
        return torch.finfo(FLOAT8).max if self.is_float else (self.highest - self.lowest) / 2


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of a weight, with what turns them back."""

    codes: Tensor  # int8 (float8 e4m3 of a float grid), rows × columns
    scale: Tensor  # float32 holding values of grid.scale_dtype, rows × groups
    zero_point: Tensor  # int8, rows × groups; all zero when symmetric
    grid: Grid
    quantized_scales: QuantizedScales | None = None  # where they are stored as codes, which give ``scale``

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for: float32, rows × columns."""
        rows, columns = self.codes.shape
        codes = self.codes.view(rows, -1, self.grid.group_size)
        if self.grid.is_normal:
            values = NF4.to(codes.device)[codes.to(torch.int64)]
        else:
            values = codes.to(torch.float32)
            if not self.grid.symmetric:
                values -= self.zero_point.to(torch.float32).unsqueeze(-1)
        values *= self.scale.unsqueeze(-1)
        return values.view(rows, columns)


def quantize_to_nearest(
    weight: Tensor, grid: Grid, *, clip_search: bool, importance: Tensor | None = None, zeros: Tensor | None = None
) -> QuantizedWeight:
    """Round every weight (float32, rows × columns) to its nearest code.

    ``clip_search`` and ``importance`` are those of :func:`choose_scales`. ``zeros``, a boolean mask like ``weight``,
    says which weights are pruned and stay exactly zero.
    """
    if grid.is_float:
        return _to_float8(weight, grid)
    scale, zero_point = choose_scales(weight, grid, clip_search=clip_search, importance=importance)
    columns_scale = scale.repeat_interleave(grid.group_size, dim=1)
    columns_zero = zero_point.to(torch.float32).repeat_interleave(grid.group_size, dim=1)
    codes = torch.round(weight / columns_scale).add_(columns_zero).clamp_(grid.lowest, grid.highest)
    if zeros is not None:
        codes = torch.where(zeros, columns_zero, codes)
    return QuantizedWeight(codes.to(torch.int8), scale, zero_point, grid)


def quantize_to_normal_float(weight: Tensor, grid: Grid, *, double_quant: bool) -> QuantizedWeight:
    """Round every weight (float32, rows × columns) to its nearest NormalFloat; zeros stay exactly zero.

    Each group's scale is its largest absolute value. With ``double_quant`` scales are stored as 8-bit codes, and
    weights rounded to what is nearest under the scales that those give back.
    """
    scale = weight.reshape(weight.shape[0], -1, grid.group_size).abs().amax(dim=-1)
    scales = None
    if double_quant:
        scales = quantize_scales(scale)
        scale = scales.dequantize().view_as(scale)
    zero_point = torch.zeros_like(scale, dtype=torch.int8)
    return QuantizedWeight(nearest_normal_float(weight, scale), scale, zero_point, grid, scales)


def _to_float8(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """Every weight to its nearest float8, each group's largest at the end of the range; zeros stay zeros."""
    highest = torch.finfo(FLOAT8).max
    groups = weight.reshape(weight.shape[0], -1, grid.group_size)
    scale = _as_stored(groups.abs().amax(dim=-1) / highest, highest, grid.scale_dtype)
    codes = (groups / scale.unsqueeze(-1)).clamp_(-highest, highest).to(FLOAT8)
    return QuantizedWeight(codes.view_as(weight), scale, torch.zeros_like(scale, dtype=torch.int8), grid)


def choose_scales(
    weight: Tensor, grid: Grid, *, clip_search: bool, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales (float32) and zero-points (int8) of every group, both rows × groups.

    Without ``clip_search`` the grid covers each group's extremes. With it, smaller ranges are tried too and the one
    with the least squared error wins, each column's error weighted by ``importance`` (float32, columns; the
    diagonal of the Hessian). A symmetric grid has one more negative code than positive ones. Scales may be negative,
    which puts that one where the larger weights are: without a search on the largest, so that steps are smaller by a
    sixteenth at 4 bits than those of compressed-tensors.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // grid.group_size, grid.group_size)
    if importance is None:
        importance = torch.ones(columns, dtype=torch.float32, device=weight.device)
    if clip_search and weight.device.type == "cpu":
        return compiled.search_scales(
            groups.contiguous(),
            importance.view(-1, grid.group_size),
            torch.linspace(1.0, SMALLEST_CLIP, NUM_CLIP_STEPS),
            _covering(groups, grid),
            grid.lowest,
            grid.highest,
            symmetric=grid.symmetric,
            scale_dtype=grid.scale_dtype,
        )
    if clip_search:
        parts = [
            _search_scales(rows, importance.view(1, -1, grid.group_size), grid=grid)
            for rows in torch.split(groups, _ROWS_AT_A_TIME)
        ]
        return torch.cat([scale for scale, _ in parts]), torch.cat([zero_point for _, zero_point in parts])
    return _covering(groups, grid)


def _covering(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The grid that reaches to each group's extremes (groups: rows × groups × group_size)."""
    if grid.symmetric:
        extreme = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
        scale = _as_stored(extreme / grid.lowest, -grid.lowest, grid.scale_dtype)
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    scale, zero_point = _scales_at(groups, grid, 1.0, negative=False)
    # Of the largest numbers that there are, codes at the end of a grid that is a little smaller.
    for steps_less in (0.5, 1.0, 2.0):
        is_finite = _largest_value(scale, zero_point, grid) <= torch.finfo(grid.scale_dtype).max
        shorter = _scales_at(groups, grid, 1.0 - steps_less / (grid.highest - grid.lowest), negative=False)
        scale, zero_point = torch.where(is_finite, scale, shorter[0]), torch.where(is_finite, zero_point, shorter[1])
    return scale, zero_point


def _largest_value(scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The largest |value| that there is a code for (rows × groups)."""
    offset = zero_point.to(torch.float32)
    return scale.abs() * torch.maximum(offset - grid.lowest, grid.highest - offset)


def _scales_at(groups: Tensor, grid: Grid, shrink: float, *, negative: bool) -> tuple[Tensor, Tensor]:
    """The grid that covers ``shrink`` times each group's range (groups: rows × groups × group_size)."""
    if grid.symmetric:
        scale = groups.abs().amax(dim=-1) * (2.0 * shrink / (grid.highest - grid.lowest))
        if negative:
            scale = -scale
        scale = _as_stored(scale, -grid.lowest, grid.scale_dtype)
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    low = groups.amin(dim=-1).clamp(max=0.0) * shrink
    high = groups.amax(dim=-1).clamp(min=0.0) * shrink
    steps = grid.highest - grid.lowest
    scale = _as_stored(high / steps - low / steps, 1, grid.scale_dtype)
    zero_point = torch.round(grid.lowest - low / scale).clamp_(grid.lowest, grid.highest)
    return scale, zero_point.to(torch.int8)


def _as_stored(scale: Tensor, largest_code: float, dtype: torch.dtype) -> Tensor:
    """The scale as the file will hold it, so that codes are chosen for the value that is read back.

    That of ``largest_code`` is finite, whichever way the scale is rounded.
    """
    facts = torch.finfo(dtype)
    size = scale.abs()
    stored = size.to(dtype).to(torch.float32)
    # Below its smallest normal number a type has even steps, of which float16 has few. Up, for a group's largest weight
    # lies at the last code, and so that a small weight is not zero.
    step = facts.smallest_normal * facts.eps
    stored = torch.where(size < facts.smallest_normal, torch.ceil(size / step) * step, stored)
    # Filled in as numbers: a tensor of the CPU's could not be copied while a CUDA graph is captured.
    limit = float(torch.tensor(facts.max / largest_code * (1.0 - facts.eps)).to(dtype))
    stored = stored.masked_fill(stored * largest_code > facts.max, limit)
    # In a group of zeros any scale gives codes of zero.
    return stored.copysign(scale).masked_fill(size == 0, 1.0)


@LaunchedAsOne
def _search_scales(groups: Tensor, importance: Tensor, *, grid: Grid) -> tuple[Tensor, ...]:
    """The same search as :func:`compiled.search_scales`, for devices other than the CPU."""

    def error_of(scale: Tensor, zero_point: Tensor) -> Tensor:
        offset = zero_point.to(torch.float32).unsqueeze(-1)
        codes = torch.round(groups / scale.unsqueeze(-1)).add_(offset).clamp_(grid.lowest, grid.highest)
        return ((codes - offset) * scale.unsqueeze(-1) - groups).square_().mul_(importance).sum(dim=-1)

    best_scale, best_zero = _covering(groups, grid)
    best_error = error_of(best_scale, best_zero)
    largest = torch.finfo(grid.scale_dtype).max
    for shrink in torch.linspace(1.0, SMALLEST_CLIP, NUM_CLIP_STEPS).tolist():
        for negative in (False, True) if grid.symmetric else (False,):
            scale, zero_point = _scales_at(groups, grid, shrink, negative=negative)
            error = error_of(scale, zero_point)
            better = (error < best_error) & (_largest_value(scale, zero_point, grid) <= largest)
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero
