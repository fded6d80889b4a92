"""How close a model is to its original on held-out text: perplexity, divergence, agreement, each with its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.errors import UserError

# Neighbouring tokens are alike, so errors are taken over the means of runs of tokens (batch means).
TOKENS_PER_BATCH_MEAN = 128
_TOKENS_AT_A_TIME = 256
_LARGEST_LOSS = 700.0  # its exponential is about the largest float64


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class TokenMeasures:
    """What each scored token gave: float64, one value a token."""

    num_windows: int
    max_seq_length: int  # tokens of the longest window
    original_loss: Tensor  # −log p of the true next token, nats
    loss: Tensor
    divergence: Tensor  # KL(original ‖ artifact), nats
    agreement: Tensor  # 1 where both find the same token most likely

    def to_report(self) -> dict[str, Any]:
        """The ``quality`` part of a report."""
        original, artifact = _perplexity(self.original_loss), _perplexity(self.loss)
        # Both models read the same tokens: the error of their ratio comes from the paired differences.
        ratio = _perplexity(self.loss - self.original_loss)
        divergence, agreement = mean_with_error(self.divergence), mean_with_error(self.agreement)
        return {
            "num_tokens": self.loss.numel(),
            "num_windows": self.num_windows,
            "max_seq_length": self.max_seq_length,
            "original_perplexity": original.value,
            "original_perplexity_standard_error": original.standard_error,
            "perplexity": artifact.value,
            "perplexity_standard_error": artifact.standard_error,
            "perplexity_ratio": ratio.value,
            "perplexity_ratio_standard_error": ratio.standard_error,
            "kl_divergence": divergence.value,
            "kl_divergence_standard_error": divergence.standard_error,
            "top1_agreement": agreement.value,
            "top1_agreement_standard_error": agreement.standard_error,
        }


def windows_of(ids: Tensor, num_tokens: int, max_seq_length: int) -> list[Tensor]:
    """Consecutive windows of token ids, without overlap; the last may be shorter.

    Raises:
        UserError: ``empty_dataset`` where no window has two tokens, one to read and one to score.
    """
    windows = [window for window in torch.split(ids[:num_tokens], max_seq_length) if window.numel() > 1]
    if not windows:
        raise UserError(
            "empty_dataset",
            "The evaluation text gives no window of two tokens.",
            param="recipe.evaluation",
            hint="Give longer text; the model may have too few positions.",
        )
    return windows


@torch.inference_mode()
def measure(original: Any, artifact: Any, windows: list[Tensor], progress: Callable[[float], None]) -> TokenMeasures:
    """Run both models over the windows, each scored from its second token on.

    Raises:
        UserError: ``non_finite_evaluation`` where a model gives NaN or infinity.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for number, window in enumerate(windows):
        ids = window.unsqueeze(0).to(original.device)
        before = original(input_ids=ids, use_cache=False).logits[0, :-1]
        after = artifact(input_ids=ids, use_cache=False).logits[0, :-1]
        targets = ids[0, 1:]
        for first in range(0, targets.numel(), _TOKENS_AT_A_TIME):
            chunk = slice(first, first + _TOKENS_AT_A_TIME)
            parts.append(_compare(before[chunk].float(), after[chunk].float(), targets[chunk]))
        progress((number + 1) / len(windows))
    measures = TokenMeasures(
        len(windows),
        max(window.numel() for window in windows),
        *(torch.cat(values) for values in zip(*parts, strict=True)),
    )
    for name, values in (("original", measures.original_loss), ("compressed model", measures.loss)):
        if not bool(torch.isfinite(values).all()) or float(values.mean()) > _LARGEST_LOSS:
            raise UserError(
                "non_finite_evaluation",
                f"The {name} gives NaN, infinity or a perplexity beyond all numbers on the evaluation text.",
                param="recipe.evaluation",
                hint="Check the checkpoint on this text, or choose a milder recipe.",
            )
    return measures


def _compare(before: Tensor, after: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_before, log_after = before.log_softmax(dim=-1), after.log_softmax(dim=-1)
    picked = targets.unsqueeze(-1)
    divergence = (log_before.exp() * (log_before - log_after)).sum(dim=-1)
    agreement = before.argmax(dim=-1) == after.argmax(dim=-1)
    return (
        -log_before.gather(-1, picked).squeeze(-1).double().cpu(),
        -log_after.gather(-1, picked).squeeze(-1).double().cpu(),
        divergence.double().cpu(),
        agreement.double().cpu(),
    )


def mean_with_error(values: Tensor) -> Estimate:
    """The mean of a sequence (float64) and its standard error by batch means (Flegal & Jones 2010)."""
    size = min(TOKENS_PER_BATCH_MEAN, max(1, values.numel() // 2))
    means = values[: values.numel() // size * size].view(-1, size).mean(dim=-1)
    error = float(means.std(unbiased=True)) / math.sqrt(means.numel()) if means.numel() > 1 else math.nan
    return Estimate(float(values.mean()), error)


def _perplexity(losses: Tensor) -> Estimate:
    """The exponential of the mean loss; the error follows by the delta method."""
    mean = mean_with_error(losses)
    value = math.exp(mean.value)
    return Estimate(value, value * mean.standard_error)
