"""Distillation: the model learns to give what its original gives (Hinton et al. 2015; Sanh et al. 2019)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.distillation_options import DistillationOptions
from workers.techniques.options import OptionError, Statistic
from workers.techniques.student_options import Student


class LogitDistillation(DistillationOptions):
    """The teacher is the model as it was before anything was taken from it."""

    summary: ClassVar[str] = "Trains the smaller model to give what the original gives: wins back what was lost."

    statistics: ClassVar[frozenset[Statistic]] = frozenset({"unit_norms"})

    technique: Literal["logit_distillation"] = "logit_distillation"
    student: Annotated[
        Student | None,
        Field(description="The shape of the model that learns. Null for the model as the stages before have left it."),
    ] = None

    @model_validator(mode="after")
    def _begins_once(self) -> Self:
        if self.student is not None and self.initialization == "random":
            raise OptionError("initialization", "must be left out where student is given, which has its own")
        return self

    @property
    def needs(self) -> frozenset[Statistic]:
        """What tells apart the heads, neurons and channels of the model that the student is made of."""
        student = self.student
        measures = student is not None and student.chooses_units and student.importance == "activations"
        return self.statistics if measures else frozenset()

    @property
    def makes_new_type(self) -> bool:
        """Whether the student is of another type than the model."""
        return self.student is not None and self.student.model_type is not None

    @property
    def reshapes(self) -> bool:
        """Where it makes a student."""
        return self.student is not None
