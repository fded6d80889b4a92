"""Gradual pruning: the smallest weights go a few at a time while the others learn (Zhu & Gupta, arXiv:1710.01878)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.distillation_options import DistillationOptions
from workers.techniques.options import Kind, OptionError
from workers.techniques.sparsity_options import SparsityOptions


class GradualPruning(SparsityOptions, DistillationOptions):
    """Masks by magnitude that grow with 1 − (1 − t)³ of the way, t from 0 to 1 between two points of the training."""

    kind: ClassVar[Kind] = "pruning"
    summary: ClassVar[str] = "Sets more and more of the smallest weights to zero while the model trains."

    technique: Literal["gradual_pruning"] = "gradual_pruning"
    begin_fraction: Annotated[
        float, Field(ge=0, lt=1, description="Of the steps, that are made before weights begin to go.")
    ] = 0.0
    end_fraction: Annotated[
        float, Field(gt=0, lt=1, description="Of the steps, after which the mask is whole; the rest recovers.")
    ] = 0.7
    num_updates: Annotated[int, Field(ge=1, le=10_000, description="How often the mask grows, at even distances.")] = 20

    @model_validator(mode="after")
    def _ends_sparse(self) -> Self:
        if self.begin_fraction >= self.end_fraction:
            raise OptionError("begin_fraction", f"must be less than end_fraction, {self.end_fraction:g}")
        if self.patience is not None:
            raise OptionError("patience", "must be null: the lowest loss may be that of a mask that was not yet whole")
        return self

    def updates(self, num_steps: int) -> dict[int, float]:
        """After how many of ``num_steps`` steps the mask grows, and to which part of the sparsity; at last to 1.

        Equation 1 of the paper, from an initial sparsity of 0. Where several fall on one step, the last counts; the
        mask is whole before the last step.
        """
        found = {}
        for number in range(1, self.num_updates + 1):
            time = number / self.num_updates
            place = self.begin_fraction + (self.end_fraction - self.begin_fraction) * time
            found[min(num_steps - 1, round(num_steps * place))] = 1 - (1 - time) ** 3
        return found
