"""Distillation: the model learns to give what its original gives (Hinton et al. 2015; Sanh et al. 2019)."""

from __future__ import annotations

from typing import ClassVar, Literal

from workers.techniques.distillation_options import DistillationOptions


class LogitDistillation(DistillationOptions):
    """The teacher is the model as it was before anything was taken from it."""

    summary: ClassVar[str] = "Trains the smaller model to give what the original gives: wins back what was lost."

    technique: Literal["logit_distillation"] = "logit_distillation"
