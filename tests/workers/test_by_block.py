"""A job whose models do not fit into memory is proven and measured as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import write_tiny_model
from tests.workers.attempts import Attempt, compressed
from tests.workers.test_architectures import VARIANTS
from workers import certify as certification
from workers.certify import certify
from workers.errors import CrashError
from workers.evaluation.ways import Ways

NO_MEMORY = 1  # byte: nothing fits
INT8 = {"technique": "round_to_nearest", "scheme": "W8A16", "group_size": None}
HALF: dict[str, Any] = {"technique": "magnitude", "sparsity": 0.5}
RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"stages": [INT8]},
    "w8a8": {"stages": [{"technique": "smoothquant"}]},
    "plain-w3": {"stages": [{"technique": "round_to_nearest", "scheme": "W3A16", "group_size": 32}]},
    "nf4": {"stages": [{"technique": "round_to_nearest", "scheme": "NF4"}]},
    "archive": {"stages": [HALF], "output": {"format": "sparse-bitmask"}},
    "cast": {"stages": [HALF, {"technique": "round_to_nearest", "scheme": "FP16"}]},
}
BY_BLOCK = {"original": "by_block", "artifact": "by_block"}


def model(folder: Path, variant: str = "llama") -> Path:
    model_type, task, config = VARIANTS[variant]
    write_tiny_model(folder, model_type, task=task, **config)
    return folder


def measured(attempt: Attempt) -> dict[str, Any]:
    """What of a report must not depend on how models were opened."""
    return {key: attempt.report[key] for key in ("quality", "size", "stages", "constraints", "task")}


def assert_close(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    else:
        assert other == (pytest.approx(one, rel=1e-5, abs=1e-7) if isinstance(one, float) else one)


def refusal(attempt: Attempt) -> CrashError:
    with pytest.raises(CrashError) as caught:
        certify(attempt.work, attempt.request, attempt.events.append, NO_MEMORY)
    assert not (attempt.work / "expanded").exists()
    return caught.value


def change_weights(attempt: Attempt, change: Any, name: str = "model.safetensors") -> None:
    """Store ``change`` of the artifact's tensors in their place."""
    save_file(change(load_file(attempt.artifact / name)), attempt.artifact / name, {"format": "pt"})


