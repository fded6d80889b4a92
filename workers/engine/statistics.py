"""What calibration gathers of one layer input, once for all layers that read it."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.errors import UserError
from workers.solvers.hessian import InverseFactor, NotPositiveDefiniteError, accumulate, inverse_factor, symmetrize


class InputStatistics:
    """The Hessian of an input of ``in_features`` columns, and the factors that solvers make of it."""

    def __init__(self, name: str, in_features: int, device: torch.device) -> None:
        self.name = name
        self.num_tokens = 0
        self.hessian = torch.zeros((in_features, in_features), dtype=torch.float32, device=device)
        self._factors: dict[tuple[bool, float], InverseFactor | None] = {}

    def add(self, inputs: Tensor) -> None:
        """Take in the input of one batch: … × in_features."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.num_tokens += rows.shape[0]
        accumulate(self.hessian, rows)

    def finish(self) -> None:
        """Say that every batch is in: the Hessian becomes the mean over tokens.

        Raises:
            UserError: ``non_finite_activations``.
        """
        symmetrize(self.hessian)
        self.hessian /= self.num_tokens
        if not bool(torch.isfinite(self.hessian.diagonal()).all()):
            raise UserError(
                "non_finite_activations",
                f"The input of {self.name} is not finite on the calibration text.",
                param="model.id",
                hint="The checkpoint gives NaN or infinity; check it, and its dtype, on the same text.",
            )

    def inverse_factor(self, *, act_order: bool, damping: float) -> InverseFactor | None:
        """The factor of the inverse Hessian, made once for all layers of the input; None if there is none."""
        key = (act_order, damping)
        if key not in self._factors:
            try:
                self._factors[key] = inverse_factor(self.hessian, act_order=act_order, damping=damping)
            except NotPositiveDefiniteError:
                self._factors[key] = None
        return self._factors[key]
