"""Narrower, taught again, in 4 bits, as one job: killed in each stage, it ends with the bytes of an unkilled one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.workers.attempts import TEXTS, Attempt, certified, fetched
from tests.workers.training.recipes import Stopped, digests
from workers.certify import certify
from workers.pipeline import compress
from workers.training import loop

STEPS = {"num_steps": 6, "batch_size": 4, "max_seq_length": 32, "num_evaluations": 6, "precision": "float32"}
RECIPE = {
    "stages": [
        {"technique": "width_pruning", "intermediate_size": 96, "num_key_value_heads": 1},
        {"technique": "logit_distillation", "learning_rate": 3e-3, **STEPS},
        {"technique": "gptq", "scheme": "W4A16", "group_size": 32},
    ],
    "training": {"dataset": {"texts": TEXTS[:150]}},
}


@pytest.fixture(scope="module")
def unkilled(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    return certified(tmp_path_factory.mktemp("unkilled") / "work", tiny_llama, RECIPE)


def test_each_stage_has_metrics_of_its_own(unkilled: Attempt) -> None:
    width, training, codes = (stage["metrics"] for stage in unkilled.report["stages"])
    assert width["intermediate_size"] == 96
    assert training["held_out_loss"] < training["original_held_out_loss"]
    assert codes["num_layers"] == 14
    size = unkilled.report["size"]
    assert size["artifact_bytes"] < 0.6 * size["original_bytes"]


def test_killed_in_each_stage_it_ends_with_the_same_bytes(
    unkilled: Attempt, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SECONDS_A_STATE", 0.0)
    monkeypatch.setattr(loop, "_SECONDS_A_PROGRESS", 0.0)
    attempt = fetched(tmp_path / "work", tiny_llama, RECIPE)
    steps: Counter[int] = Counter()

    def killed_at(*place: object) -> Callable[[dict[str, Any]], None]:
        def tell(event: dict[str, Any]) -> None:
            if event["event"] == "progress" and event.get("step") == "train":
                steps[event["block"]] += 1
            if (event.get("stage"), event.get("step"), event.get("block")) == place:
                raise Stopped

        return tell

    for place in ((0, "plan.model.layers.1", 1), (1, "train", 3), (2, "model.layers.1.self_attn.q_proj", 1)):
        with pytest.raises(Stopped):
            compress(attempt.work, attempt.request, killed_at(*place))
    assert steps == Counter({1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}) | Counter({3: 2})
    compress(attempt.work, attempt.request, attempt.events.append)
    assert digests(attempt) == digests(unkilled)
    certify(attempt.work, attempt.request, attempt.events.append)
