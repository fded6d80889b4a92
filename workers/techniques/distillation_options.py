"""What the options of techniques that learn from a teacher have in common."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from workers.techniques.options import Kind, OptionError
from workers.techniques.training_options import TrainingOptions


class SyntheticText(BaseModel):
    """Text that the teacher itself writes, in place of the user's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    num_samples: Annotated[int, Field(ge=8, le=10_000_000, description="Texts of max_seq_length tokens.")]
    temperature: Annotated[float, Field(gt=0, le=10, description="Of the tokens that are drawn.")] = 1.0
    top_k: Annotated[int | None, Field(ge=1, le=1_000_000, description="Draw among so many alone.")] = None


class DistillationOptions(TrainingOptions):
    """Soft targets with their T² (arXiv:1503.02531) beside hard ones; hidden states as in arXiv:1910.01108."""

    kind: ClassVar[Kind] = "distillation"
    initializations: ClassVar[tuple[str, ...]] = ("model", "random")  # that the technique can begin with

    initialization: Annotated[
        Literal["model", "gptq", "random"],
        Field(
            description="What training begins with: the weights of the model, or such as a new model of its shape has. "
            "`gptq`, of a technique that trains codes: those that GPTQ gives."
        ),
    ] = "model"
    temperature: Annotated[float, Field(gt=0, le=100, description="Of both distributions that are compared.")] = 2.0
    alpha: Annotated[
        float, Field(ge=0, le=1, description="Weight of the hard targets; the rest is the teacher's. 1 has no teacher.")
    ] = 0.1
    hidden_weight: Annotated[
        float,
        Field(
            ge=0,
            le=1_000,
            description="Weight of hidden states matched to the teacher's, each layer to one as far up, through "
            "projections that are learned.",
        ),
    ] = 0.0
    teacher_top_k: Annotated[
        int | None,
        Field(
            ge=1,
            le=4_096,
            description="Run the teacher once and keep its so many largest logits of each token on disk. Null to run "
            "it at every step.",
        ),
    ] = None
    synthetic: Annotated[
        SyntheticText | None, Field(description="Text sampled from the teacher, in place of the training text.")
    ] = None

    @property
    def has_teacher(self) -> bool:
        """Whether anything is learned from one."""
        return self.alpha < 1 or bool(self.hidden_weight)

    @model_validator(mode="after")
    def _begins_with_what_it_trains(self) -> Self:
        if self.initialization not in self.initializations:
            raise OptionError(
                "initialization", f"must be {' or '.join(self.initializations)}, which {self.technique} can train"
            )
        return self

    @model_validator(mode="after")
    def _fits_cache(self) -> Self:
        if self.teacher_top_k is not None and self.hidden_weight:
            raise OptionError("teacher_top_k", "must be null where hidden_weight is given: hidden states are not kept")
        if self.teacher_top_k is not None and self.alpha == 1:
            raise OptionError("teacher_top_k", "must be null with alpha 1, which has no teacher")
        if self.teacher_top_k is not None and self.augmentation != type(self.augmentation)():
            raise OptionError("teacher_top_k", "must be null with augmentation: the teacher reads other tokens then")
        return self
