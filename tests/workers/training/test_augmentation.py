"""Tokens that chance masks need one that stands for them: a job says so before it computes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.models import write_tiny_llama, write_tokenizer
from tests.workers.attempts import fetched
from tests.workers.training.recipes import DISTIL, TUNE, recipe_of
from workers.errors import UserError
from workers.pipeline import compress
from workers.recipe import Recipe
from workers.training.augmentation import check_augmentation

PRUNE = {"technique": "magnitude", "sparsity": 0.5}
MASKED = {"augmentation": {"mask_probability": 0.1}}


def test_a_tokenizer_without_such_a_token_is_refused_first(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model")
    attempt = fetched(tmp_path / "work", tmp_path / "model", recipe_of(PRUNE, TUNE, {**DISTIL, **MASKED}))
    with pytest.raises(UserError) as raised:
        compress(attempt.work, attempt.request, attempt.events.append)
    place = "recipe.stages[2].augmentation.mask_probability"
    assert (raised.value.code, raised.value.param) == ("invalid_value", place)
    assert not list((attempt.work / "journal").glob("stage-*"))


@pytest.mark.parametrize(
    ("is_encoder", "options", "param"),
    [
        (False, MASKED, "recipe.stages[0].stages[1].augmentation.mask_probability"),
        (False, {"augmentation": {"delete_probability": 0.1}}, None),
        (True, MASKED, None),
    ],
)
def test_only_masks_ask_for_one(is_encoder: bool, options: dict[str, Any], param: str | None, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", 384, is_encoder=is_encoder)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    iterate = {"technique": "iterate", "stages": [PRUNE, {**DISTIL, **options}]}
    recipe = Recipe.model_validate(recipe_of(iterate))
    if param is None:
        check_augmentation(recipe, tokenizer)
        return
    with pytest.raises(UserError) as raised:
        check_augmentation(recipe, tokenizer)
    assert raised.value.param == param
