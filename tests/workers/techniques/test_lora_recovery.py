"""LoRA repair: adapters alone learn, what is stored is what was computed with, zeros stay, and a killed job goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models import write_tiny_model
from tests.workers.attempts import Attempt, certified, compressed, fetched
from tests.workers.training.recipes import digests, recipe_of, stopped_after
from workers.architectures import architecture_of
from workers.engine.checkpoint import Checkpoint
from workers.errors import UserError
from workers.pipeline import compress
from workers.techniques import LoraRecovery
from workers.training.adapters import Adapted, adapt
from workers.training.lesson import Source
from workers.training.model import Whole

PRUNE = {"technique": "magnitude", "sparsity": 0.7}
REPAIR = {
    "technique": "lora_recovery", "rank": 48, "num_steps": 60, "batch_size": 8, "max_seq_length": 64, "alpha": 0.0,
    "num_evaluations": 2, "precision": "float32", "learning_rate": 3e-3, "ignore": ["*.o_proj"],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "deep"
    write_tiny_model(folder, "llama", num_key_value_heads=2, intermediate_size=128, scale=4.0)
    return folder


@pytest.fixture(scope="module")
def pruned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    return certified(tmp_path_factory.mktemp("pruned") / "work", model, recipe_of(PRUNE))


@pytest.fixture(scope="module")
def repaired(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    return certified(tmp_path_factory.mktemp("repaired") / "work", model, recipe_of(PRUNE, REPAIR))


def opened(folder: Path) -> Whole:
    checkpoint = Checkpoint(folder)
    return Source(checkpoint, architecture_of(checkpoint.config)).open(trains=True)


def values_of(student: Whole) -> dict[str, torch.Tensor]:
    return {name: each.detach() for name, each in student.parameters().items()}


def trained_by_chance(student: Whole, adapted: Adapted) -> None:
    """Give adapters what they have once they have learned."""
    for each in adapted.layers.values():
        torch.nn.init.normal_(each.adapter.up, std=0.1)


def test_it_wins_back_what_pruning_lost(pruned: Attempt, repaired: Attempt) -> None:
    before, after = (attempt.report["quality"] for attempt in (pruned, repaired))
    error = before["kl_divergence_standard_error"] + after["kl_divergence_standard_error"]
    assert after["kl_divergence"] < before["kl_divergence"] - 4 * error
    metrics = repaired.report["stages"][1]["metrics"]
    assert metrics["held_out_loss"] < 0.8 * metrics["original_held_out_loss"]


def test_zeros_stay_and_what_has_no_adapter_is_as_it_was(pruned: Attempt, repaired: Attempt) -> None:
    before, after = (load_file(attempt.artifact / "model.safetensors") for attempt in (pruned, repaired))
    assert {name: (each.dtype, each.shape) for name, each in after.items()} == {
        name: (each.dtype, each.shape) for name, each in before.items()
    }
    for name, weight in before.items():
        if not name.endswith("_proj.weight") or "o_proj" in name:
            assert torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name] == 0, weight == 0)
            assert float((after[name] != weight)[weight != 0].float().mean()) > 0.5
    assert repaired.report["stages"][0]["metrics"]["sparsity"] == pytest.approx(0.7, abs=1e-3)


def test_the_report_says_what_was_trained_and_where_the_rank_is_less(repaired: Attempt) -> None:
    stage = repaired.report["stages"][1]
    # Of 7 layers in 2 blocks all but o_proj; k_proj and v_proj have 32 rows.
    assert (stage["metrics"]["num_layers"], stage["metrics"]["num_fallbacks"]) == (12, 4)
    sizes = {(64, 64): 1, (32, 64): 2, (128, 64): 2, (64, 128): 1}
    assert stage["metrics"]["num_trained_parameters"] == 2 * sum(
        number * min(48, rows, columns) * (rows + columns) for (rows, columns), number in sizes.items()
    )
    assert {each["layer"].rpartition(".")[2] for each in stage["fallbacks"]} == {"k_proj", "v_proj"}
    assert all("rank 32" in each["message"] for each in stage["fallbacks"])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("keeps_zeros", [False, True], ids=["dense", "pruned"])
def test_merged_it_computes_what_it_computed_in_training(model_type: str, keeps_zeros: bool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {} if model_type == "gpt2" else {"intermediate_size": 128}
    task: Any = "classification" if model_type == "bert" else "causal"
    write_tiny_model(tmp_path / "model", model_type, task=task, scale=4.0, **sizes)
    student, ids = opened(tmp_path / "model"), torch.arange(24).view(2, 12)
    layers = student.skeleton.block_layers
    with torch.no_grad():
        for name in layers:
            weight: Any = student.skeleton.module(name).weight
            weight[weight.abs() < weight.abs().median()] = 0
    names, zeros = set(student.parameters()), {name: values_of(student)[f"{name}.weight"] == 0 for name in layers}
    adapted = adapt(student, LoraRecovery(rank=8), 0, "recipe.stages[0]", keeps_zeros=keeps_zeros)
    student.model.eval()
    before = student.hidden(ids)
    trained_by_chance(student, adapted)
    computed = student.hidden(ids)
    assert float((computed - before).detach().abs().max()) > 0.1
    trainable = {name for name, each in student.parameters().items() if each.requires_grad}
    assert trainable == {name for each in adapted.layers.values() for name in (each.down, each.up)}
    merged = adapted.merged(values_of(student))
    assert set(merged) == names
    assert all(bool((merged[f"{name}.weight"][zeros[name]] == 0).all()) == keeps_zeros for name in layers)
    plain = opened(tmp_path / "model")
    plain.model.eval()
    plain.model.load_state_dict(merged, strict=False)
    torch.testing.assert_close(plain.hidden(ids), computed)


def test_gradients_are_those_of_the_product(model: Path) -> None:
    student, ids = opened(model), torch.arange(24).view(2, 12)
    adapted = adapt(student, LoraRecovery(rank=4, lora_alpha=2.0), 0, "recipe.stages[0]", keeps_zeros=False)
    trained_by_chance(student, adapted)
    student.hidden(ids).square().sum().backward()  # type: ignore[no-untyped-call]
    whole = opened(model)
    whole.model.load_state_dict(adapted.merged(values_of(student)), strict=False)
    whole.hidden(ids).square().sum().backward()  # type: ignore[no-untyped-call]
    for name, each in adapted.layers.items():
        of_weight = whole.parameters()[f"{name}.weight"].grad
        assert of_weight is not None
        torch.testing.assert_close(each.adapter.up.grad, 0.5 * of_weight @ each.adapter.down.T, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(each.adapter.down.grad, 0.5 * each.adapter.up.T @ of_weight, rtol=1e-3, atol=1e-3)


def test_layers_that_share_a_weight_share_its_adapter(model: Path) -> None:
    student = opened(model)
    first, second = (student.model.get_submodule(f"model.layers.{block}.mlp.up_proj") for block in (0, 1))
    second.weight = first.weight
    adapted = adapt(student, LoraRecovery(ignore=["*_attn.*", "*.down_proj"]), 0, "x", keeps_zeros=False)
    trained_by_chance(student, adapted)
    assert torch.equal(first.weight, second.weight)
    assert "model.layers.1.mlp.up_proj" not in adapted.layers
    merged = adapted.merged(values_of(student))
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], first.weight)
    assert "model.layers.1.mlp.up_proj.weight" not in merged


def test_killed_within_rounds_it_ends_with_the_same_bytes_from_small_states(model: Path, tmp_path: Path) -> None:
    short = {**REPAIR, "num_steps": 5, "rank": 2, "hidden_weight": 1.0, "patience": 4}
    recipe = recipe_of({"technique": "iterate", "rounds": 2, "stages": [PRUNE, short]})
    expected = digests(compressed(tmp_path / "undisturbed", model, recipe))
    attempt = fetched(tmp_path / "work", model, recipe)
    for number, last in ((0, 2), (1, 3)):
        stopped_after(attempt, last, f"round-{number:02d}")
    [state] = (attempt.work / "journal").rglob("step-*.safetensors")
    kept = load_file(state)
    assert {name.rpartition(".")[2] for name in kept if "projections" not in name} == {"down", "up"}
    assert max(each.numel() for name, each in kept.items() if "projections" not in name) == 2 * 128
    compress(attempt.work, attempt.request, attempt.events.append)
    assert digests(attempt) == expected


def test_convolutions_and_classifiers_are_repaired_before_they_are_rounded(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "gpt2", "gpt2", scale=4.0)
    rounded = {"technique": "round_to_nearest", "group_size": 32}
    recipe = recipe_of(PRUNE, {**REPAIR, "num_steps": 20}, rounded, output={"format": "safetensors"})
    attempt = certified(tmp_path / "one", tmp_path / "gpt2", recipe)
    write_tiny_model(tmp_path / "bert", "bert", task="classification", intermediate_size=128, scale=8.0)
    cut = {"technique": "depth_pruning", "num_blocks": 1, "keep_last": 0}
    other = certified(tmp_path / "other", tmp_path / "bert", recipe_of(cut, {**REPAIR, "num_steps": 20}))
    for each in (attempt, other):
        metrics = each.report["stages"][1]["metrics"]
        assert metrics["held_out_loss"] < metrics["original_held_out_loss"]


def test_what_moves_no_stored_weight_is_no_success(model: Path, tmp_path: Path) -> None:
    stage = {**REPAIR, "learning_rate": 1e-12, "num_steps": 2}
    with pytest.raises(UserError) as raised:
        compressed(tmp_path / "work", model, recipe_of(stage))
    assert (raised.value.code, raised.value.param) == ("nothing_changed", "recipe.stages[0].learning_rate")


def test_what_makes_no_sense_is_refused(model: Path, tmp_path: Path) -> None:
    for changes in ({"rank": 0}, {"lora_alpha": 0.0}, {"initialization": "random"}, {"initialization": "gptq"}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            LoraRecovery.model_validate({**REPAIR, **changes})
    with pytest.raises(UserError) as raised:
        compressed(tmp_path / "work", model, recipe_of(PRUNE, {**REPAIR, "ignore": ["model.*"]}))
    assert (raised.value.code, raised.value.param) == ("nothing_changed", "recipe.stages[1].ignore")
