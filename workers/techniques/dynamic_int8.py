"""Dynamic 8-bit integers: weights rounded once, activations whenever the model runs (Dettmers et al. 2022)."""

from __future__ import annotations

from typing import ClassVar, Literal

from workers.techniques.quantization_options import EightBitOptions


class DynamicInt8(EightBitOptions):
    """Weights with one scale a channel, activations with one a token; arXiv:2208.07339, section 2."""

    summary: ClassVar[str] = "8-bit weights and activations, for fast integer products. Needs no calibration text."

    technique: Literal["dynamic_int8"] = "dynamic_int8"
