"""SmoothQuant: move the outliers of activations into the weights, then quantize both (Xiao et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from workers.techniques.options import Statistic
from workers.techniques.quantization_options import EightBitOptions

if TYPE_CHECKING:
    from torch import Tensor

    from workers.architectures import Producer
    from workers.engine.layer import Layer


class SmoothQuant(EightBitOptions):
    """8-bit weights and activations, smoothed; arXiv:2211.10438."""

    summary: ClassVar[str] = (
        "8-bit weights and activations, after outliers of the activations were moved into the weights."
    )
    statistics: ClassVar[frozenset[Statistic]] = frozenset({"input_absmax"})
    rescales_inputs: ClassVar[bool] = True

    technique: Literal["smoothquant"] = "smoothquant"
    smoothing_strength: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="How much of the difficulty goes from the activations to the weights, where a norm makes the "
            "input: its outliers are in the same columns for every token.",
        ),
    ] = 0.8
    linear_smoothing_strength: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="The same where another linear layer makes the input: its outliers come with single tokens, "
            "for which the weights of all would pay.",
        ),
    ] = 0.5

    def input_scale(self, layers: Sequence[Layer], producer: Producer) -> Tensor:
        """The scale between the input's and the weights' largest values."""
        from workers.solvers.scaling import smoothing_scale

        strength = self.linear_smoothing_strength if producer.kind == "linear" else self.smoothing_strength
        return smoothing_scale(layers[0].statistics.input_absmax, [layer.weight for layer in layers], strength)
