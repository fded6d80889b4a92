"""How a classifier compares with its original: divergence and agreement, and on labelled texts accuracy and F1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.engine.text import of_one_length
from workers.evaluation.both import Batch, logits_of_both
from workers.evaluation.divergence import kl_divergence
from workers.evaluation.estimates import Estimate, independent_mean
from workers.evaluation.quality import check_finite
from workers.formats.opening import Readable

_TOKENS_AT_A_TIME = 4096


@dataclass(frozen=True)
class ClassMeasures:
    """What each sequence gave."""

    num_tokens: int  # of all sequences, special ones too
    max_seq_length: int
    original_logits: Tensor  # float64, sequences × classes
    logits: Tensor
    labels: Tensor | None  # the true classes, one a sequence
    num_retokenized: int = 0  # tokens that were read, and that the artifact's tokenizer writes otherwise

    def to_report(self) -> dict[str, Any]:
        """The ``quality`` part of a report."""
        log_before, log_after = self.original_logits.log_softmax(dim=-1), self.logits.log_softmax(dim=-1)
        before, after = self.original_logits.argmax(dim=-1), self.logits.argmax(dim=-1)
        divergence = kl_divergence(log_before, log_after)
        measured = {
            "kl_divergence": independent_mean(divergence),
            "top1_agreement": independent_mean((before == after).double()),
        }
        if self.labels is not None:
            measured |= accuracies(self.labels, before, after)
        return {
            "num_tokens": self.num_tokens,
            "num_retokenized": self.num_retokenized,
            "num_windows": len(before),
            "max_seq_length": self.max_seq_length,
            **{name: estimate.value for name, estimate in measured.items()},
            **{f"{name}_standard_error": estimate.standard_error for name, estimate in measured.items()},
        }


def accuracies(labels: Tensor, before: Tensor, after: Tensor) -> dict[str, Estimate]:
    """Accuracy and macro F1 of two sets of predictions, and what the second gains: all are classes, one a text.

    Errors of differences come from the pairs: both models read the same texts.
    """
    correct = [(predicted == labels).double() for predicted in (before, after)]
    scores = [macro_f1(labels, predicted) for predicted in (before, after)]
    (original_f1, original_influence), (f1, influence) = scores
    return {
        "original_accuracy": independent_mean(correct[0]),
        "accuracy": independent_mean(correct[1]),
        "accuracy_difference": independent_mean(correct[1] - correct[0]),
        "original_macro_f1": Estimate(original_f1, independent_mean(original_influence).standard_error),
        "macro_f1": Estimate(f1, independent_mean(influence).standard_error),
        "macro_f1_difference": Estimate(
            f1 - original_f1, independent_mean(influence - original_influence).standard_error
        ),
    }


def macro_f1(labels: Tensor, predicted: Tensor) -> tuple[float, Tensor]:
    """The mean F1 of the classes that occur, and each text's influence on it (float64), whose mean is 0.

    F1 of a class is 2a / (b + c), with a, b and c the shares of texts that are it and called so, that are it, and that
    are called so. Its standard error follows by the delta method: that of the mean of the influences.
    """
    classes, (true, called) = torch.unique(torch.stack((labels, predicted)), return_inverse=True)
    num_classes, num_texts = classes.numel(), labels.numel()
    is_right = true == called
    share = (_counts(true, num_classes) + _counts(called, num_classes)) / num_texts
    f1 = 2 * _counts(true[is_right], num_classes) / num_texts / share
    pull = f1 / share
    influence = (2 * is_right / share[true] - pull[true] - pull[called]) / num_classes
    return float(f1.mean()), influence


@torch.inference_mode()
def measure_classes(
    original: Readable,
    artifact: Readable,
    sequences: Sequence[Batch],
    labels: Sequence[int] | None,
    progress: Callable[[float], None],
    *,
    num_retokenized: int = 0,
) -> ClassMeasures:
    """Run both models over the sequences, each over its own ids; ``labels`` are the true classes, if they are known.

    ``num_retokenized`` of the original's tokens are written otherwise in the artifact's.

    Raises:
        UserError: ``non_finite_evaluation`` where a model gives NaN or infinity.
    """
    batches: list[Batch] = []
    numbers: list[int] = []
    for chosen, samples in of_one_length([ids for ids, _ in sequences]):
        for places, others in of_one_length([sequences[number][1] for number in chosen]):
            num_rows = max(1, _TOKENS_AT_A_TIME // max(samples.shape[1], others.shape[1]))
            batches += zip(torch.split(samples[places], num_rows), torch.split(others, num_rows), strict=True)
            numbers += [chosen[place] for place in places]
    read = logits_of_both(original, artifact, batches, progress)
    found = zip(*((before.double().cpu(), after.double().cpu()) for before, after in read), strict=True)
    order = torch.tensor(numbers).argsort()
    before, after = (torch.cat(logits)[order] for logits in found)
    check_finite(*(-logits.log_softmax(dim=-1).amax(dim=-1) for logits in (before, after)))
    return ClassMeasures(
        sum(ids.numel() for ids, _ in sequences),
        max(ids.numel() for ids, _ in sequences),
        before,
        after,
        None if labels is None else torch.tensor(labels),
        num_retokenized,
    )


def _counts(classes: Tensor, num_classes: int) -> Tensor:
    return classes.bincount(minlength=num_classes).double()
