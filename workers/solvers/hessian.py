"""The Hessian of a layer's input, XᵀX, and the factor of its inverse that second-order solvers use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Columns of a tile: XᵀX is symmetric, so only tiles on and above the diagonal are computed.
TILE_COLUMNS = 256
# The whole way fits a weight to what the calibration text happens to be: on SmolLM2 at 3 bits, with 16 × 512 tokens, it
# was worse than none (log-perplexity +0.019 ± 0.011), a quarter much better (−0.086 ± 0.008).
DRIFT_STRENGTH = 0.25
# Rows of a weight that are measured at a time, so that there are no more copies of it than its solver needs.
ROWS_AT_A_TIME = 1024


def accumulate(hessian: Tensor, inputs: Tensor) -> None:
    """Add XᵀX to the upper triangle of ``hessian`` (float32, K × K), X being ``inputs`` (tokens × K).

    Only the tiles on and above the diagonal are touched, about half of the products; :func:`symmetrize` fills in
    the rest once all inputs are in.
    """
    columns = hessian.shape[0]
    for first in range(0, columns, TILE_COLUMNS):
        last = min(first + TILE_COLUMNS, columns)
        hessian[first:last, first:].addmm_(inputs[:, first:last].T, inputs[:, first:])


def symmetrize(hessian: Tensor) -> None:
    """Copy the upper triangle of ``hessian`` to the lower one, in place."""
    for first in range(0, hessian.shape[0], TILE_COLUMNS):
        last = min(first + TILE_COLUMNS, hessian.shape[0])
        hessian[first:last, first:last] = (
            hessian[first:last, first:last].triu() + hessian[first:last, first:last].triu(1).T
        )
        hessian[last:, first:last] = hessian[first:last, last:].T


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular U with UᵀU = (H + damping)⁻¹, for columns in ``order``."""

    order: Tensor  # int64, K
    factor: Tensor  # float32, K × K
    damping: float  # the fraction of the mean diagonal that was needed
    added: Tensor  # float32, K: what that, and a diagonal for dead columns, added to the Hessian's diagonal
    num_dead_columns: int


@dataclass(frozen=True)
class Outcome:
    """What the report says of a weight that was solved with its Hessian."""

    relative_error: float  # ‖(W − Ŵ)X‖² / ‖WX‖² on the calibration text
    damping: float | None  # fraction of the mean diagonal; None after a fallback that compensates nothing
    num_dead_columns: int

    @classmethod
    def solved(cls, change: Tensor, carried: float, energy: float, factor: InverseFactor) -> Outcome:
        """After the errors of W − Ŵ (``change``, rows × K), whose squares add up to ``carried``, were carried on.

        The sum is the error under the damped Hessian; what the damping adds is taken off. ``energy`` is ‖WX‖².
        """
        of_damping = 0.0
        for rows in torch.split(change, ROWS_AT_A_TIME):
            of_columns = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()
            of_damping += float((of_columns * factor.added).sum())
        error = max(0.0, carried - of_damping)
        return cls(error / energy if energy > 0 else 0.0, factor.damping, factor.num_dead_columns)

    @classmethod
    def uncompensated(cls, change: Tensor, energy: float, hessian: Tensor) -> Outcome:
        """Where no factor could be made, so that nothing made up for W − Ŵ (``change``, rows × K)."""
        return cls(energy_of(change, hessian) / energy if energy > 0 else 0.0, None, 0)

    def to_metrics(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "relative_error": self.relative_error,
            "damping": self.damping,
            "num_dead_columns": self.num_dead_columns,
        }


def energy_of(weight: Tensor, hessian: Tensor) -> float:
    """‖WX‖² (weight: rows × K), from H = XᵀX. Also of weights whose squares are no float32."""
    largest = float(torch.linalg.vector_norm(weight, torch.inf))
    if largest == 0:
        return 0.0
    total = 0.0
    for rows in torch.split(weight, ROWS_AT_A_TIME):
        scaled = rows / largest
        total += float(torch.sum((scaled @ hessian).mul_(scaled)))
    return largest**2 * total


def squared_norm(values: Tensor) -> float:
    """The sum of all squares, in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


class NotPositiveDefiniteError(ArithmeticError):
    """No damping up to the diagonal's own mean made the Hessian positive definite."""


def inverse_factor(hessian: Tensor, *, act_order: bool, damping: float) -> InverseFactor:
    """Factor the inverse of a damped Hessian (arXiv:2210.17323, step 3 of the algorithm).

    Damping starts at ``damping`` times the mean of the diagonal and grows tenfold until the Cholesky factorization
    succeeds. Columns whose input was always zero get a diagonal of their own: nothing is known of them, so they
    neither give nor take compensation.

    Raises:
        NotPositiveDefiniteError: Even a damping of 1 did not suffice, or the Hessian is not finite.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise NotPositiveDefiniteError("the Hessian has values that are not finite")
    columns = hessian.shape[0]
    dead = diagonal == 0
    mean = diagonal.mean()
    if bool(dead.all()):
        mean = torch.ones_like(mean)
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if act_order
        else torch.arange(columns, device=hessian.device)
    )
    # U is the inverse of R in H = R·Rᵀ, R upper triangular: the Cholesky factor of H with rows and columns reversed.
    # That is one factorization and one triangular inverse, where inverting H first would be three times the work.
    backwards = order.flip(0)
    damped = hessian[backwards.unsqueeze(1), backwards]
    undamped_diagonal = damped.diagonal().clone()
    fraction = damping
    while fraction <= 1.0:
        added = mean * fraction + dead * mean
        damped.diagonal().copy_(undamped_diagonal + added[backwards])
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            del damped
            return InverseFactor(order, _reversed_inverse(lower), fraction, added, int(dead.sum()))
        fraction *= 10.0
    raise NotPositiveDefiniteError("the Hessian is not positive definite at any damping up to 1")


def towards_original(
    weight: Tensor, drift: Tensor, factor: InverseFactor, *, strength: float = DRIFT_STRENGTH
) -> Tensor:
    """The weight (rows × K) that comes nearest, on the compressed model's input X, to W on the original's X̃.

    ``drift`` is (X̃ − X)ᵀX over the number of tokens, K × K. The objective is GPTAQ's (Li et al. 2025,
    arXiv:2504.02692, equation 3). What minimizes it among all real weights is W + W (X̃ − X)ᵀX H⁻¹, and what is left
    of it for a quantized or pruned one is its distance from that, weighted by H: GPTQ's own problem. ``strength`` is
    the part of the way that is gone.
    """
    moved = (weight @ drift)[:, factor.order]
    moved = moved @ factor.factor.T @ factor.factor
    result = weight.clone()
    result[:, factor.order] += strength * moved
    return result


def _reversed_inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, rows and columns reversed.

    Some columns at a time: what lies above their first row is zero, which saves two thirds of the work, and there is
    never more than the matrix and its inverse in memory.
    """
    size = lower.shape[0]
    inverse = torch.zeros_like(lower, memory_format=torch.contiguous_format)
    for first in range(0, size, TILE_COLUMNS):
        last = min(first + TILE_COLUMNS, size)
        unit = torch.zeros((size - first, last - first), dtype=lower.dtype, device=lower.device)
        unit.fill_diagonal_(1.0)
        solved = torch.linalg.solve_triangular(lower[first:, first:], unit, upper=False)
        inverse[: size - first, size - last : size - first] = solved.flip(0, 1)
    return inverse
