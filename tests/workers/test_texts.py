"""Texts of a job as the token ids that stages read."""

from __future__ import annotations

from pathlib import Path

import transformers

from tests.models import write_tiny_model
from tests.workers.attempts import fetched
from workers.architectures import architecture_of
from workers.engine.checkpoint import Checkpoint
from workers.engine.device import compute_device
from workers.engine.skeleton import Skeleton
from workers.recipe import Recipe
from workers.texts import Texts


def test_of_texts_in_the_order_of_their_classes_some_of_each_are_calibrated_with(tmp_path: Path) -> None:
    model = tmp_path / "roots" / "classifier"
    write_tiny_model(model, "bert", task="classification")
    texts = [f"Good number {index} of many." for index in range(60)] + [f"Bad number {index}." for index in range(60)]
    recipe = {
        "stages": [
            {"technique": "depth_pruning", "num_blocks": 1, "keep_first": 0, "keep_last": 0},
            {"technique": "logit_distillation", "alpha": 0.0, "num_steps": 1, "batch_size": 2},
        ],
        "training": {"dataset": {"texts": texts}},
        "calibration": {"num_samples": 16, "max_seq_length": 32},
    }
    attempt = fetched(tmp_path / "work", model, recipe)
    checkpoint = Checkpoint(model)
    skeleton = Skeleton(checkpoint, architecture_of(checkpoint.config), compute_device())
    said: list[object] = []
    read = Texts(attempt.work / "source", Recipe.model_validate(attempt.request["recipe"]), said.append)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    samples = [tokenizer.decode(row) for ids in read.calibration(skeleton) for row in ids]
    assert len(samples) == 16
    assert not said
    num_good = sum("ood" in sample for sample in samples)
    assert 4 <= num_good <= 12
