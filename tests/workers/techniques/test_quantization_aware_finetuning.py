"""Weights that are trained as codes: what is stored is what was trained, and it is nearer than rounding afterwards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.models import write_tiny_model
from tests.workers.attempts import TEXTS, certified, compressed, fetched
from workers.pipeline import compress
from workers.solvers.quantization import Grid, quantize_to_nearest
from workers.techniques import QuantizationAwareFineTuning
from workers.training.rounding import Rounded

TRAINING = {"dataset": {"texts": TEXTS[:150]}}
QAT = {
    "technique": "quantization_aware_finetuning", "group_size": 32, "num_steps": 40, "batch_size": 8,
    "max_seq_length": 64, "num_evaluations": 3, "precision": "float32", "learning_rate": 3e-4, "alpha": 0.0,
}  # fmt: skip


class Stopped(BaseException):
    """The run ends here."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "deep"
    write_tiny_model(folder, "llama", num_key_value_heads=2, intermediate_size=128, scale=4.0)
    return folder


def recipe_of(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"stages": list(stages), "training": TRAINING}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 4])
def test_before_any_step_it_rounds_as_rounding_does(num_bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight, grid = torch.randn(8, 64), Grid(num_bits, 32, symmetric, torch.bfloat16)
    rounded = Rounded(weight, grid, is_transposed=False)
    expected = quantize_to_nearest(weight, grid, clip_search=True)
    torch.testing.assert_close(rounded(weight), expected.dequantize(), rtol=1e-2, atol=1e-3)
    parts = rounded.codes(weight, rounded.log_scale)
    assert float((parts["codes"] == expected.codes).float().mean()) > 0.98


def test_gradients_pass_but_for_what_is_cut_off_and_reach_the_scales() -> None:
    grid = Grid(2, 4, symmetric=True, scale_dtype=torch.float32)
    weight = torch.tensor([[0.1, -0.2, 0.3, 4.0]], requires_grad=True)
    rounded = Rounded(weight, grid, is_transposed=False)
    with torch.no_grad():
        rounded.log_scale.zero_()  # a scale of 1: codes from −2 to 1
        rounded.sign.fill_(1.0)
    values = rounded(weight)
    assert values.tolist() == [[0.0, 0.0, 0.0, 1.0]]
    values.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1.0, 1.0, 1.0, 0.0]]
    assert rounded.log_scale.grad is not None
    # (Esser et al. 2020), equation 3, summed: the code less the quotient inside, the code where it is cut off.
    assert float(rounded.log_scale.grad) == pytest.approx(-0.1 + 0.2 - 0.3 + 1.0)


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16", "W4A16"])
def test_it_is_nearer_to_the_original_than_rounding(scheme: str, model: Path, tmp_path: Path) -> None:
    qualities = {}
    for name, stage in {
        "trained": {**QAT, "scheme": scheme},
        "rounded": {"technique": "round_to_nearest", "scheme": scheme, "group_size": 32, "clip_search": True},
        "gptq": {"technique": "gptq", "scheme": scheme, "group_size": 32},
    }.items():
        report = certified(tmp_path / name, model, recipe_of(stage)).report
        qualities[name] = report["quality"]["kl_divergence"]
    assert qualities["trained"] < 0.8 * min(qualities["rounded"], qualities["gptq"])


def test_what_is_stored_is_what_was_trained(model: Path, tmp_path: Path) -> None:
    attempt = certified(tmp_path / "work", model, recipe_of(QAT))
    [stage] = attempt.report["stages"]
    metrics = stage["metrics"]
    assert metrics["held_out_loss"] < metrics["original_held_out_loss"]
    assert metrics["num_layers"] == 14
    trained = load_file(next((attempt.work / "journal").rglob("codes.safetensors.part")))
    names = {name.rpartition(".")[0] for name in trained}
    assert len(names) == 14
    assert all(int(trained[f"{name}.codes"].min()) >= -8 and int(trained[f"{name}.codes"].max()) <= 7 for name in names)
    config = json.loads((attempt.artifact / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "phi3"])
def test_other_architectures(model_type: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
        "phi3": {"intermediate_size": 128},
    }
    write_tiny_model(tmp_path / "model", model_type, scale=4.0, **sizes.get(model_type, {}))
    report = certified(tmp_path / "work", tmp_path / "model", recipe_of({**QAT, "scheme": "W2A16"})).report
    losses = report["stages"][0]["metrics"]
    assert losses["held_out_loss"] < losses["original_held_out_loss"]


def test_zeros_stay_zeros(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of({"technique": "magnitude", "sparsity": 0.5}, {**QAT, "scheme": "W3A16", "num_steps": 5})
    attempt = certified(tmp_path / "work", model, recipe)
    assert attempt.report["stages"][0]["metrics"]["sparsity"] >= 0.499


def test_it_may_begin_with_a_new_model(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of({**QAT, "initialization": "random", "num_steps": 60, "alpha": 1.0, "learning_rate": 5e-3})
    [stage] = certified(tmp_path / "work", model, recipe).report["stages"]
    assert stage["metrics"]["held_out_loss"] < 0.7 * stage["metrics"]["original_held_out_loss"]


def test_killed_it_ends_with_the_same_bytes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of({"technique": "depth_pruning", "num_blocks": 1, "keep_last": 0}, {**QAT, "num_steps": 6})
    expected = compressed(tmp_path / "undisturbed", model, recipe).artifact
    monkeypatch.setattr("workers.training.loop.SECONDS_A_STATE", 0.0)
    attempt = fetched(tmp_path / "work", model, recipe)
    for num_events in (5, 9):
        heard = 0

        def emit(_event: dict[str, Any], num_events: int = num_events) -> None:
            nonlocal heard
            heard += 1
            if heard == num_events:
                raise Stopped

        with pytest.raises(Stopped):
            compress(attempt.work, attempt.request, emit)
    compress(attempt.work, attempt.request, attempt.events.append)
    digests = [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (expected, attempt.artifact)
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"scheme": "W8A8"}, "scheme"),
        ({"scheme": "NF4", "group_size": 64}, "scheme"),
        ({"scheme": "FP8"}, "scheme"),
        ({"embeddings": True}, "embeddings"),
        ({"num_steps": 3, "num_epochs": 1.0}, "num_epochs"),
    ],
)
def test_what_it_cannot_train_is_refused(changes: dict[str, Any], option: str) -> None:
    stage = {**QAT, **changes}
    if stage.get("scheme") in ("W8A8", "FP8"):
        del stage["group_size"]
    with pytest.raises(ValueError, match=option):
        QuantizationAwareFineTuning.model_validate(stage)


def test_a_module_reads_rounded_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 8, bias=False)
    rounded = Rounded(layer.weight, Grid(2, 32, symmetric=True), is_transposed=False)
    assert len(rounded(layer.weight).view(8, 2, 32)[0, 0].unique()) <= 4
