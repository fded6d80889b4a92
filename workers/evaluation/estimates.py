"""Means with their standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# Neighbouring tokens are alike, so errors are taken over the means of runs of tokens (batch means).
TOKENS_PER_BATCH_MEAN = 128


@dataclass(frozen=True)
class Estimate:
    """A mean, or what follows from one, and its standard error: NaN where one value is all there is."""

    value: float
    standard_error: float


def mean_with_error(values: Tensor) -> Estimate:
    """The mean of a sequence (float64) and its standard error by batch means (Flegal & Jones 2010)."""
    size = min(TOKENS_PER_BATCH_MEAN, max(1, values.numel() // 2))
    means = values[: values.numel() // size * size].view(-1, size).mean(dim=-1)
    return Estimate(float(values.mean()), _error_of_mean(means))


def independent_mean(values: Tensor) -> Estimate:
    """The mean of values (float64) that know nothing of each other, and its standard error."""
    return Estimate(float(values.mean()), _error_of_mean(values))


def perplexity(losses: Tensor) -> Estimate:
    """The exponential of the mean loss; the error follows by the delta method."""
    mean = mean_with_error(losses)
    value = math.exp(mean.value)
    return Estimate(value, value * mean.standard_error)


def _error_of_mean(values: Tensor) -> float:
    return float(values.std(unbiased=True)) / math.sqrt(values.numel()) if values.numel() > 1 else math.nan
