"""Factors of low rank in place of weights: what they are, what opens them, and what can follow them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from tests.models import write_tiny_model
from tests.workers.attempts import TEXTS, Attempt, certified, compressed, fetched
from workers.architectures import ARCHITECTURES, Task
from workers.engine.by_block import ByBlock
from workers.errors import UserError
from workers.formats import load_compact
from workers.formats.opening import check_loads
from workers.pipeline import compress
from workers.recipe import Recipe
from workers.sources.inspection import inspect_model

HALF: dict[str, Any] = {"technique": "low_rank", "ratio": 0.5, "ignore": ["*.0.mlp.down_proj"]}
MODELS: dict[str, tuple[Task, dict[str, Any]]] = {
    "llama": ("causal", {"num_key_value_heads": 2, "intermediate_size": 128}),
    "gpt2": ("causal", {}),
    "bert": ("masked", {"intermediate_size": 128}),
}
SMALL = {
    "calibration": {"dataset": {"texts": TEXTS[:60]}, "num_samples": 8, "max_seq_length": 64},
    "evaluation": {"dataset": {"texts": TEXTS[150:]}, "num_tokens": 128, "max_seq_length": 64},
}


class Stopped(BaseException):
    """The run ends here."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("roots")
    for model_type, (task, config) in MODELS.items():
        write_tiny_model(folder / model_type, model_type, task=task, scale=4.0, **config)
    return {model_type: folder / model_type for model_type in MODELS}


@pytest.fixture(scope="module")
def attempts(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Attempt]:
    """A whole job for each: certification holds the logits of the reopened artifact against the engine's."""
    folder = tmp_path_factory.mktemp("works")
    return {name: certified(folder / name, model, {"stages": [HALF], **SMALL}) for name, model in models.items()}


def dense(weight: torch.Tensor, model_type: str) -> torch.Tensor:
    return weight.float().T if ARCHITECTURES[model_type, MODELS[model_type][0]].is_transposed else weight.float()


@pytest.mark.parametrize("model_type", MODELS)
def test_each_weight_is_two_factors_that_are_near_it(
    model_type: str, models: dict[str, Path], attempts: dict[str, Attempt]
) -> None:
    attempt = attempts[model_type]
    before = load_file(models[model_type] / "model.safetensors")
    after = load_file(attempt.artifact / load_compact.WEIGHTS)
    [stage] = attempt.report["stages"]
    ranks = json.loads((attempt.artifact / "config.json").read_text())["attar"]["low_rank"]
    assert ranks == {name: layer["rank"] for name, layer in stage["layers"].items()}
    row = ARCHITECTURES[model_type, MODELS[model_type][0]]
    layers = {f"{row.blocks}.{index}.{layer}" for index in range(2) for layer in row.linear_layers}
    assert set(ranks) == layers - {"model.layers.0.mlp.down_proj"}
    for layer, rank in ranks.items():
        weight = dense(before[f"{layer}.weight"], model_type)
        out_factor, in_factor = (after[f"{layer}.{name}.weight"] for name in ("out_factor", "in_factor"))
        assert f"{layer}.weight" not in after
        assert (out_factor.shape, in_factor.shape) == ((weight.shape[0], rank), (rank, weight.shape[1]))
        assert out_factor.dtype == torch.bfloat16
        assert 0 < stage["layers"][layer]["ratio"] <= 0.5
        assert 0 < stage["layers"][layer]["relative_error"] < 0.7
        if f"{layer}.bias" in before:
            assert torch.equal(after[f"{layer}.out_factor.bias"], before[f"{layer}.bias"])
    assert attempt.report["size"]["artifact_bytes"] < 0.8 * attempt.report["size"]["original_bytes"]
    assert attempt.report["size"]["artifact_parameters"] == sum(tensor.numel() for tensor in after.values())


