"""Accuracy, F1 and divergence of classifiers, against plain references."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tests.workers.opened import opened
from workers.errors import UserError
from workers.evaluation.classes import ClassMeasures, accuracies, macro_f1, measure_classes
from workers.formats.opening import Opened


def predictions(num_texts: int, num_classes: int, share_right: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num_texts,), generator=generator)
    others = torch.randint(0, num_classes, (num_texts,), generator=generator)
    is_right = torch.rand(num_texts, generator=generator) < share_right
    return labels, torch.where(is_right, labels, others)


def plain_macro_f1(labels: list[int], predicted: list[int]) -> float:
    scores = []
    for each in sorted({*labels, *predicted}):
        hits = sum(a == b == each for a, b in zip(labels, predicted, strict=True))
        precision = hits / max(1, predicted.count(each))
        recall = hits / max(1, labels.count(each))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_macro_f1_is_the_mean_over_the_classes_that_occur(num_classes: int) -> None:
    labels, predicted = predictions(200, num_classes, 0.6, seed=num_classes)
    labels, predicted = labels * 2, predicted * 2  # classes between them never occur
    assert macro_f1(labels, predicted)[0] == pytest.approx(plain_macro_f1(labels.tolist(), predicted.tolist()))
    assert macro_f1(labels, labels)[0] == 1
    assert macro_f1(torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64))[0] == 0


def test_the_errors_are_those_that_resampling_finds() -> None:
    labels, before = predictions(800, 3, 0.8, seed=1)
    _, noise = predictions(800, 3, 0.0, seed=2)
    after = torch.where(torch.rand(800, generator=torch.Generator().manual_seed(3)) < 0.1, noise, before)
    found = accuracies(labels, before, after)
    generator = torch.Generator().manual_seed(4)
    samples = [torch.randint(0, 800, (800,), generator=generator) for _ in range(1500)]
    resampled = {
        "original_accuracy": [float((before[i] == labels[i]).double().mean()) for i in samples],
        "accuracy_difference": [
            float(((after[i] == labels[i]).double() - (before[i] == labels[i]).double()).mean()) for i in samples
        ],
        "macro_f1": [macro_f1(labels[i], after[i])[0] for i in samples],
        "macro_f1_difference": [macro_f1(labels[i], after[i])[0] - macro_f1(labels[i], before[i])[0] for i in samples],
    }
    for name, values in resampled.items():
        assert found[name].standard_error == pytest.approx(float(torch.tensor(values).std()), rel=0.08), name
    assert found["accuracy_difference"].value == pytest.approx(
        found["accuracy"].value - found["original_accuracy"].value
    )
    assert found["accuracy_difference"].standard_error < found["accuracy"].standard_error


def test_divergence_and_agreement_are_those_of_the_class_distributions() -> None:
    before = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    after = torch.tensor([[0.5, 0.0, -1.0], [3.0, 2.0, 0.0]], dtype=torch.float64)
    report = ClassMeasures(10, 6, before, after, None).to_report()
    expected = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert report["kl_divergence"] == pytest.approx(float(expected))
    assert report["top1_agreement"] == 0.5
    assert "accuracy" not in report


class Counting(torch.nn.Module):
    """Tells the number of tokens, and the first one, as the logits of two classes."""

    device = torch.device("cpu")

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        self.shapes.append(tuple(input_ids.shape))
        count = torch.full((input_ids.shape[0],), float(input_ids.shape[1]))
        return SimpleNamespace(logits=self.factor * torch.stack((count, input_ids[:, 0].float()), dim=1))


def _classifier(model: torch.nn.Module) -> Opened:
    return opened(model, "bert", "classification")


def test_sequences_of_one_length_go_together_and_come_back_in_order() -> None:
    original = Counting()
    sequences = [torch.full((length,), first) for length, first in ((3, 9), (5, 1), (3, 0), (2, 7))]
    pairs = [(ids, ids) for ids in sequences]
    measures = measure_classes(_classifier(original), _classifier(Counting(2.0)), pairs, [1, 0, 0, 0], lambda _: None)
    assert original.shapes == [(1, 2), (2, 3), (1, 5)]
    assert measures.original_logits.tolist() == [[3, 9], [5, 1], [3, 0], [2, 7]]
    report = measures.to_report()
    assert (report["accuracy"], report["num_tokens"], report["num_windows"]) == (0.75, 13, 4)
    assert report["accuracy_difference"] == 0


def test_a_classifier_that_gives_nan_is_named() -> None:
    broken = _classifier(Counting(math.nan))
    with pytest.raises(UserError, match="compressed model") as caught:
        measure_classes(_classifier(Counting()), broken, [(torch.tensor([1, 2]),) * 2], None, lambda _: None)
    assert caught.value.code == "non_finite_evaluation"
