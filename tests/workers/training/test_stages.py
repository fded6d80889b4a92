"""Stages that train, in jobs: what they change and what they leave alone."""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models import write_tiny_model
from tests.workers.attempts import TEXTS, certified, compressed, fetched
from tests.workers.training.recipes import (
    CLASSIFYING,
    CUT,
    DISTIL,
    MAKE,
    TUNE,
    curve_of,
    recipe_of,
    write_body,
)
from workers.errors import UserError
from workers.pipeline import compress
from workers.training import loop


def test_fine_tuning_changes_every_weight_and_keeps_shape_and_type(model: Path, tmp_path: Path) -> None:
    attempt = certified(tmp_path / "work", model, recipe_of({**TUNE, "learning_rate": 3e-3, "num_steps": 30}))
    before, after = load_file(model / "model.safetensors"), load_file(attempt.artifact / "model.safetensors")
    assert before.keys() == after.keys()
    assert {name: (each.dtype, each.shape) for name, each in after.items()} == {
        name: (each.dtype, each.shape) for name, each in before.items()
    }
    assert all(not torch.equal(before[name], after[name]) for name in before)
    quality, [stage] = attempt.report["quality"], attempt.report["stages"]
    assert quality["perplexity"] < 0.9 * quality["original_perplexity"]
    assert stage["metrics"]["held_out_loss"] < stage["metrics"]["original_held_out_loss"]
    told = [event["metrics"] for event in attempt.events if event["event"] == "stage" and "step" in event["metrics"]]
    assert [point["step"] for point in told] == [0, 10, 20, 30]
    assert told[-1]["tokens_per_second"] > 0


def test_a_student_shares_nothing_with_its_teacher(model: Path, tmp_path: Path) -> None:
    before = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    attempt = certified(tmp_path / "work", model, recipe_of(CUT, {**DISTIL, "learning_rate": 3e-3}))
    assert hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest() == before
    losses = curve_of(attempt, 1)
    assert losses[-1] < losses[0]
    # What the teacher gives did not move with the student: it is the original as it was.
    assert attempt.report["quality"]["original_perplexity"] == pytest.approx(
        certified(tmp_path / "other", model, recipe_of(CUT)).report["quality"]["original_perplexity"]
    )


