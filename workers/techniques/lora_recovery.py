"""LoRA repair: low-rank adapters are trained against the original and merged into the weights (arXiv:2106.09685)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from workers.techniques.distillation_options import DistillationOptions
from workers.techniques.options import ChosenLayers, Kind


class LoraRecovery(ChosenLayers, DistillationOptions):
    """Of linear layers W of the blocks only A and B learn, in W + (lora_alpha / rank) · B · A; all else is frozen."""

    kind: ClassVar[Kind] = "training"
    summary: ClassVar[str] = (
        "Trains low-rank adapters to give what the original gives and merges them: recovery in less memory."
    )
    initializations: ClassVar[tuple[str, ...]] = ("model",)

    technique: Literal["lora_recovery"] = "lora_recovery"
    rank: Annotated[
        int,
        Field(ge=1, le=8_192, description="Of B · A. A layer whose smaller side is shorter gets that as its rank."),
    ] = 16
    lora_alpha: Annotated[
        float, Field(gt=0, le=65_536, description="Over the rank it is the factor of B · A, as in LoRA.")
    ] = 32.0
    learning_rate: Annotated[
        float, Field(gt=0, le=1, description="At its highest; adapters want about ten times that of whole weights.")
    ] = 1e-3
