"""GPTQ: quantize column by column, and let the columns not yet done make up for the error (Frantar et al. 2022)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from workers.techniques.quantization_options import ActivationOptions
from workers.techniques.schemes import IntegerScheme
from workers.techniques.second_order import SecondOrderQuantization


class GPTQ(SecondOrderQuantization, ActivationOptions):
    """Second-order quantization with calibration text; arXiv:2210.17323."""

    summary: ClassVar[str] = (
        "Quantize column by column, compensating each column's error in the rest by the Hessian of the calibration."
    )

    technique: Literal["gptq"] = "gptq"
    scheme: Annotated[IntegerScheme, Field(description=ActivationOptions.model_fields["scheme"].description)] = "W4A16"
