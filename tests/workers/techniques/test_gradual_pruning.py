"""Gradual pruning: masks grow on schedule to exactly their sparsity, zeros stay, and a killed job goes on."""

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
from workers.recipe import Recipe
from workers.techniques import GradualPruning
from workers.training.lesson import Source
from workers.training.masks import Masks

GROW = {
    "technique": "gradual_pruning", "sparsity": 0.6, "num_steps": 40, "batch_size": 4, "max_seq_length": 32,
    "num_evaluations": 8, "num_updates": 5, "precision": "float32", "learning_rate": 1e-3, "alpha": 0.0,
    "ignore": ["*.1.*.o_proj"],
}  # fmt: skip
VALUES = {"format": "safetensors"}  # codes of convolutions have no packing
DISTIL = {
    **{name: GROW[name] for name in ("batch_size", "max_seq_length", "precision", "alpha")},
    "technique": "logit_distillation", "num_steps": 10, "num_evaluations": 1, "learning_rate": 3e-4,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "deep"
    write_tiny_model(folder, "llama", num_key_value_heads=2, intermediate_size=128, scale=4.0)
    return folder


@pytest.fixture(scope="module")
def pruned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """As a later stage trains on, and the artifact stores no zeros."""
    recipe = recipe_of(GROW, DISTIL, output={"format": "sparse-bitmask"})
    return certified(tmp_path_factory.mktemp("pruned") / "work", model, recipe)


def test_the_mask_grows_as_the_paper_says() -> None:
    stage = GradualPruning(sparsity=0.8, begin_fraction=0.1, end_fraction=0.6, num_updates=10)
    updates = stage.updates(200)
    assert list(updates) == list(range(30, 121, 10))
    for step, part in updates.items():  # equation 1, s_i = 0, s_f = 1, t_0 = 20, n Δt = 100
        assert part == pytest.approx(1 + (0 - 1) * (1 - (step - 20) / 100) ** 3)
    assert updates[120] == 1
    assert GradualPruning(sparsity=0.5).updates(1) == {0: 1.0}
    few = GradualPruning(sparsity=0.5, num_updates=100, end_fraction=0.99).updates(7)
    assert (max(few), few[max(few)]) == (6, 1.0)


def test_it_ends_with_exactly_its_zeros_and_they_stay(pruned: Attempt, tmp_path: Path) -> None:
    grown, distilled = pruned.report["stages"]
    checkpoint = next((pruned.work / "journal").glob("stage-01/checkpoint"))
    weights = load_file(checkpoint / "model.safetensors")
    layers = [name for name in weights if name.startswith("model.layers") and weights[name].dim() == 2]
    zeros = {name.removesuffix(".weight"): int((weights[name] == 0).sum()) for name in layers}
    spared = zeros.pop("model.layers.1.self_attn.o_proj")
    assert spared == 0
    for name, count in zeros.items():
        assert count == round(0.6 * weights[f"{name}.weight"].numel())
        assert not bool(torch.signbit(weights[f"{name}.weight"][weights[f"{name}.weight"] == 0]).any())
        assert grown["layers"][name] == {"num_pruned": count, "sparsity": 0.6}
    assert set(grown["layers"]) == set(zeros)
    assert grown["metrics"]["num_zeros"] == sum(zeros.values())  # counted in the reopened artifact
    assert grown["metrics"]["num_layers"] == 13
    assert pruned.report["size"]["artifact_bytes"] < 0.95 * pruned.report["size"]["dense_bytes"]
    # The next stage learns from the original too, and begins where this one ended.
    assert distilled["metrics"]["original_held_out_loss"] == pytest.approx(grown["metrics"]["held_out_loss"], rel=0.05)
    assert distilled["metrics"]["held_out_loss"] < distilled["metrics"]["original_held_out_loss"]


def test_the_curve_has_the_sparsity_of_each_point(pruned: Attempt) -> None:
    curve = pruned.report["stages"][0]["metrics"]["curve"]
    updates = GradualPruning.model_validate(GROW).updates(40)  # each is made before the next step
    for point in curve:
        part = max((part for step, part in updates.items() if step < point["step"]), default=0.0)
        assert point["sparsity"] == pytest.approx(0.6 * part, abs=1e-3)
    assert len({point["sparsity"] for point in curve}) > 4


def test_it_loses_less_than_pruning_at_once_without_training(pruned: Attempt, model: Path, tmp_path: Path) -> None:
    at_once = {"technique": "magnitude", "sparsity": 0.6, "ignore": GROW["ignore"]}
    before = certified(tmp_path / "work", model, recipe_of(at_once)).report["quality"]
    after = pruned.report["quality"]
    error = before["kl_divergence_standard_error"] + after["kl_divergence_standard_error"]
    assert after["kl_divergence"] < before["kl_divergence"] - 4 * error


def test_patterns_lie_along_input_columns_and_outlast_codes(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "gpt2", "gpt2", scale=4.0, n_inner=126)
    grow = {key: value for key, value in GROW.items() if key not in ("sparsity", "ignore")}
    stage = {**grow, "mask_structure": "2:4", "num_steps": 8}
    rounded = {"technique": "round_to_nearest", "group_size": 32, "symmetric": True}
    report = certified(tmp_path / "work", tmp_path / "gpt2", recipe_of(stage, rounded, output=VALUES)).report
    [grown, _] = report["stages"]
    weights = load_file(tmp_path / "work" / "artifact" / "model.safetensors")
    for name, layer in grown["layers"].items():
        weight = weights[f"{name}.weight"].T  # of a Conv1D
        whole = weight.shape[1] - weight.shape[1] % 4
        assert bool(((weight[:, :whole] != 0).reshape(weight.shape[0], -1, 4).sum(dim=-1) <= 2).all())
        assert layer["num_pruned"] == weight.shape[0] * whole // 2
    assert [each["layer"] for each in grown["fallbacks"]] == [f"transformer.h.{block}.mlp.c_proj" for block in (0, 1)]


def test_killed_between_updates_it_ends_with_the_same_bytes(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of({**GROW, "num_steps": 9, "num_updates": 3})
    expected = digests(compressed(tmp_path / "undisturbed", model, recipe))
    attempt = fetched(tmp_path / "work", model, recipe)
    assert list(GradualPruning.model_validate({**GROW, "num_updates": 3}).updates(9)) == [2, 4, 6]
    for last in (2, 3, 7):  # before an update, after one, after the last
        stopped_after(attempt, last)
    compress(attempt.work, attempt.request, attempt.events.append)
    assert digests(attempt) == expected


def test_what_was_pruned_before_stays_and_no_more_is_a_failure(model: Path, tmp_path: Path) -> None:
    before = {"technique": "magnitude", "mask_structure": "1:4"}
    more = compressed(tmp_path / "more", model, recipe_of(before, {**GROW, "sparsity": 0.9, "num_steps": 4}))
    alone = compressed(tmp_path / "alone", model, recipe_of(before))
    grow = {key: value for key, value in GROW.items() if key != "sparsity"}
    with pytest.raises(UserError) as raised:
        compressed(tmp_path / "same", alone.artifact, recipe_of({**grow, "mask_structure": "2:4", "num_steps": 4}))
    assert (raised.value.code, raised.value.param) == ("nothing_changed", "recipe.stages[0]")
    pruned, kept = (load_file(each.artifact / "model.safetensors") for each in (more, alone))
    for name, weight in kept.items():
        if name.startswith("model.layers") and weight.dim() == 2:
            assert bool((pruned[name][weight == 0] == 0).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patience": 2}, "not yet whole"),
        ({"begin_fraction": 0.7}, "less than end_fraction"),
        ({"end_fraction": 1.0}, "less than 1"),
        ({"num_updates": 0}, "greater than or equal to 1"),
        ({"mask_structure": "2:4"}, "must be 0.5"),
        ({"initialization": "gptq"}, "model or random"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualPruning.model_validate({**GROW, **changes})


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([GROW, {"technique": "depth_pruning", "num_blocks": 1}], "move it before"),
        ([{"technique": "magnitude", "sparsity": 0.6}, GROW], "ask for more than that"),
        ([{"technique": "iterate", "stages": [GROW, DISTIL]}], "does not match any of the expected tags"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(recipe_of(*stages))


def test_a_mask_goes_on_as_it_was_kept_whatever_values_weights_have(model: Path) -> None:
    stage = GradualPruning.model_validate(GROW)
    name = "model.layers.0.mlp.up_proj.weight"

    def begin() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer, Masks]:
        checkpoint = Checkpoint(model)
        student = Source(checkpoint, architecture_of(checkpoint.config)).open(trains=True)
        parameters = student.parameters()
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.1)
        return parameters, optimizer, Masks(student, parameters, stage, 40, keeps_zeros=False)

    def step(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, masks: Masks) -> None:
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        masks.hold()
        optimizer.step()

    parameters, optimizer, masks = begin()
    step(parameters, optimizer, masks)  # all weights have moments
    masks.grow(6, optimizer)
    step(parameters, optimizer, masks)
    pruned = parameters[name] == 0
    assert int(pruned.sum()) == round(stage.updates(40)[6] * 0.6 * pruned.numel())
    unpruned = tuple((~pruned).nonzero()[0].tolist())
    others, other_optimizer, other = begin()
    other.restore(masks.state())
    with torch.no_grad():
        for key, parameter in others.items():
            parameter.copy_(parameters[key])
        others[name][unpruned] = 0
    step(others, other_optimizer, other)
    assert float(others[name][unpruned].detach()) != 0
    assert bool((others[name][pruned] == 0).all())
    other.grow(28, other_optimizer)
    assert other.sparsity == pytest.approx(0.6, abs=1e-3)
    assert bool((others[name][pruned] == 0).all())