def test_accumulated_gradients_are_those_of_the_whole_batch(model: Path, tmp_path: Path) -> None:
    curves = [
        curve_of(compressed(tmp_path / str(size), model, recipe_of({**DISTIL, "micro_batch_size": size})), 0)
        for size in (1, 4)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_all_logits_from_disk_teach_what_the_running_teacher_does(model: Path, tmp_path: Path) -> None:
    curves = [
        curve_of(compressed(tmp_path / str(top_k), model, recipe_of(CUT, {**DISTIL, "teacher_top_k": top_k})), 1)
        for top_k in (None, 384)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)
    assert curves[0][0] > curves[0][-1]


def test_it_stops_early_with_the_weights_of_the_lowest_loss(model: Path, tmp_path: Path) -> None:
    # A rate at which the model soon forgets again what it learns.
    forgetting = {"learning_rate": 0.1, "schedule": "constant", "patience": 3}
    stage = {**TUNE, "num_steps": 80, "num_evaluations": 40, **forgetting}
    attempt = compressed(tmp_path / "work", model, recipe_of(stage))
    [told] = json.loads((attempt.work / "compressed.json").read_text())["stages"]
    metrics = told["metrics"]
    assert metrics["num_steps"] == metrics["lowest_step"] + 3 * 2 < metrics["planned_num_steps"]
    assert metrics["lowest_held_out_loss"] == metrics["held_out_loss"] < metrics["curve"][-1]["held_out_loss"]


@pytest.mark.parametrize("made", [False, True], ids=["a model that was there", "a head that was drawn by chance"])
def test_what_learned_nothing_is_no_result(made: bool, model: Path, tmp_path: Path) -> None:
    hopeless = {"learning_rate": 1.0, "schedule": "constant", "patience": 1}
    recipe = recipe_of({**TUNE, **hopeless})
    if made:
        write_body(tmp_path / "body", "bert")
        recipe = {"stages": [{**MAKE, **hopeless}], **CLASSIFYING}
    with pytest.raises(UserError) as raised:
        compressed(tmp_path / "work", tmp_path / "body" if made else model, recipe)
    assert (raised.value.code, raised.value.param) == ("nothing_learned", "recipe.stages[0].learning_rate")


def test_text_that_is_evaluated_is_not_trained_on(model: Path, tmp_path: Path) -> None:
    texts = {"texts": TEXTS}
    attempt = fetched(
        tmp_path / "work",
        model,
        recipe_of(TUNE, training={"dataset": texts}, evaluation={"dataset": texts, "num_tokens": 4096}),
    )
    seen, held_out = (
        {json.loads(line)["text"] for line in (attempt.work / "source" / f"{name}.jsonl").read_text().splitlines()}
        for name in ("training", "evaluation")
    )
    assert seen
    assert held_out
    assert not seen & held_out
    other = fetched(
        tmp_path / "other",
        model,
        recipe_of(TUNE, training={"dataset": {"texts": TEXTS[:60]}}, evaluation={"dataset": texts, "num_tokens": 4096}),
    )
    left = (other.work / "source" / "evaluation.jsonl").read_text()
    assert not any(text in left for text in TEXTS[:60])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3_text", "phi3", "gpt_neox"])
def test_the_artifact_has_the_weights_that_were_in_memory(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compared with those in memory by plain transformers: a name or a tie that goes astray on the way is seen.
    sizes: dict[str, dict[str, Any]] = {
        "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
        "gpt2": {},
        "gemma3_text": {"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16},
    }
    write_tiny_model(tmp_path / "model", model_type, scale=4.0, **sizes.get(model_type, {"intermediate_size": 128}))
    given: dict[str, torch.Tensor] = {}
    own_run, ids = loop.Loop.run, torch.arange(3, 300).view(3, 99)

    def run(self: Any) -> Any:
        found = own_run(self)
        self._student.model.eval()
        with torch.no_grad():
            given["logits"] = self._student.model(input_ids=ids).logits
        return found

    monkeypatch.setattr(loop.Loop, "run", run)
    attempt = compressed(tmp_path / "work", tmp_path / "model", recipe_of({**DISTIL, "learning_rate": 3e-3}))
    opened: Any = AutoModelForCausalLM.from_pretrained(attempt.artifact, dtype=torch.float32)
    opened.eval()
    before: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before.eval()
    with torch.no_grad():
        error, moved = ((each(input_ids=ids).logits - given["logits"]).norm() for each in (opened, before))
    # Weights are stored in bfloat16: what that rounds is far from what training has moved.
    assert float(error) < 0.2 * float(moved)


def test_no_model_outlives_its_training(model: Path, tmp_path: Path) -> None:
    known = {id(each) for each in gc.get_objects() if isinstance(each, torch.nn.Parameter)}
    stages = ({**DISTIL, "hidden_weight": 1.0}, {"technique": "gptq", "group_size": 32})
    attempt = fetched(tmp_path / "work", model, recipe_of(*stages))
    held: list[tuple[int, ...]] = []

    def heard(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and str(event["step"]).startswith("model.layers.1"):
            every = [each for each in gc.get_objects() if isinstance(each, torch.nn.Parameter)]
            held.extend(tuple(each.shape) for each in every if id(each) not in known and not each.is_meta)

    gc.disable()  # which would come by chance, or too late
    try:
        compress(attempt.work, attempt.request, heard)
    finally:
        gc.enable()
    assert held  # of the block that is compressed
    assert (384, 64) not in held  # the embedding, of a student, a teacher or what they were made from


def test_codes_that_become_values_are_no_result_unless_something_quantizes_them_again(
    model: Path, tmp_path: Path
) -> None:
    rounding = {"technique": "round_to_nearest", "group_size": 32}
    codes = compressed(tmp_path / "codes", model, {"stages": [rounding]}).artifact
    with pytest.raises(UserError) as raised:
        certified(tmp_path / "values", codes, recipe_of(TUNE))
    assert (raised.value.code, raised.value.param) == ("not_smaller", "recipe.stages")
    with pytest.raises(UserError) as raised:
        certified(tmp_path / "again", codes, recipe_of(TUNE, rounding))
    assert raised.value.code == "not_smaller"  # as many bytes as before
    certified(tmp_path / "fewer", codes, recipe_of(CUT, TUNE, rounding))


def test_a_student_of_fewer_tokens_learns_from_the_teacher_without_the_others(tmp_path: Path) -> None:
    write_body(tmp_path / "body", "bert")
    stages = [
        MAKE,
        {"technique": "depth_pruning", "num_blocks": 1, "keep_last": 0},
        {"technique": "vocabulary_pruning"},
        {**{key: value for key, value in MAKE.items() if key != "task"}, "technique": "logit_distillation"},
    ]
    attempt = certified(tmp_path / "work", tmp_path / "body", {"stages": stages, **CLASSIFYING})
    _, _, tokens, training = attempt.report["stages"]
    assert tokens["metrics"]["vocab_size"] < tokens["metrics"]["original_vocab_size"]
    assert training["metrics"]["curve"][-1]["held_out_accuracy"] > 0.9
    assert attempt.report["quality"]["accuracy"] > 0.9


def test_a_language_model_of_fewer_tokens_is_distilled(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(CUT, {"technique": "vocabulary_pruning"}, {**DISTIL, "learning_rate": 3e-3, "num_steps": 12})
    losses = curve_of(certified(tmp_path / "work", model, recipe), 2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("seed", [42, 20_000, 2**31 - 1])
def test_any_seed_will_do(seed: int, model: Path, tmp_path: Path) -> None:
    augmented = {**TUNE, "augmentation": {"mask_probability": 0.0, "delete_probability": 0.1}, "num_steps": 2}
    written = {**DISTIL, "synthetic": {"num_samples": 16}, "alpha": 0.0, "num_steps": 2}
    attempt = compressed(tmp_path / "work", model, recipe_of(augmented, written, seed=seed))
    assert [len(curve_of(attempt, index)) for index in (0, 1)] == [3, 3]  # before, and after each of two steps


def test_an_opt_that_leaves_out_blocks_by_chance_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SECONDS_A_STATE", 0.0)
    write_tiny_model(tmp_path / "model", "opt", ffn_dim=128, word_embed_proj_dim=64, layerdrop=0.9)
    attempt = compressed(tmp_path / "work", tmp_path / "model", recipe_of({**DISTIL, "hidden_weight": 1.0}))
    before, after = (load_file(each / "model.safetensors") for each in (tmp_path / "model", attempt.artifact))
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("fc1.weight"))
