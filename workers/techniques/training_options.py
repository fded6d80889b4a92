"""What the options of techniques that train have in common."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from workers.techniques.options import Kind, OptionError, StageOptions

DEFAULT_EPOCHS = 3.0
# Of a micro-batch, where the options do not say how many samples it has.
_TOKENS_A_MICRO_BATCH = 4_096


class Augmentation(BaseModel):
    """What is done to the tokens of a sample each time it is read, by chance: Sennrich et al. 2016, Wei & Zou 2019."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    mask_probability: Annotated[
        float, Field(ge=0, le=0.5, description="Of each token to be replaced by the mask token, or the unknown one.")
    ] = 0.0
    delete_probability: Annotated[float, Field(ge=0, le=0.5, description="Of each token to be left out.")] = 0.0


class TrainingOptions(StageOptions):
    """Options of a technique that changes weights by gradient descent on the recipe's training text."""

    kind: ClassVar[Kind] = "training"

    num_steps: Annotated[
        int | None, Field(ge=1, le=10_000_000, description="Steps of the optimizer; this or `num_epochs`.")
    ] = None
    num_epochs: Annotated[
        float | None,
        Field(gt=0, le=10_000, description="How often each sample is read; 3 where neither is given."),
    ] = None
    batch_size: Annotated[int, Field(ge=1, le=65_536, description="Samples a step.")] = 32
    micro_batch_size: Annotated[
        int | None,
        Field(
            ge=1,
            le=65_536,
            description="Samples that are in memory at a time, whose gradients are accumulated. Null for as many as "
            "give about 4,096 tokens.",
        ),
    ] = None
    max_seq_length: Annotated[
        int, Field(ge=8, le=131_072, description="Tokens a sample; what is longer is cut off, of a text that goes on.")
    ] = 256
    learning_rate: Annotated[float, Field(gt=0, le=1, description="At its highest.")] = 1e-4
    schedule: Annotated[
        Literal["cosine", "linear", "constant"],
        Field(description="How the learning rate falls after the warm-up: to a tenth by cosine, to 0, or not at all."),
    ] = "cosine"
    warmup_fraction: Annotated[float, Field(ge=0, lt=1, description="Of the steps, in which the rate rises.")] = 0.05
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0, le=1_000, description="Longer gradients are cut to it.")] = 1.0
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(
            description="Of products; weights and optimizer are float32. `auto`: bfloat16 where the processor "
            "multiplies it."
        ),
    ] = "auto"
    held_out_fraction: Annotated[
        float, Field(gt=0, le=0.5, description="Of the training text, kept to measure the loss on.")
    ] = 0.05
    num_evaluations: Annotated[
        int, Field(ge=1, le=1_000, description="How often the loss on held-out text is measured.")
    ] = 10
    patience: Annotated[
        int | None,
        Field(
            ge=1,
            le=1_000,
            description="Stop after so many measurements without a lower loss, and take the weights of the lowest. "
            "Null to go on to the end.",
        ),
    ] = None
    curriculum: Annotated[
        Literal["none", "shortest_first", "easiest_first"],
        Field(description="The order of the first epoch: by chance, by length, or by the loss before training."),
    ] = "none"
    augmentation: Augmentation = Augmentation()
    num_processes: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="Processes that share each step, each with an accelerator of its own, or with its part of the "
            "CPU's threads. Every one holds the whole model; the loss curve is that of one process.",
        ),
    ] = 1

    @model_validator(mode="after")
    def _is_one_length(self) -> Self:
        if self.num_steps is not None and self.num_epochs is not None:
            raise OptionError("num_epochs", "must be left out where num_steps is given")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise OptionError("micro_batch_size", f"must be at most batch_size, {self.batch_size}")
        if self.num_processes > self.batch_size:
            raise OptionError("num_processes", f"must be at most batch_size, {self.batch_size}")
        return self

    @property
    def relative_time(self) -> float:
        """Roughly: it depends on the steps, which may depend on the text."""
        return 10.0

    @property
    def num_tokens(self) -> int | None:
        """How many tokens of text are read at most; None where the text says it, by its length."""
        return None if self.num_steps is None else self.num_steps * self.batch_size * self.max_seq_length

    @property
    def samples_at_a_time(self) -> int:
        """How many samples are in memory at most."""
        return self.micro_batch_size or max(1, _TOKENS_A_MICRO_BATCH // self.max_seq_length)

    def steps_for(self, num_samples: int) -> int:
        """Steps of the optimizer on so many samples."""
        if self.num_steps is not None:
            return self.num_steps
        return max(1, math.ceil((self.num_epochs or DEFAULT_EPOCHS) * num_samples / self.batch_size))
