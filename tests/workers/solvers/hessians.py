"""Inputs and Hessians as activations make them, for the solvers' tests."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.solvers.hessian import accumulate, symmetrize


def inputs_of(seed: int, columns: int, tokens: int = 512) -> Tensor:
    """Correlated inputs of unequal size, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    spread = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return torch.randn(tokens, columns, generator=generator) @ mix * spread


def hessian_of(inputs: Tensor) -> Tensor:
    """XᵀX over the number of tokens, gathered in batches."""
    hessian = torch.zeros(inputs.shape[1], inputs.shape[1])
    for batch in torch.split(inputs, 100):
        accumulate(hessian, batch)
    symmetrize(hessian)
    return hessian / inputs.shape[0]


def output_error(weight: Tensor, restored: Tensor, inputs: Tensor) -> float:
    """‖(W − Ŵ)X‖² in float64."""
    return float(((weight - restored).double() @ inputs.double().T).square().sum())
