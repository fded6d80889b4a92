"""Where Wanda's zeros fall: by the norms of what layers read, in the original model or in the pruned one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.workers.attempts import Attempt, compressed
from workers.engine.text import calibration_samples, read_documents, tokenize

WANDA = {"technique": "wanda", "sparsity": 0.5}


@torch.inference_mode()
def scores(attempt: Attempt, model: Path, reader: Path) -> Iterator[tuple[str, Tensor]]:
    """By linear layer: |weight| times the norm of its input, as plain transformers runs ``reader`` on the same text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = tokenize(tokenizer, read_documents(attempt.work / "source" / "calibration.jsonl"), param="")
    opened: Any = AutoModelForCausalLM.from_pretrained(reader, dtype=torch.float32)
    norms: dict[str, Tensor] = {}

    def read(name: str, inputs: Tensor) -> None:
        norms[name] = inputs.flatten(0, 1).norm(dim=0)

    for name, module in opened.model.named_modules(prefix="model"):
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, arguments, name=name: read(name, arguments[0]))
    opened(input_ids=calibration_samples(ids, 16, 64, seed=0))
    weights = load_file(model / "model.safetensors")
    for name, norm in norms.items():
        yield name, weights[f"{name}.weight"].float().abs() * norm


def zeros_of(attempt: Attempt) -> dict[str, Tensor]:
    tensors = load_file(attempt.artifact / "model.safetensors")
    return {
        name.removesuffix(".weight"): tensor == 0
        for name, tensor in tensors.items()
        if ".layers." in name and tensor.ndim == 2
    }


def part_different(found: Tensor, score: Tensor, group_size: int) -> float:
    """What part of the weights is zero without being in the lower half of its group, or the other way round."""
    groups = score.reshape(score.shape[0], -1, group_size)
    # Of an even number the median is the lower of the two in the middle.
    lower = (groups <= groups.median(dim=-1, keepdim=True).values).flatten(-2)
    return float((found != lower).float().mean())


# Norms of inputs whose products had factors of fewer bits have neighbours change places.
FEW = 0.001


def test_zeros_fall_where_the_originals_inputs_say(tiny_llama: Path, tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", tiny_llama, {"stages": [WANDA]})
    zeros = zeros_of(attempt)
    different = {name: part_different(zeros.pop(name), score, score.shape[1])
                 for name, score in scores(attempt, tiny_llama, tiny_llama)}  # fmt: skip
    assert not zeros
    assert max(different.values()) <= FEW, different


def test_those_of_a_pattern_fall_where_the_pruned_layers_inputs_say(tiny_llama: Path, tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", tiny_llama, {"stages": [{"technique": "wanda", "mask_structure": "2:4"}]})
    zeros = zeros_of(attempt)
    # What a layer read when its zeros were chosen is what it reads in the artifact.
    different = {name: part_different(zeros.pop(name), score, 4)
                 for name, score in scores(attempt, tiny_llama, attempt.artifact)}  # fmt: skip
    assert not zeros
    assert max(different.values()) <= FEW, different


def test_a_stage_that_follows_does_not_move_them(tiny_llama: Path, tmp_path: Path) -> None:
    rounding = {"technique": "round_to_nearest", "scheme": "W8A16", "group_size": 32}
    alone = zeros_of(compressed(tmp_path / "alone", tiny_llama, {"stages": [WANDA]}))
    both = {"stages": [WANDA, rounding], "output": {"format": "safetensors"}}
    rounded = zeros_of(compressed(tmp_path / "both", tiny_llama, both))
    for name, zeros in alone.items():
        assert bool(rounded[name][zeros].all()), name
