"""4-bit NormalFloat: nearest codes of blocks that share a scale, and those scales as 8-bit codes themselves.

Dettmers et al. 2023, arXiv:2305.14314: section 3 and appendix E.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Appendix E: quantiles of a normal distribution, normalized to [−1, 1], zero among them. A code is an index.
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip

# Scales that share one scale of their own: what bitsandbytes' kernels are compiled for.
SCALES_PER_BLOCK = 256


@dataclass(frozen=True)
class QuantizedScales:
    """Scales of a weight's blocks, in row-major order, as 8-bit codes: DYNAMIC8[code] · scale + offset."""

    codes: Tensor  # uint8, one a block
    scale: Tensor  # float32, one for every SCALES_PER_BLOCK codes
    offset: float  # the mean of all scales, a float32 number

    def dequantize(self) -> Tensor:
        """The scales that the codes stand for: float32, one a block."""
        scale = self.scale.repeat_interleave(SCALES_PER_BLOCK)[: self.codes.numel()]
        return dynamic8().to(self.codes.device)[self.codes.to(torch.int64)] * scale + self.offset


def nearest_normal_float(weight: Tensor, scale: Tensor) -> Tensor:
    """The code (int8, 0 to 15) whose value times its block's scale is nearest to each weight.

    ``weight`` is rows × columns (float32), ``scale`` rows × blocks. Between two equally near codes the lower wins, as
    in bitsandbytes. A scale of zero stands for zeros alone.
    """
    blocks = weight.reshape(*scale.shape, -1)
    # The reciprocal, because a quotient would round differently here and there than bitsandbytes does.
    usable = scale.abs() >= torch.finfo(torch.float32).tiny
    scaled = blocks * torch.where(usable, 1.0 / scale, 0.0).unsqueeze(-1)
    codes = torch.bucketize(scaled, midpoints(NF4).to(weight.device), out_int32=True)
    return codes.to(torch.int8).view_as(weight)


def quantize_scales(scale: Tensor) -> QuantizedScales:
    """Quantize the scales of a weight's blocks (float32, any shape) to 8 bits: section 3, double quantization.

    The mean is taken off first, because scales are all positive; the rest goes to the nearest dynamic 8-bit code.
    """
    offset = scale.mean()
    rest = (scale - offset).view(-1)
    num_blocks = -(-rest.numel() // SCALES_PER_BLOCK)
    padded = torch.nn.functional.pad(rest, (0, num_blocks * SCALES_PER_BLOCK - rest.numel()))
    padded = padded.view(num_blocks, SCALES_PER_BLOCK)
    largest = padded.abs().amax(dim=-1)
    scaled = padded / torch.where(largest == 0, 1.0, largest).unsqueeze(-1)
    codes = torch.bucketize(scaled, midpoints(dynamic8()).to(scale.device), out_int32=True)
    return QuantizedScales(codes.to(torch.uint8).view(-1)[: rest.numel()], largest, float(offset))


def dynamic8() -> Tensor:
    """The 256 values of the dynamic 8-bit type, sorted: sign, decimal exponent, and a fraction in the bits left.

    Dettmers 2015, arXiv:1511.04561, section 2.3. Fractions are the middles of equal parts of [0.1, 1]: 1 part at the
    exponent of −6, 64 at that of 0. Zero and one fill the two places that are left.
    """
    values = [0.0, 1.0]
    for exponent in range(-6, 1):
        edges = torch.linspace(0.1, 1.0, (1 << (exponent + 6)) + 1)
        middles = (10.0**exponent * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-middle for middle in middles]
    return torch.tensor(sorted(values))


def midpoints(values: Tensor) -> Tensor:
    """Where the nearest of sorted values changes."""
    return (values[:-1] + values[1:]) / 2
