"""What the options of every technique have in common."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor

    from workers.architectures import Producer
    from workers.engine.layer import Layer

Kind = Literal["pruning", "quantization", "distillation", "factorization", "sharing", "attention", "training"]
Statistic = Literal[
    "hessian",
    "input_norms",
    "input_absmax",
    "drift",
    "block_influence",
    "losses",
    "divergence",
    "token_counts",
    "unit_norms",
]


class OptionError(ValueError):
    """An option does not go with the others; ``requirement`` continues its name to a sentence."""

    def __init__(self, option: str, requirement: str) -> None:
        super().__init__(f"{option} {requirement}")
        self.option = option


class StageOptions(BaseModel):
    """Options that every stage has. A technique adds its own, and says what it is and what it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: ClassVar[Kind]
    summary: ClassVar[str]
    technique: str
    statistics: ClassVar[frozenset[Statistic]] = frozenset()

    @property
    def needs(self) -> frozenset[Statistic]:
        """What the stage needs from calibration with these options."""
        return self.statistics

    @property
    def reshapes(self) -> bool:
        """Whether the model has another shape after the stage."""
        return False

    @property
    def relative_time(self) -> float:
        """How long a stage before those takes, roughly, where compressing layers and writing the artifact takes 1."""
        return 0.01


class ChosenLayers(StageOptions):
    """Options of a stage that treats linear layers one by one, and may be told to spare some."""

    ignore: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        Field(
            description="Names or shell-style patterns of linear layers to leave as they are, for example "
            "`model.layers.0.*` or `*.down_proj`.",
            max_length=1000,
            fail_fast=True,
        ),
    ] = []

    def ignores(self, layer: str) -> bool:
        """Whether the stage leaves the layer of this name as it is."""
        return any(fnmatchcase(layer, pattern) for pattern in self.ignore)


class LayerOptions(ChosenLayers):
    """Options of a stage that compresses linear layers one by one, as the engine's stream comes past them."""

    rescales_inputs: ClassVar[bool] = False
    leaves_model: ClassVar[bool] = False  # another model, which stages after it have to see whole

    @property
    def relative_time(self) -> float:
        """It compresses layers."""
        return 1.0

    @property
    def plan_share(self) -> float:
        """What part of the job's time goes into measuring, before the first layer is compressed, how to treat each.

        Roughly, for the progress; 0 where all are treated alike.
        """
        return 0.0

    def at(self, choice: float) -> LayerOptions:
        """The stage as it is for a layer that such a plan gives ``choice``."""
        raise NotImplementedError

    def input_scale(self, layers: Sequence[Layer], producer: Producer) -> Tensor:
        """By what to divide the input that all ``layers`` read, and to multiply their columns.

        Asked before they are compressed, only where ``producer``, which makes the input, can take the scale over, and
        only of a stage that says ``rescales_inputs``.
        """
        raise NotImplementedError

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Change ``layer`` in place and return what the report says of it."""
        raise NotImplementedError
