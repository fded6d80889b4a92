"""What calibration gathers of one layer input, once for all layers that read it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from workers.engine.device import inexact_products
from workers.errors import UserError
from workers.solvers.activations import column_sums
from workers.solvers.hessian import InverseFactor, NotPositiveDefiniteError, accumulate, inverse_factor, symmetrize
from workers.solvers.low_rank import whitening
from workers.techniques.options import Statistic


class InputStatistics:
    """What the stages want to know of an input of ``in_features`` columns, and what solvers make of it."""

    def __init__(self, name: str, in_features: int, wanted: frozenset[Statistic], device: torch.device) -> None:
        self.name = name
        self.num_tokens = 0
        self._hessian: Tensor | None = None
        self._squares: Tensor | None = None  # of each column; the Hessian has them on its diagonal
        if "hessian" in wanted:
            self._hessian = torch.zeros((in_features, in_features), dtype=torch.float32, device=device)
        else:
            self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._absmax: Tensor | None = None
        if "input_absmax" in wanted:
            self._absmax = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._drift: Tensor | None = None
        if "drift" in wanted:
            self._drift = torch.zeros((in_features, in_features), dtype=torch.float32, device=device)
        self._factors: dict[tuple[bool, float], InverseFactor | None] = {}
        self._whitenings: dict[float, Tensor] = {}

    def add(self, inputs: Tensor, original: Tensor | None = None) -> None:
        """Take in the input of one batch, … × in_features; and what the original model reads in its place.

        Where products round their factors, the Hessian is that of the rounded input: it stays positive semidefinite.
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.num_tokens += rows.shape[0]
        if self._hessian is not None:
            with inexact_products():
                accumulate(self._hessian, rows)
        if self._squares is not None or self._absmax is not None:
            squares, largest = column_sums(rows)
            if self._squares is not None:
                self._squares += squares
            if self._absmax is not None:
                torch.maximum(self._absmax, largest, out=self._absmax)
        if self._drift is not None:
            assert original is not None
            with inexact_products():
                self._drift.addmm_((original.reshape(rows.shape) - rows).T, rows)

    def finish(self) -> None:
        """Say that every batch is in: sums become means over tokens.

        Raises:
            UserError: ``non_finite_activations``.
        """
        if self._hessian is not None:
            symmetrize(self._hessian)
            self._hessian /= self.num_tokens
        if self._drift is not None:
            self._drift /= self.num_tokens
        if self._squares is not None:
            self._squares /= self.num_tokens
        if not bool(torch.isfinite(self.input_norms).all()):
            raise UserError(
                "non_finite_activations",
                f"The input of {self.name} is not finite on the calibration text.",
                param="model.id",
                hint="The checkpoint gives NaN or infinity; check it, and its dtype, on the same text.",
            )

    def scaled(self, scale: Tensor) -> InputStatistics:
        """The same of the input divided by ``scale`` (float32, in_features)."""
        other = copy.copy(self)
        other._factors, other._whitenings = {}, {}
        if self._hessian is not None:
            other._hessian = self._hessian / scale / scale.unsqueeze(-1)
        if self._drift is not None:
            other._drift = self._drift / scale / scale.unsqueeze(-1)
        if self._squares is not None:
            other._squares = self._squares / scale.square()
        if self._absmax is not None:
            other._absmax = self._absmax / scale
        return other

    @property
    def hessian(self) -> Tensor:
        """XᵀX over the number of tokens: float32, in_features × in_features."""
        assert self._hessian is not None
        return self._hessian

    @property
    def drift(self) -> Tensor:
        """(X̃ − X)ᵀX over the number of tokens, X̃ being the original model's input: float32, K × K."""
        assert self._drift is not None
        return self._drift

    @property
    def input_norms(self) -> Tensor:
        """Root of the mean square of each column: float32, in_features."""
        squares = self._squares if self._squares is not None else self.hessian.diagonal()
        return squares.sqrt().to(torch.float32)

    @property
    def input_absmax(self) -> Tensor:
        """The largest absolute value of each column: float32, in_features."""
        assert self._absmax is not None
        return self._absmax

    def inverse_factor(self, *, act_order: bool, damping: float) -> InverseFactor | None:
        """The factor of the inverse Hessian, made once for all layers of the input; None if there is none."""
        key = (act_order, damping)
        if key not in self._factors:
            try:
                self._factors[key] = inverse_factor(self.hessian, act_order=act_order, damping=damping)
            except NotPositiveDefiniteError:
                self._factors[key] = None
        return self._factors[key]

    def whitening(self, damping: float) -> Tensor:
        """S with S·Sᵀ the damped Hessian, float64, K × K, made once for all layers of the input."""
        if damping not in self._whitenings:
            self._whitenings[damping] = whitening(self.hessian, damping=damping)
        return self._whitenings[damping]
