"""Two factors of low rank in place of a weight, that err least on the layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """The directions of a layer's output, those that carry most of it first."""

    directions: Tensor  # float64, out_features × directions: orthonormal columns
    energies: Tensor  # float64, directions: the mean square of the output along each; they fall

    def rank_of(self, energy: float) -> int:
        """The smallest rank that keeps this fraction of the output's mean square."""
        total = self.energies.cumsum(dim=0)
        kept = total >= energy * total[-1]
        return 1 + int((~kept).sum())

    def lost(self, rank: int) -> float:
        """What a rank leaves out of the output's mean square, as a fraction: the least that any two factors can."""
        total = float(self.energies.sum())
        return float(self.energies[rank:].sum()) / total if total > 0 else 0.0


def whitening(hessian: Tensor, *, damping: float) -> Tensor:
    """S with S·Sᵀ = H + damping: float64, in_features × in_features; H = XᵀX over the number of tokens.

    S comes from H's eigenvectors, which a singular H has too. ``damping`` times the mean of H's diagonal is added to
    the diagonal: what calibration text never shows still counts for something.
    """
    mean = float(hessian.diagonal().mean())
    values, vectors = torch.linalg.eigh(hessian.to(torch.float64))
    values = values.clamp(min=0) + (damping * mean if mean > 0 else 1.0)
    root: Tensor = vectors * values.sqrt()
    return root


def spectrum(weight: Tensor, root: Tensor) -> Spectrum:
    """The singular values of W·S, squared, and its left singular vectors.

    ``weight`` is W (out_features × in_features), ``root`` S of :func:`whitening`, under which an error of W·S is one of
    the output (Wang et al. 2024, arXiv:2403.07378, section 3.1).
    """
    directions, values, _ = torch.linalg.svd(weight.to(torch.float64) @ root, full_matrices=False)
    return Spectrum(directions, values.square())


def factors(weight: Tensor, found: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """U_k (out_features × rank) and U_kᵀ·W (rank × in_features), whose product is nearest to W under the whitening.

    That product is U_k·Σ_k·V_kᵀ·S⁻¹ without the inverse. U_k has orthonormal columns, so that no channel of what goes
    between the factors is scaled otherwise than the output is.
    """
    out_factor = found.directions[:, :rank]
    in_factor = out_factor.T @ weight.to(torch.float64)
    return out_factor.to(weight.dtype).contiguous(), in_factor.to(weight.dtype).contiguous()


def product(out_factor: Tensor, in_factor: Tensor) -> Tensor:
    """The float32 weight (out_features × in_features) that two stored factors stand for."""
    return out_factor.to(torch.float32) @ in_factor.to(torch.float32)
