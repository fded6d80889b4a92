"""How much of each layer to prune, so that at one number of zeros in all the layers together lose least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_STEPS = 200  # of a curve, from nothing pruned to everything
_BISECTIONS = 100


@dataclass(frozen=True)
class ErrorCurve:
    """What pruning costs a layer."""

    num_weights: int
    # float64, NUM_STEPS + 1 points: ‖(W − Ŵ)X‖² / ‖WX‖² when 0, 1, … NUM_STEPS of NUM_STEPS parts of the weights are
    # zero. Products of different columns with each other are left out, as Wanda does.
    errors: Tensor

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON has it, to the last bit."""
        return {"num_weights": self.num_weights, "errors": self.errors.tolist()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ErrorCurve:
        """What :meth:`to_json` gave."""
        return cls(content["num_weights"], torch.tensor(content["errors"], dtype=torch.float64))


def error_curve(weight: Tensor, input_norms: Tensor) -> ErrorCurve:
    """The curve of ``weight`` (rows × columns), least weights times their input norms (columns) first in every row."""
    cost = (weight * input_norms).square().sort(dim=1).values.sum(dim=0, dtype=torch.float64)
    lost = torch.cat([torch.zeros(1, dtype=torch.float64), cost.cpu().cumsum(0)])
    columns = weight.shape[1]
    places = torch.arange(NUM_STEPS + 1, dtype=torch.float64) * columns / NUM_STEPS
    below = places.long().clamp(max=columns - 1)
    part = places - below
    errors = lost[below] * (1 - part) + lost[below + 1] * part
    return ErrorCurve(weight.numel(), errors / errors[-1] if float(errors[-1]) > 0 else errors)


def allocate(curves: Mapping[str, ErrorCurve], sparsity: float, bound: float) -> dict[str, int]:
    """The number of zeros of each layer: ``round(sparsity · weights)`` in all.

    Minimizes the sum of the layers' relative errors, where no layer's sparsity is further from ``sparsity`` than
    ``bound``, or than half the way to none and to all. The curves are convex, so that one price of a zero, found by
    bisection, gives the minimum.
    """
    total = sum(curve.num_weights for curve in curves.values())
    wanted = round(sparsity * total)
    bound = min(bound, sparsity / 2, (1 - sparsity) / 2)
    lowest = {name: math.floor((sparsity - bound) * curve.num_weights) for name, curve in curves.items()}
    highest = {name: math.ceil((sparsity + bound) * curve.num_weights) for name, curve in curves.items()}
    # Error that one more zero adds, on each step of a curve.
    slopes = {name: curve.errors.diff() * NUM_STEPS / curve.num_weights for name, curve in curves.items()}

    def at(price: float) -> dict[str, int]:
        counts = {}
        for name, curve in curves.items():
            count = curve.num_weights * int((slopes[name] < price).sum()) // NUM_STEPS
            counts[name] = min(highest[name], max(lowest[name], count))
        return counts

    low, high = 0.0, 2 * max((float(slope.max()) for slope in slopes.values()), default=0.0) + 1e-30
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle).values()) <= wanted else (low, middle)
    counts, rooms = at(low), at(high)
    # Between the two prices lie the steps of a few layers: they are gone a part of the way, in a fixed order.
    missing = wanted - sum(counts.values())
    for bounds in (rooms, highest):
        for name in curves:
            more = min(missing, bounds[name] - counts[name])
            counts[name] += more
            missing -= more
    return counts
