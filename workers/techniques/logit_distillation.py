"""Distillation: the model learns to give what its original gives (Hinton et al. 2015; Sanh et al. 2019)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from workers.techniques.distillation_options import DistillationOptions
from workers.techniques.options import OptionError


class LogitDistillation(DistillationOptions):
    """The teacher is the model as it was before anything was taken from it."""

    summary: ClassVar[str] = "Trains the smaller model to give what the original gives: wins back what was lost."

    technique: Literal["logit_distillation"] = "logit_distillation"

    @model_validator(mode="after")
    def _begins_with_values(self) -> Self:
        if self.initialization == "gptq":
            raise OptionError("initialization", "must be model or random: gptq gives codes, which are not trained here")
        return self