@pytest.mark.parametrize(
    ("variant", "recipe"),
    [
        *[pytest.param("llama", recipe, id=name) for name, recipe in RECIPES.items()],
        pytest.param("gpt2", {"stages": [HALF]}, id="gpt2"),
        pytest.param("bert-masked", {"stages": [INT8]}, id="masked"),
        pytest.param("bert-classes", {"stages": [INT8]}, id="classes"),
    ],
)
def test_what_is_measured_by_block_is_what_is_measured_whole(
    variant: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    attempt = compressed(tmp_path / "work", model(tmp_path / "model", variant), recipe)
    certify(attempt.work, attempt.request, attempt.events.append)
    whole, opened = measured(attempt), attempt.report["opened"]
    assert (opened, attempt.report["speed"]["original"]["load_seconds"] > 0) == (dict.fromkeys(opened, "whole"), True)
    assert "certified_by_block" not in [event.get("code") for event in attempt.events]
    files = {path.name for path in attempt.artifact.iterdir()}
    certify(attempt.work, attempt.request, attempt.events.append, NO_MEMORY)
    assert attempt.report["opened"] == BY_BLOCK
    assert_close(whole, measured(attempt))
    assert {value for side in attempt.report["speed"].values() for value in side.values()} == {None}
    assert attempt.report["generation"] is None
    (warning,) = (event for event in attempt.events if event.get("code") == "certified_by_block")
    assert "Original and artifact were read block by block" in warning["message"]
    assert "their speed is not measured" in (attempt.artifact / "README.md").read_text()
    assert {path.name for path in attempt.artifact.iterdir()} == files
    assert not (attempt.work / "expanded").exists()


def test_an_artifact_that_fits_alone_is_opened_whole_and_its_speed_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = compressed(tmp_path / "work", model(tmp_path / "model"), {"stages": [INT8]})
    certify(attempt.work, attempt.request, attempt.events.append)
    whole = measured(attempt)
    # Tiny models differ by less than a process's own memory does from run to run.
    monkeypatch.setattr(certification, "choose_ways", lambda *_: Ways("by_block", "whole", 4096, 2048, 1 << 20))
    certify(attempt.work, attempt.request, attempt.events.append)
    report = attempt.report
    assert report["opened"] == {"original": "by_block", "artifact": "whole"}
    assert_close(whole, measured(attempt))
    assert set(report["speed"]["original"].values()) == {None}
    assert all(value > 0 for value in report["speed"]["artifact"].values())
    assert (report["generation"]["original"], type(report["generation"]["artifact"])) == (None, str)
    card = (attempt.artifact / "README.md").read_text()
    assert "| tokens a second | not measured | " in card
    assert "That of the original is not measured" in card


def test_another_artifact_is_refused(tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", model(tmp_path / "model"), {"stages": [INT8]})
    change_weights(attempt, lambda tensors: {**tensors, "model.norm.weight": 1.05 * tensors["model.norm.weight"]})
    assert refusal(attempt).code == "artifact_mismatch"


def test_an_artifact_of_nan_is_refused(tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", model(tmp_path / "model"), {"stages": [INT8]})
    norm = torch.full((64,), torch.nan, dtype=torch.bfloat16)
    change_weights(attempt, lambda tensors: {**tensors, "model.norm.weight": norm})
    assert refusal(attempt).code == "artifact_mismatch"


@pytest.mark.parametrize("recipe", [RECIPES["int8"], RECIPES["nf4"], RECIPES["cast"]], ids=["int8", "nf4", "cast"])
def test_missing_and_unknown_tensors_are_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", model(tmp_path / "model"), recipe)
    kept = load_file(attempt.artifact / "model.safetensors")
    change_weights(attempt, lambda tensors: {name: tensors[name] for name in tensors if "layers.1.input" not in name})
    assert refusal(attempt).code == "artifact_incomplete"
    change_weights(attempt, lambda _: {**kept, "model.layers.9.mlp.up_proj.bias": torch.zeros(4)})
    assert refusal(attempt).code == "artifact_incomplete"
    one = next(name for name in sorted(kept) if ".q_proj." in name)
    change_weights(attempt, lambda _: {name: tensor for name, tensor in kept.items() if name != one})
    assert refusal(attempt).code in ("artifact_incomplete", "artifact_mismatch")
    change_weights(attempt, lambda _: kept)
    certify(attempt.work, attempt.request, attempt.events.append, NO_MEMORY)


def test_a_config_that_calls_plain_layers_codes_is_refused(tmp_path: Path) -> None:
    recipe = {"stages": [{"technique": "round_to_nearest", "scheme": "NF4", "ignore": ["*.0.*"]}]}
    attempt = compressed(tmp_path / "work", model(tmp_path / "model"), recipe)
    path = attempt.artifact / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = []
    path.write_text(json.dumps(config))
    assert refusal(attempt).code == "artifact_incomplete"


def test_an_archive_that_is_damaged_or_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", model(tmp_path / "model"), RECIPES["archive"])
    path = attempt.artifact / "sparse.safetensors"
    stored = path.read_bytes()
    path.write_bytes(stored[:-16])
    assert refusal(attempt).code == "artifact_incomplete"
    path.write_bytes(stored)
    change_weights(attempt, lambda tensors: {name: tensors[name] for name in tensors if "norm" not in name}, path.name)
    assert refusal(attempt).code == "artifact_incomplete"


def test_fewer_zeros_than_promised_are_refused(tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", model(tmp_path / "model"), {"stages": [HALF]})
    name = "model.layers.0.mlp.up_proj.weight"
    path = attempt.artifact / "model.safetensors"
    tensors = load_file(path)
    # So small that no logit changes beyond rounding.
    tensors[name] = torch.where(tensors[name] == 0, torch.full_like(tensors[name], 1e-12), tensors[name])
    save_file(tensors, path, {"format": "pt"})
    assert refusal(attempt).code == "zeros_missing"


def test_more_values_than_codes_are_refused(tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", model(tmp_path / "model"), RECIPES["plain-w3"])
    name = "model.layers.1.self_attn.o_proj.weight"

    def spread(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        noise = 1 + torch.linspace(-1, 1, tensors[name].numel()).view_as(tensors[name]) / 128
        return {**tensors, name: (tensors[name].float() * noise).to(torch.bfloat16)}

    probe = load_file(attempt.work / "probe.safetensors")
    change_weights(attempt, spread)
    # Whoever can forge the weights may forge what they have to give: the grid is proven by itself.
    logits = _logits(attempt.artifact, probe["input_ids"])
    save_file({**probe, "logits": logits}, attempt.work / "probe.safetensors")
    assert refusal(attempt).code == "not_on_grid"


@pytest.mark.parametrize(
    ("settings", "is_kept"),
    [
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, True),
        ({"num_beams": 3, "repetition_penalty": 1.2}, True),
        ({"do_sample": True, "temperature": -3.0}, False),
    ],
)
def test_generation_settings_are_tried(settings: dict[str, Any], is_kept: bool, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(settings))
    attempt = compressed(tmp_path / "work", folder, {"stages": [INT8]})
    certify(attempt.work, attempt.request, attempt.events.append, NO_MEMORY)
    assert (attempt.artifact / "generation_config.json").exists() == is_kept
    assert ("generation_config_dropped" in [event.get("code") for event in attempt.events]) != is_kept


def test_progress_rises_block_by_block(tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", model(tmp_path / "model"), {"stages": [INT8]})
    attempt.events.clear()
    certify(attempt.work, attempt.request, attempt.events.append, NO_MEMORY)
    fractions = [event["fraction"] for event in attempt.events if event["event"] == "progress"]
    assert fractions == sorted(fractions)
    evaluating = [event for event in attempt.events if event.get("step") == "certify.evaluate"]
    num_windows = sum(attempt.report[part]["num_windows"] for part in ("quality", "quality_apart"))
    assert len(evaluating) == num_windows * (2 * 2 + 1)  # so little memory that each is read by itself


def _logits(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = plain(input_ids=input_ids).logits
    return logits.contiguous()
