"""How close a language model is to its original on held-out text: perplexity, divergence, agreement, with errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from workers.errors import UserError
from workers.evaluation.both import logits_of_both
from workers.evaluation.divergence import kl_divergence
from workers.evaluation.estimates import mean_with_error, perplexity
from workers.formats.opening import Readable

# Of the tokens of a window that are no special ones, as many are masked as in BERT's training (Devlin et al. 2019).
MASKED_FRACTION = 0.15
# Logits that are turned into probabilities at a time, of which there are some ten copies.
VALUES_AT_A_TIME = 1 << 22
_W = TypeVar("_W")
_LARGEST_LOSS = 700.0  # its exponential is about the largest float64


@dataclass(frozen=True)
class Window:
    """Token ids that both models read, and what is asked of them there."""

    ids: Tensor
    positions: Tensor  # of the logits that are scored
    targets: Tensor  # the token that each of them should find


@dataclass(frozen=True)
class TokenMeasures:
    """What each scored token gave: float64, one value a token."""

    num_windows: int
    max_seq_length: int  # tokens of the longest window
    original_loss: Tensor  # −log p of the true token, nats
    loss: Tensor
    divergence: Tensor  # KL(original ‖ artifact), nats
    agreement: Tensor  # 1 where both find the same token most likely
    num_retokenized: int = 0  # tokens that were read, and that the artifact's tokenizer writes otherwise

    def to_report(self) -> dict[str, Any]:
        """The ``quality`` part of a report."""
        original, artifact = perplexity(self.original_loss), perplexity(self.loss)
        # Both models read the same tokens: the error of their ratio comes from the paired differences.
        ratio = perplexity(self.loss - self.original_loss)
        compared = {"kl_divergence": self.divergence, "top1_agreement": self.agreement}
        # There are none where the artifact's tokenizer writes every scored token otherwise.
        means = {name: mean_with_error(values) for name, values in compared.items() if values.numel()}
        return {
            "num_tokens": self.loss.numel(),
            "num_retokenized": self.num_retokenized,
            "num_windows": self.num_windows,
            "max_seq_length": self.max_seq_length,
            "original_perplexity": original.value,
            "original_perplexity_standard_error": original.standard_error,
            "perplexity": artifact.value,
            "perplexity_standard_error": artifact.standard_error,
            "perplexity_ratio": ratio.value,
            "perplexity_ratio_standard_error": ratio.standard_error,
            **{name: mean.value for name, mean in means.items()},
            **{f"{name}_standard_error": mean.standard_error for name, mean in means.items()},
        }


def windows_of(ids: Tensor, num_tokens: int, max_seq_length: int) -> list[Window]:
    """Consecutive windows of a text, without overlap, each scored from its second token on; the last may be shorter.

    Raises:
        UserError: ``empty_dataset`` where no window has two tokens, one to read and one to score.
    """
    cut = [window for window in torch.split(ids[:num_tokens], max_seq_length) if window.numel() > 1]
    return not_empty([Window(ids, torch.arange(ids.numel() - 1), ids[1:]) for ids in cut])


def masked_windows(sequences: list[Tensor], mask_token: int, special_tokens: frozenset[int]) -> list[Window]:
    """The sequences with a part of their tokens masked, scored there: Salazar et al. 2020, but for many at a time.

    Which ones is the same for every model and recipe, so that results compare.

    Raises:
        UserError: ``empty_dataset`` where all tokens are special ones.
    """
    windows = []
    for number, ids in enumerate(sequences):
        chosen = choose_masked(ids.tolist(), special_tokens, number)
        if chosen is not None:
            windows.append(Window(ids.index_fill(0, chosen, mask_token), chosen, ids[chosen]))
    return not_empty(windows)


def choose_masked(ids: Sequence[int], special_tokens: frozenset[int], number: int) -> Tensor | None:
    """Which positions of the sequence with this number are masked; None where all its tokens are special ones."""
    ordinary = torch.tensor([index for index, token in enumerate(ids) if token not in special_tokens])
    if not ordinary.numel():
        return None
    shuffled = torch.randperm(ordinary.numel(), generator=torch.Generator().manual_seed(number))
    return ordinary[shuffled[: max(1, round(MASKED_FRACTION * ordinary.numel()))].sort().values]


@torch.inference_mode()
def measure(
    original: Readable, artifact: Readable, windows: list[Window], progress: Callable[[float], None]
) -> TokenMeasures:
    """Run both models over the windows.

    Raises:
        UserError: ``non_finite_evaluation`` where a model gives NaN or infinity.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    batches = [window.ids.unsqueeze(0) for window in windows]
    read = logits_of_both(original, artifact, [(ids, ids) for ids in batches], progress)
    for window in windows:
        before, after = next(read)
        num_rows = max(1, VALUES_AT_A_TIME // before.shape[-1])
        for chunk in torch.split(torch.arange(window.positions.numel()), num_rows):
            positions, targets = (each[chunk].to(before.device) for each in (window.positions, window.targets))
            parts.append(_compare(before[0, positions].float(), after[0, positions].float(), targets))
        del before, after  # they may be large, and are not to be there with the next ones
    original_loss, loss, divergence, agreement = (torch.cat(values) for values in zip(*parts, strict=True))
    longest = max(window.ids.numel() for window in windows)
    measures = TokenMeasures(len(windows), longest, original_loss, loss, divergence, agreement)
    check_finite(measures.original_loss, measures.loss)
    return measures


def check_finite(original: Tensor, artifact: Tensor) -> None:
    """Raise UserError ``non_finite_evaluation`` for losses or logits of a model that mean nothing."""
    for name, values in (("original", original), ("compressed model", artifact)):
        if not bool(torch.isfinite(values).all()) or float(values.mean()) > _LARGEST_LOSS:
            raise UserError(
                "non_finite_evaluation",
                f"The {name} gives NaN, infinity or a perplexity beyond all numbers on the evaluation text.",
                param="recipe.evaluation",
                hint="Check the checkpoint on this text, or choose a milder recipe.",
            )


def not_empty(windows: list[_W]) -> list[_W]:
    """The windows; raises UserError ``empty_dataset`` where there are none."""
    if not windows:
        raise UserError(
            "empty_dataset",
            "The evaluation text gives no window of two tokens.",
            param="recipe.evaluation",
            hint="Give longer text; the model may have too few positions.",
        )
    return windows


def _compare(before: Tensor, after: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_before, log_after = before.log_softmax(dim=-1), after.log_softmax(dim=-1)
    picked = targets.unsqueeze(-1)
    divergence = kl_divergence(log_before, log_after)
    agreement = before.argmax(dim=-1) == after.argmax(dim=-1)
    return (
        -log_before.gather(-1, picked).squeeze(-1).double().cpu(),
        -log_after.gather(-1, picked).squeeze(-1).double().cpu(),
        divergence.double().cpu(),
        agreement.double().cpu(),
    )
