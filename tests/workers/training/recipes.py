"""Recipes that train, and what tests of them have in common."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from tests.models import write_tiny_model
from tests.workers.attempts import TEXTS, Attempt
from workers.pipeline import compress
from workers.training import loop
from workers.training.step_journal import Curve, StepJournal

TRAINING = {"dataset": {"texts": TEXTS[:150]}}
SHORT = {"num_steps": 6, "batch_size": 4, "max_seq_length": 32, "num_evaluations": 3, "precision": "float32"}
TUNE = {"technique": "fine_tuning", **SHORT}
DISTIL = {"technique": "logit_distillation", **SHORT}
CUT = {"technique": "depth_pruning", "method": "list", "blocks": [1]}


class Stopped(BaseException):
    """The run ends here."""


def digests(attempt: Attempt) -> dict[str, str]:
    names = ("model.safetensors", "config.json", "recipe.json", "tokenizer.json")
    return {name: hashlib.sha256((attempt.artifact / name).read_bytes()).hexdigest() for name in names}


def curve_of(attempt: Attempt, index: int) -> list[float]:
    """The held-out losses of a stage."""
    compressed_json = json.loads((attempt.work / "compressed.json").read_text())
    return [point["held_out_loss"] for point in compressed_json["stages"][index]["metrics"]["curve"]]


def recipe_of(*stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"stages": list(stages), "training": TRAINING, **changes}


def stopped_after(attempt: Attempt, step: int, place: str = "") -> None:
    """Run it until it has kept its state of ``step``, in a journal whose folder's name has ``place``."""
    own_write = StepJournal.write

    def write(self: StepJournal, curve: Curve, tensors: dict[str, Tensor]) -> None:
        own_write(self, curve, tensors)
        if curve.step == step and place in str(self.folder):
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SECONDS_A_STATE", 0.0)
        patch.setattr(StepJournal, "write", write)
        with pytest.raises(Stopped):
            compress(attempt.work, attempt.request, attempt.events.append)


URLS = [
    (f"http://{word}{number}.example/{kind}/page-{number * 7}", label)
    for number in range(60)
    for word, kind, label in (("bank-login", "verify", "phishing"), ("library", "books", "legitimate"))
]
LABELLED = {"texts": [text for text, _ in URLS[:80]], "labels": [label for _, label in URLS[:80]]}
HELD_OUT = {"texts": [text for text, _ in URLS[80:]], "labels": [label for _, label in URLS[80:]]}
MAKE = {
    "technique": "fine_tuning", "task": "classification", "num_steps": 40, "batch_size": 16, "max_seq_length": 64,
    "learning_rate": 2e-3, "precision": "float32", "num_evaluations": 2,
}  # fmt: skip
CLASSIFYING: dict[str, Any] = {
    "training": {"dataset": LABELLED},
    "evaluation": {"dataset": HELD_OUT, "num_tokens": 4096, "max_seq_length": 128, "allow_overlap": True},
}


def write_body(folder: Path, model_type: str) -> None:
    """Write an encoder without any head, as sentence encoders are published."""
    sizes = {"distilbert": {"dim": 64, "hidden_dim": 128, "n_heads": 4, "n_layers": 2}}
    write_tiny_model(folder, model_type, task="classification", **sizes.get(model_type, {"intermediate_size": 128}))
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.base_model.save_pretrained(folder)
