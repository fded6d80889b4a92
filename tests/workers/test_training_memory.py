"""What a training takes of memory: counted from config and headers, and held against what there is before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import write_tiny_llama
from tests.workers.attempts import TEXTS, fetched
from workers.errors import CrashError
from workers.pipeline import compress
from workers.recipe import Recipe
from workers.sources.facts import ModelFacts
from workers.sources.inspection import inspect_model
from workers.training_memory import check_training_memory, training_memory

TUNE = {"technique": "fine_tuning", "num_steps": 1, "max_seq_length": 32, "batch_size": 4}
DISTIL = {**TUNE, "technique": "logit_distillation"}
HALF = {"technique": "depth_pruning", "num_blocks": 1, "keep_first": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roots") / "llama"
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def facts(model: Path) -> ModelFacts:
    return inspect_model(f"file:{model.name}", model_roots=[model.parent])


def recipe_of(*stages: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"stages": list(stages), "training": {"dataset": {"texts": TEXTS[:50]}}})


def copies(facts: ModelFacts, *stages: dict[str, Any]) -> list[float]:
    """Float32 values a parameter of the original, of each training."""
    return [each.state_bytes / 4 / facts.num_parameters for each in training_memory(recipe_of(*stages), facts)]


def test_state_is_weights_gradients_moments_the_best_weights_and_the_teacher(facts: ModelFacts) -> None:
    assert copies(facts, TUNE) == [4]
    assert copies(facts, {**TUNE, "patience": 1}) == [5]
    assert copies(facts, DISTIL, {**DISTIL, "teacher_top_k": 4}, {**DISTIL, "alpha": 1.0}) == [5, 4, 4]


def test_adapters_need_no_copies_of_what_they_adapt(facts: ModelFacts) -> None:
    assert copies(facts, {**DISTIL, "technique": "lora_recovery"}) == [2]
    assert copies(facts, {**DISTIL, "technique": "lora_recovery", "teacher_top_k": 8}) == [1]


def test_a_student_is_as_small_as_stages_before_have_made_it(facts: ModelFacts) -> None:
    [alone], [cut, later] = copies(facts, DISTIL), copies(facts, HALF, DISTIL, TUNE)
    embedding = 384 * 64 / facts.num_parameters
    assert cut == pytest.approx(alone - 4 * (1 - embedding) / 2, rel=0.01)
    assert later == pytest.approx(cut - 1)
    [inside] = training_memory(recipe_of({"technique": "iterate", "rounds": 2, "stages": [HALF, TUNE]}), facts)
    assert inside.param == "recipe.stages[0].stages[1]"
    assert inside.state_bytes == training_memory(recipe_of(HALF, TUNE), facts)[0].state_bytes


def test_activations_grow_with_what_is_read_at_a_time(facts: ModelFacts) -> None:
    few, many, longer, all_at_once = (
        training_memory(recipe_of({**TUNE, **changes}), facts)[0].passing_bytes
        for changes in (
            {"micro_batch_size": 1}, {"micro_batch_size": 4}, {"max_seq_length": 64}, {"batch_size": 1_000}
        )
    )  # fmt: skip
    assert few < many < longer < all_at_once


def test_every_process_holds_the_model_where_they_share_memory(facts: ModelFacts) -> None:
    recipe = recipe_of(HALF, {**TUNE, "num_processes": 4})
    [each] = training_memory(recipe, facts)
    assert each.num_bytes == 4 * (each.state_bytes + each.passing_bytes)
    check_training_memory(recipe, facts, 4 * each.state_bytes, is_shared=True)
    check_training_memory(recipe, facts, each.state_bytes, is_shared=False)
    with pytest.raises(CrashError) as caught:
        check_training_memory(recipe, facts, 4 * each.state_bytes - 1, is_shared=True)
    assert (caught.value.code, caught.value.param) == ("out_of_memory", "recipe.stages[1]")


def test_a_job_without_room_for_its_training_fails_before_it_computes(model: Path, tmp_path: Path) -> None:
    attempt = fetched(tmp_path / "work", model, {"stages": [HALF, TUNE], "training": {"dataset": {"texts": TEXTS}}})
    with pytest.raises(CrashError) as caught:
        compress(attempt.work, attempt.request, attempt.events.append, 1)
    assert (caught.value.code, caught.value.param) == ("out_of_memory", "recipe.stages[1]")
    assert not (attempt.work / "journal" / "stage-00").exists()
