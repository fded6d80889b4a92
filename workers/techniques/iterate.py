"""Iterate: take away a little, recover a little, until the target (Zhu & Gupta 2017; Frankle & Carbin 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from workers.techniques.depth_pruning import DepthPruning
from workers.techniques.fine_tuning import FineTuning
from workers.techniques.logit_distillation import LogitDistillation
from workers.techniques.lora_recovery import LoraRecovery
from workers.techniques.magnitude import Magnitude
from workers.techniques.options import Kind, OptionError, StageOptions, Statistic
from workers.techniques.pruning_options import PruningOptions
from workers.techniques.sparsegpt import SparseGPT
from workers.techniques.training_options import TrainingOptions
from workers.techniques.wanda import Wanda

InnerStage = Annotated[
    Magnitude | Wanda | SparseGPT | DepthPruning | LogitDistillation | LoraRecovery | FineTuning,
    Field(discriminator="technique"),
]


class Iterate(StageOptions):
    """Rounds of contained stages: what takes away asks for a growing part of its target, what trains is the same."""

    kind: ClassVar[Kind] = "pruning"
    summary: ClassVar[str] = "Prunes in rounds with training after each: loses less than all at once."

    technique: Literal["iterate"] = "iterate"
    stages: Annotated[
        list[InnerStage],
        Field(
            min_length=2,
            max_length=8,
            description="What a round does, in order: one stage that prunes, to its target in the last round, and at "
            "least one that trains, for its `num_steps` in each round.",
        ),
    ]
    rounds: Annotated[int, Field(ge=1, le=100)] = 4
    schedule: Annotated[
        list[Annotated[float, Field(gt=0, le=1)]] | None,
        Field(
            max_length=100,
            description="Of each round, which part of the target it reaches; the last 1. Null for 1 − (1 − r/n)³, "
            "which takes most away at first, when there is most to spare.",
        ),
    ] = None

    @field_validator("schedule")
    @classmethod
    def _rises(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and (not value or value[-1] != 1 or any(a >= b for a, b in pairwise(value))):
            raise ValueError("must rise from round to round and end with 1")
        return value

    @model_validator(mode="after")
    def _prunes_and_trains(self) -> Self:
        pruning = [stage for stage in self.stages if not isinstance(stage, TrainingOptions)]
        if len(pruning) != 1 or isinstance(self.stages[-1], PruningOptions | DepthPruning):
            raise OptionError("stages", "must have one stage that prunes, and end with one that trains")
        [stage] = pruning
        place = f"stages[{self.stages.index(stage)}]"
        if isinstance(stage, PruningOptions) and stage.pattern is not None and len(self.fractions) > 1:
            raise OptionError(f"{place}.mask_structure", "must be unstructured: a part of an N:M mask is none")
        if isinstance(stage, DepthPruning) and stage.num_blocks is None:
            raise OptionError(f"{place}.num_blocks", "must be given: so many are left out over all rounds")
        for number, each in enumerate(self.stages):
            if each.reshapes and each is not stage:
                raise OptionError(
                    f"stages[{number}].student",
                    "must be left out: rounds train the model that they prune; make a student in a stage of its own",
                )
        if self.schedule is not None and "rounds" in self.model_fields_set and self.rounds != len(self.schedule):
            raise OptionError("rounds", f"must be left out, or {len(self.schedule)}, as schedule has it")
        return self

    @property
    def fractions(self) -> list[float]:
        """Of each round, which part of the target it reaches."""
        if self.schedule is not None:
            return self.schedule
        return [1 - (1 - number / self.rounds) ** 3 for number in range(1, self.rounds + 1)]

    @property
    def training(self) -> list[TrainingOptions]:
        """The contained stages that train."""
        return [stage for stage in self.stages if isinstance(stage, TrainingOptions)]

    @property
    def num_tokens(self) -> int | None:
        """How many tokens of text are read at most, others in each round; None where the length of the text says it."""
        wanted = [stage.num_tokens for stage in self.training]
        return None if None in wanted else len(self.fractions) * max(num for num in wanted if num is not None)

    @property
    def pruning(self) -> PruningOptions | DepthPruning:
        """The contained stage that takes away, with its target."""
        return next(stage for stage in self.stages if isinstance(stage, PruningOptions | DepthPruning))

    @property
    def needs(self) -> frozenset[Statistic]:
        """What contained stages need."""
        return self.pruning.needs

    @property
    def relative_time(self) -> float:
        """Of all rounds."""
        return len(self.fractions) * sum(
            1.0 if isinstance(stage, PruningOptions) else stage.relative_time for stage in self.stages
        )

    def round(self, number: int) -> list[tuple[int, StageOptions]]:
        """The stages of a round, from 0, and their indices; one that takes away nothing then is left out."""
        before, after = [0.0, *self.fractions][number : number + 2]
        found: list[tuple[int, StageOptions]] = []
        for index, stage in enumerate(self.stages):
            changes: dict[str, Any] = {}
            if isinstance(stage, PruningOptions):
                assert stage.sparsity is not None
                changes = {"sparsity": stage.sparsity if after == 1 else after * stage.sparsity}
            elif isinstance(stage, DepthPruning):
                assert stage.num_blocks is not None
                changes = {"num_blocks": round(after * stage.num_blocks) - round(before * stage.num_blocks)}
                if not changes["num_blocks"]:
                    continue
            found.append((index, stage.model_copy(update=changes)))
        return found


def placed(stages: Sequence[StageOptions]) -> Iterator[tuple[str, StageOptions]]:
    """The stages of a recipe that do something themselves, contained ones too, each with where it is."""
    for index, stage in enumerate(stages):
        param = f"recipe.stages[{index}]"
        if isinstance(stage, Iterate):
            yield from ((f"{param}.stages[{number}]", inner) for number, inner in enumerate(stage.stages))
        else:
            yield param, stage
