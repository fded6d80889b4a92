"""Layers with sparsities of their own: proven layer by layer, the same however often the job is interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models import write_tiny_model
from tests.workers.attempts import certified, compressed
from workers.certify import certify
from workers.errors import CrashError

GPTQ = {"technique": "gptq", "scheme": "W4A16", "group_size": 32}
STAGES: list[dict[str, Any]] = [
    {"technique": technique, "sparsity": 0.5, "allocation": "error"}
    for technique in ("magnitude", "wanda", "sparsegpt")
]


def zeros_of(folder: Path, name: str) -> int:
    return int((load_file(folder / "model.safetensors")[f"{name}.weight"] == 0).sum())


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: str(stage["technique"]))
def test_each_layer_has_its_own_zeros_and_all_together_what_was_asked_for(
    stage: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    attempt = certified(tmp_path / "work", tiny_llama, {"stages": [{**stage, "ignore": ["*.0.self_attn.q_proj"]}]})
    report = attempt.report["stages"][0]
    tensors = load_file(attempt.artifact / "model.safetensors")
    sizes = {name: tensors[f"{name}.weight"].numel() for name in report["layers"]}
    assert len(sizes) == 13
    sparsities = {name: layer["sparsity"] for name, layer in report["layers"].items()}
    assert all(0.399 < sparsity < 0.601 for sparsity in sparsities.values())
    assert max(sparsities.values()) - min(sparsities.values()) > 0.02
    for name, sparsity in sparsities.items():
        assert zeros_of(attempt.artifact, name) == round(sparsity * sizes[name])
    for block in (".0.", ".1."):
        names = [name for name in sizes if block in name]
        zeros = sum(zeros_of(attempt.artifact, name) for name in names)
        assert zeros == round(0.5 * sum(sizes[name] for name in names))
    assert report["metrics"]["num_zeros"] == round(0.5 * sum(sizes.values()))


def test_zeros_survive_quantization_and_archives_alike(tiny_llama: Path, tmp_path: Path) -> None:
    pruned = compressed(tmp_path / "pruned", tiny_llama, {"stages": [STAGES[2]]})
    both = certified(tmp_path / "both", tiny_llama, {"stages": [STAGES[2], GPTQ], "output": {"format": "safetensors"}})
    archived = certified(
        tmp_path / "archived", tiny_llama, {"stages": [STAGES[2]], "output": {"format": "sparse-bitmask"}}
    )
    first = load_file(pruned.artifact / "model.safetensors")
    after = load_file(both.artifact / "model.safetensors")
    layers = both.report["stages"][0]["layers"]
    # The first block reads the same with and without the stage that follows; what later ones read is rounded.
    for name in (name for name in layers if ".0.self_attn.q" in name):
        assert bool((after[f"{name}.weight"][first[f"{name}.weight"] == 0] == 0).all())
    assert (
        archived.report["stages"][0]["layers"]
        == json.loads((pruned.work / "compressed.json").read_text())["stages"][0]["layers"]
    )


def test_a_transposed_model_is_allocated_too(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "gpt2")
    attempt = certified(tmp_path / "work", tmp_path / "model", {"stages": [STAGES[1]]})
    assert attempt.report["stages"][0]["metrics"]["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_a_layer_below_its_own_sparsity_is_not_certified(tiny_llama: Path, tmp_path: Path) -> None:
    """Also where another has as many more, so that the sum is right."""
    attempt = compressed(tmp_path / "work", tiny_llama, {"stages": [STAGES[0]]})
    path = attempt.work / "compressed.json"
    kept = json.loads(path.read_text())
    layers = kept["stages"][0]["layers"]
    name = "model.layers.0.self_attn.q_proj"
    layers[name]["sparsity"] += 0.01
    path.write_text(json.dumps(kept))
    with pytest.raises(CrashError) as caught:
        certify(attempt.work, attempt.request, attempt.events.append)
    assert caught.value.code == "zeros_missing"
    layers[name]["sparsity"] -= 0.02
    for layer in layers.values():
        layer["sparsity"] = min(layer["sparsity"], 0.3)
    path.write_text(json.dumps(kept))
    certify(attempt.work, attempt.request, attempt.events.append)


def test_calibration_text_is_read_by_a_technique_that_otherwise_needs_none(tiny_llama: Path, tmp_path: Path) -> None:
    attempt = compressed(tmp_path / "work", tiny_llama, {"stages": [STAGES[0]]})
    assert (attempt.work / "source" / "calibration.jsonl").exists()
    steps = [event["step"] for event in attempt.events if event["event"] == "progress"]
    assert "plan.model.layers.1" in steps
    assert torch.tensor([event.get("fraction", 0.0) for event in attempt.events]).max() <= 1
