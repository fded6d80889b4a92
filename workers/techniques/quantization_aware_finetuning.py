"""Quantization-aware fine-tuning: weights are trained as the codes that they will be (Jacob et al. 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.distillation_options import DistillationOptions
from workers.techniques.options import Kind, OptionError
from workers.techniques.quantization_options import QuantizationOptions

if TYPE_CHECKING:
    from workers.engine.layer import Layer


class QuantizationAwareFineTuning(QuantizationOptions, DistillationOptions):
    """Forward passes round; gradients pass as if they did not (arXiv:1308.3432), to scales as in arXiv:1902.08153."""

    kind: ClassVar[Kind] = "quantization"
    summary: ClassVar[str] = (
        "Trains weights and scales while they are rounded, to give what the original gives: best at 2 and 3 bits."
    )
    initializations: ClassVar[tuple[str, ...]] = ("model", "gptq", "random")

    technique: Literal["quantization_aware_finetuning"] = "quantization_aware_finetuning"
    initialization: Annotated[
        Literal["model", "gptq", "random"],
        Field(
            description="What training begins with: the codes that GPTQ gives, which takes calibration text; the "
            "weights of the model, rounded; or such as a new model has."
        ),
    ] = "gptq"
    scale_learning_rate: Annotated[
        float, Field(ge=0, le=1, description="Of the logarithms of scales, at its highest; 0 leaves them as they are.")
    ] = 1e-3

    @model_validator(mode="after")
    def _rounds_weights_alone(self) -> Self:
        facts = self.facts
        if facts.quantizes_activations or facts.dtype or facts.is_normal or facts.is_float:
            raise OptionError("scheme", f"must be of integer weights alone, such as W4A16, not {self.scheme}")
        if self.embeddings:
            raise OptionError("embeddings", "must be false: linear layers alone are trained as codes")
        return self

    @property
    def relative_time(self) -> float:
        """Of its training."""
        return 10.0

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Take over the codes that training has ended with."""
        layer.take_over_codes(layer.grid(self))
        return {}
