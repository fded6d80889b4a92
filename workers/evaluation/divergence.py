"""How far one distribution over tokens or classes is from another."""

from __future__ import annotations

import torch
from torch import Tensor

# A row of logits may be long: so many are turned into probabilities at a time.
ROWS_AT_A_TIME = 256


def kl_divergence(log_before: Tensor, log_after: Tensor) -> Tensor:
    """KL(before ‖ after) in nats, of logarithms of probabilities (… × classes): one value a row, none below zero.

    Of nearly equal ones rounding leaves sums on both sides of it.
    """
    return (log_before.exp() * (log_before - log_after)).sum(dim=-1).clamp_(min=0.0)


def kl_divergence_of_logits(log_before: Tensor, after: Tensor) -> Tensor:
    """The same of ``after`` given as logits: flat, and a few rows at a time."""
    rows = zip(
        torch.split(log_before.flatten(0, -2), ROWS_AT_A_TIME),
        torch.split(after.flatten(0, -2), ROWS_AT_A_TIME),
        strict=True,
    )
    return torch.cat([kl_divergence(left, right.float().log_softmax(dim=-1)) for left, right in rows])
