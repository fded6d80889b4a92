"""Texts of a job as the token ids that stages read."""

from __future__ import annotations

import json
from pathlib import Path

import transformers

from tests.models import write_tiny_llama, write_tiny_model
from tests.workers.attempts import TEXTS, certified, fetched
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


def test_stages_before_and_after_a_training_calibrate_with_its_text(tmp_path: Path) -> None:
    model = tmp_path / "roots" / "llama"
    write_tiny_llama(model)
    recipe = {
        "stages": [
            {"technique": "width_pruning", "intermediate_size": 64},
            {"technique": "fine_tuning", "num_steps": 1, "batch_size": 2, "max_seq_length": 32},
            {"technique": "gptq", "scheme": "W4A16", "group_size": 32},
        ],
        "training": {"dataset": {"texts": TEXTS[:150]}},
        "calibration": {"num_samples": 16, "max_seq_length": 64},
    }
    attempt = certified(tmp_path / "work", model, recipe)
    assert not (attempt.work / "source" / "calibration.jsonl").exists()
    assert json.loads((attempt.work / "compressed.json").read_text())["num_calibration_tokens"] == 16 * 64
    assert [stage["technique"] for stage in attempt.report["stages"]] == ["width_pruning", "fine_tuning", "gptq"]
