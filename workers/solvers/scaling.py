"""Scales that move what is hard to quantize from a layer's input to its weight, or back.

A column of the input divided by a scale, and the same column of the weight multiplied by it, give the same product.
Every scale here is a power of two: then whatever makes the input can take the scale over without a rounding of its
own, and the artifact computes, bit for bit, what was computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.solvers.hessian import energy_of

LARGEST_EXPONENT = 8
NUM_EXPONENTS = 20


def power_of_two(scale: Tensor) -> Tensor:
    """The nearest powers of two to ``scale`` (float32, columns), centred on 1; 1 where it is not positive or finite."""
    known = torch.isfinite(scale) & (scale > 0)
    if not bool(known.any()):
        return torch.ones_like(scale)
    exponents = torch.where(known, scale, 1.0).log2()
    middle = (exponents[known].max() + exponents[known].min()) / 2
    exponents = (exponents - middle).round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.where(known, torch.exp2(exponents), 1.0)


def smoothing_scale(largest_inputs: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """SmoothQuant's scale (Xiao et al. 2022, arXiv:2211.10438, equation 4), by column: max|X|^a / max|W|^(1-a).

    ``largest_inputs`` is the largest absolute value of each column (float32), ``weights`` (rows × columns) are all
    that read the input; ``strength`` is a.
    """
    largest_weights = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    return power_of_two(largest_inputs.pow(strength) / largest_weights.pow(1.0 - strength))


def activation_aware_scale(
    weights: Sequence[Tensor], hessian: Tensor, quantize: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """AWQ's scale (Lin et al. 2023, arXiv:2306.00978, section 3.2): the power of the inputs' size that errs least.

    ``weights`` (float32, rows × columns) read one input, whose mean outer product is ``hessian``; ``quantize`` gives,
    for each, the weight that its codes would stand for. The error is that of the products with the input, which the
    Hessian gives without running anything.
    """
    sizes = hessian.diagonal().clamp(min=0.0).sqrt()
    best, least = torch.ones_like(sizes), torch.inf
    tried: set[bytes] = set()
    for step in range(NUM_EXPONENTS):
        scale = power_of_two(sizes.pow(step / NUM_EXPONENTS))
        key = scale.cpu().numpy().tobytes()
        if key in tried:
            continue
        tried.add(key)
        error = 0.0
        for weight, codes in zip(weights, quantize, strict=True):
            change = weight - codes(weight * scale) / scale
            error += energy_of(change, hessian)
        if error < least:
            best, least = scale, error
    return best