def test_the_lines_in_the_readme_open_the_artifacts(attempts: dict[str, Attempt], tmp_path: Path) -> None:
    """In a fresh process that knows nothing of Attar, and cannot import it."""
    lines = ["import torch", "from safetensors.torch import load_file"]
    for attempt in attempts.values():
        snippet = attempt.report["load_snippet"]
        assert snippet in (attempt.artifact / "README.md").read_text()
        assert "load_compact.py" in snippet
        lines += [
            "sys.modules.pop('load_compact', None)" if "import sys" in lines else "import sys",
            snippet.replace("path/to/artifact", str(attempt.artifact)),
            f"probe = load_file({str(attempt.work / 'probe.safetensors')!r})",
            "with torch.inference_mode():",
            "    logits = model.float()(input_ids=probe['input_ids']).logits",
            "error, largest = (logits - probe['logits']).abs().max(), probe['logits'].abs().max()",
            "assert error <= 1e-3 * largest, (error, largest)",
            "assert 'workers' not in sys.modules",
        ]
    script = tmp_path / "opens.py"
    script.write_text("\n".join(lines))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model_type", MODELS)
def test_read_by_block_it_gives_the_same(model_type: str, attempts: dict[str, Attempt]) -> None:
    attempt = attempts[model_type]
    check_loads(attempt.artifact)
    probe = load_file(attempt.work / "probe.safetensors")
    (logits,) = ByBlock(attempt.artifact, torch.device("cpu"), 1 << 20).read([probe["input_ids"]], lambda _: None)(1)
    torch.testing.assert_close(logits, probe["logits"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stop_at", ["model.layers.0", "model.layers.1.mlp.gate_proj"])
def test_a_stopped_job_goes_on_and_gives_the_same_bytes(
    stop_at: str, models: dict[str, Path], attempts: dict[str, Attempt], tmp_path: Path
) -> None:
    attempt = fetched(tmp_path / "work", models["llama"], {"stages": [HALF], **SMALL})

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["step"] == stop_at:
            raise Stopped

    with pytest.raises(Stopped):
        compress(attempt.work, attempt.request, stop)
    compress(attempt.work, attempt.request, attempt.events.append)
    for name in (load_compact.WEIGHTS, "config.json", "recipe.json"):
        assert (attempt.artifact / name).read_bytes() == (attempts["llama"].artifact / name).read_bytes()


def test_training_and_codes_follow_on_the_factors(models: dict[str, Path], tmp_path: Path) -> None:
    stages = [
        {"technique": "low_rank", "energy": 0.9, "multiple_of": 16},
        {"technique": "logit_distillation", "num_steps": 2, "batch_size": 4, "max_seq_length": 32},
        {"technique": "gptq", "scheme": "W4A16", "group_size": 32},
    ]
    recipe = {"stages": stages, "training": {"dataset": {"texts": TEXTS[60:120]}}, **SMALL}
    attempt = certified(tmp_path / "work", models["llama"], recipe)
    names = load_file(attempt.artifact / load_compact.WEIGHTS).keys()
    assert {name for name in names if name.endswith("in_factor.weight_packed")}
    low_rank, training, gptq = attempt.report["stages"]
    assert training["metrics"]["num_steps"] == 2
    assert all(layer["rank"] % 16 == 0 for layer in low_rank["layers"].values() if layer["rank"])
    factored = {name for name, layer in low_rank["layers"].items() if layer["rank"]}
    assert {name for name in gptq["layers"] if name.endswith("factor")} == {
        f"{name}.{factor}" for name in factored for factor in ("in_factor", "out_factor")
    }


def test_factors_of_transposed_layers_are_trained_as_codes(models: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2's layers lie as in_features × out_features, and their factors do not."""
    training = {"num_steps": 2, "batch_size": 4, "max_seq_length": 32}
    qat = {"technique": "quantization_aware_finetuning", "scheme": "W3A16", "group_size": None, **training}
    recipe = {"stages": [HALF, qat], "training": {"dataset": {"texts": TEXTS[60:120]}}, **SMALL}
    attempt = certified(tmp_path / "work", models["gpt2"], recipe)
    _, stage = attempt.report["stages"]
    assert "transformer.h.1.mlp.c_proj.out_factor" in stage["layers"]


def test_a_later_job_starts_from_factors_and_rescales_what_they_pass_on(
    attempts: dict[str, Attempt], tmp_path: Path
) -> None:
    """The source is opened by our loader, not by what lies beside its weights."""
    awq = {"technique": "awq", "group_size": None}
    attempt = certified(tmp_path / "work", attempts["llama"].artifact, {"stages": [awq], **SMALL})
    assert "load_compact" in attempt.report["load_snippet"]
    [stage] = attempt.report["stages"]
    assert "model.layers.1.mlp.up_proj.out_factor" in stage["layers"]


def test_packed_factors_of_transposed_layers_open(attempts: dict[str, Attempt], tmp_path: Path) -> None:
    codes = {"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 4}
    attempt = certified(tmp_path / "work", attempts["gpt2"].artifact, {"stages": [codes], **SMALL})
    assert attempt.report["size"]["artifact_bytes"] < attempts["gpt2"].report["size"]["artifact_bytes"]
    artifact = attempts["gpt2"].artifact
    facts = inspect_model("file:artifact", model_roots=[artifact.parent])
    assert len(facts.linear_in_features) > 1


@pytest.mark.parametrize("later", [HALF, {"technique": "width_pruning", "keep_intermediate": 0.5}])
def test_a_source_of_factors_is_not_cut_or_factored_again(
    later: dict[str, Any], attempts: dict[str, Attempt], tmp_path: Path
) -> None:
    attempt = fetched(tmp_path / "work", attempts["llama"].artifact, {"stages": [later], **SMALL})
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (caught.value.code, caught.value.param) == ("stages_conflict", "recipe.stages[0].technique")


def test_a_rank_that_saves_nothing_leaves_layers_as_they_are(models: dict[str, Path], tmp_path: Path) -> None:
    """Of 64 × 64 a rank of 40 saves nothing, of 128 × 64 it does."""
    attempt = compressed(
        tmp_path / "work", models["llama"], {"stages": [{"technique": "low_rank", "rank": 40}], **SMALL}
    )
    [stage] = json.loads((attempt.work / "compressed.json").read_text())["stages"]
    kept = {name for name, layer in stage["layers"].items() if layer["rank"] is None}
    assert kept == {name for name in stage["layers"] if "self_attn" in name}
    assert {each["layer"] for each in stage["fallbacks"]} == kept
    attempt = fetched(tmp_path / "other", models["llama"], {"stages": [{"technique": "low_rank", "rank": 64}], **SMALL})
    with pytest.raises(UserError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append)
    assert (caught.value.code, caught.value.param) == ("nothing_changed", "recipe.stages[0].rank")


@pytest.mark.parametrize(
    ("stages", "output", "said"),
    [
        ([{"technique": "low_rank"}], {}, "one of rank, ratio and energy"),
        ([{"technique": "low_rank", "rank": 8, "energy": 0.9}], {}, "one of rank, ratio and energy"),
        ([{"technique": "low_rank", "ratio": 1.0}], {}, "less than 1"),
        ([{"technique": "low_rank", "rank": 8, "multiple_of": 4}], {}, "multiple_of must be left out"),
        ([{"technique": "wanda"}, HALF], {}, "move low_rank before"),
        ([HALF, HALF], {}, "keep one"),
        ([HALF, {"technique": "share_layers", "group_size": 2}], {}, "keep one"),
        ([{"technique": "share_layers", "group_size": 2}, HALF], {}, "keep one"),
        ([HALF, {"technique": "depth_pruning", "num_blocks": 1}], {}, "move it before stages[0]"),
        ([HALF, {"technique": "wanda"}], {"format": "sparse-bitmask"}, "none opens both"),
        ([HALF, {"technique": "gptq", "embeddings": True}], {}, "use null for one scale a channel"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(stages: list[dict[str, Any]], output: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"stages": stages, "output": output})
    assert said in str(caught.value)
