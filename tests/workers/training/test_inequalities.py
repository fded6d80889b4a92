"""What is claimed of stages that train, on a model that has learned something: each by two standard errors and more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench.scoring import paired_difference
from tests.trained import texts, write_trained_llama
from tests.workers.attempts import compressed
from workers.formats.opening import open_checkpoint

LENGTH = 128
SHAPE = {"num_steps": 40, "batch_size": 8, "max_seq_length": LENGTH, "learning_rate": 2e-3, "precision": "float32",
         "num_evaluations": 2}  # fmt: skip
DISTIL = {"technique": "logit_distillation", "alpha": 0.5, **SHAPE}
TUNE = {"technique": "fine_tuning", **SHAPE}
CUTS = {
    "depth": {"technique": "depth_pruning", "num_blocks": 2},
    "width": {"technique": "width_pruning", "intermediate_size": 192, "num_key_value_heads": 1},
}

Losses = Callable[..., Tensor]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Path:
    """The trained Llama, which is kept from run to run."""
    cache = request.config.cache
    assert cache is not None
    folder: Path = cache.mkdir("trained-llama-1") / "llama"
    if not folder.exists():
        temporary = folder.with_suffix(".tmp")
        write_trained_llama(temporary)
        temporary.rename(folder)
    return folder


@pytest.fixture(scope="module")
def losses(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The loss of each held-out token under what stages make of the model; each recipe is run once."""
    training, held_out = texts()
    known: dict[str, Tensor] = {}
    work = tmp_path_factory.mktemp("jobs")
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([token for text in held_out for token in tokenizer(text)["input_ids"]])

    def losses_of(*stages: dict[str, Any]) -> Tensor:
        name = repr(stages)
        if name not in known:
            recipe = {
                "stages": list(stages),
                "training": {"dataset": {"texts": training}},
                "calibration": {"dataset": {"texts": training}, "num_samples": 32, "max_seq_length": LENGTH},
                "evaluation": {"dataset": {"texts": held_out}, "num_tokens": 512, "max_seq_length": LENGTH},
            }
            artifact = compressed(work / f"{len(known)}", model, recipe).artifact if stages else model
            known[name] = _token_losses(artifact, ids)
        return known[name]

    return losses_of


@torch.inference_mode()
def _token_losses(folder: Path, ids: Tensor) -> Tensor:
    model = open_checkpoint(folder, torch.device("cpu")).model
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").double()


def is_lower(ours: Tensor, theirs: Tensor) -> bool:
    """Whether one loses less, by more than two standard errors of the difference token by token."""
    difference = paired_difference(ours, theirs)
    return difference.value < -2 * difference.standard_error


@pytest.mark.parametrize("cut", list(CUTS))
def test_a_student_learns_most_from_its_teacher_and_what_it_kept(cut: str, losses: Losses) -> None:
    distilled = losses(CUTS[cut], DISTIL)
    assert is_lower(distilled, losses(CUTS[cut]))
    assert is_lower(distilled, losses(CUTS[cut], TUNE))
    assert is_lower(distilled, losses(CUTS[cut], {**DISTIL, "initialization": "random"}))
    assert is_lower(losses(), distilled)  # nor does it know more than who taught it


def test_text_of_the_teacher_gives_back_half_of_what_real_text_does(losses: Losses) -> None:
    synthetic = {**DISTIL, "alpha": 0.0, "synthetic": {"num_samples": 320}}
    cut, real, own = losses(CUTS["width"]), losses(CUTS["width"], DISTIL), losses(CUTS["width"], synthetic)
    assert is_lower(own, cut)
    assert is_lower(own, (cut + real) / 2)


@pytest.mark.parametrize(
    ("taken", "given"),
    [
        ({"technique": "low_rank", "ratio": 0.5}, {**DISTIL, "technique": "lora_recovery"}),
        ({"technique": "share_layers", "groups": [[2, 3], [4, 5]]}, DISTIL),
    ],
    ids=["low-rank", "shared"],
)
def test_recovery_gives_back_what_factors_and_shared_blocks_took(
    taken: dict[str, Any], given: dict[str, Any], losses: Losses
) -> None:
    assert is_lower(losses(), losses(taken))
    assert is_lower(losses(taken, given), losses(taken))


@pytest.mark.parametrize(("bits", "other"), [(2, "gptq"), (3, "gptq"), (4, "round_to_nearest")])
def test_codes_that_are_trained_lose_less(bits: int, other: str, losses: Losses) -> None:
    scheme = {"scheme": f"W{bits}A16", "group_size": 64}
    trained = {**DISTIL, "technique": "quantization_aware_finetuning", "learning_rate": 5e-4, **scheme}
    assert is_lower(losses(trained), losses({"technique": other, **scheme}))
