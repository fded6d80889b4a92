"""Stages that change a model's shape, all in one recipe with quantization: one job, proven and measured as any."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.models import write_tiny_llama
from tests.workers.attempts import TEXTS, Attempt, certified
from workers.disk import write_json

STAGES: list[dict[str, Any]] = [
    {"technique": "width_pruning", "intermediate_size": 96, "hidden_size": 48},
    {"technique": "vocabulary_pruning", "min_count": 151},
    {"technique": "sliding_window", "window": 16},
    {"technique": "tie_embeddings"},
    {"technique": "depth_pruning", "num_blocks": 1},
    {"technique": "gptq", "group_size": 16},
]
LATE = 383  # of a token that nothing but generation_config.json needs: another number once others are gone


@pytest.fixture(scope="module")
def attempt(tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    folder = tmp_path_factory.mktemp("one")
    write_tiny_llama(folder / "llama", num_layers=3, tie=False)
    write_json(folder / "llama" / "generation_config.json", {"eos_token_id": [0, LATE]})
    calibration = {"dataset": {"texts": TEXTS[:150]}, "num_samples": 8, "max_seq_length": 32}
    return certified(folder / "job", folder / "llama", {"stages": STAGES, "calibration": calibration})


def test_every_stage_leaves_what_it_is_for(attempt: Attempt) -> None:
    config = AutoConfig.from_pretrained(attempt.artifact)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (48, 96, 2)
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(attempt.artifact)) < 384
    assert (config.sliding_window, config.tie_word_embeddings) == (16, True)
    assert [stage["technique"] for stage in attempt.report["stages"]] == [stage["technique"] for stage in STAGES]
    assert attempt.report["size"]["compression_ratio"] > 3


def test_ids_are_those_of_the_tokenizer_that_is_left(attempt: Attempt) -> None:
    folders = (attempt.work / "source" / "model", attempt.artifact)
    before, after = map(AutoTokenizer.from_pretrained, folders)
    settings = json.loads((attempt.artifact / "generation_config.json").read_text())
    expected = after.convert_tokens_to_ids(before.convert_ids_to_tokens([0, LATE]))
    assert settings["eos_token_id"] == expected != [0, LATE]


def test_contexts_are_measured_across_two_tokenizers(attempt: Attempt) -> None:
    quality, context = attempt.report["quality"], attempt.report["context"]
    assert quality["num_retokenized"] > 0
    assert [entry["length"] for entry in context["lengths"]] == [8, 16, 32, 64, 128, 256]
    for entry in context["lengths"]:
        assert math.isfinite(entry["perplexity_ratio"])
        assert entry["num_tokens"] > 0
        # Fewer values are kept for each token, and no more tokens than the window has.
        assert entry["kv_cache_bytes"] < entry["original_kv_cache_bytes"]
    # Short contexts and those of the evaluation read one text: the original makes nearly the same of both.
    assert context["lengths"][4]["original_perplexity"] == pytest.approx(quality["original_perplexity"], rel=0.1)
