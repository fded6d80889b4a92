"""How far one distribution over tokens or classes is from another."""

from __future__ import annotations

import torch
from torch import Tensor

# A row of logits may be long: so many are turned into probabilities at a time.
ROWS_AT_A_TIME = 256


def kl_divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) of every row in nats: float64, flat.

    ``before`` holds logarithms of probabilities and ``after`` logits, both … × classes.
    """
    rows = zip(
        torch.split(before.flatten(0, -2), ROWS_AT_A_TIME),
        torch.split(after.flatten(0, -2), ROWS_AT_A_TIME),
        strict=True,
    )
    parts = []
    for left, right in rows:
        difference = right.float().log_softmax(dim=-1).neg_().add_(left)
        parts.append(left.exp().mul_(difference).sum(dim=-1, dtype=torch.float64))
    return torch.cat(parts)
