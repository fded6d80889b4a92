"""What chance does to the tokens of a stage's samples, and whether the tokenizer has what it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from workers.errors import UserError
from workers.recipe import Recipe
from workers.techniques import TrainingOptions, placed
from workers.techniques.training_options import Augmentation
from workers.training.samples import Augmented
from workers.training.seeds import seed_of


def check_augmentation(recipe: Recipe, tokenizer: Any) -> None:
    """Refuse, before anything is computed, tokens to be masked where no token stands for a masked one.

    Which one does may be a default of the tokenizer's class, which transformers chooses by more than its files say: so
    preflight cannot know. Raises UserError ``invalid_value``.
    """
    for param, stage in placed(recipe.stages):
        masks = isinstance(stage, TrainingOptions) and stage.augmentation.mask_probability > 0
        if masks and _mask_token(tokenizer) is None:
            raise UserError(
                "invalid_value",
                "The tokenizer has no token that stands for a masked one, nor one for unknown text.",
                param=f"{param}.augmentation.mask_probability",
                hint="Leave tokens out by delete_probability alone.",
            )


def augmentation_of(stage: TrainingOptions, tokenizer: Any, seed: int) -> Callable[[int], Augmented] | None:
    """What is done to the tokens of each step, by its number; None where nothing is."""
    options = stage.augmentation
    if options == Augmentation():
        return None
    return partial(_augmented, options, _mask_token(tokenizer) or 0, tokenizer.all_special_ids, seed)


def _mask_token(tokenizer: Any) -> int | None:
    found: int | None = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
    return found


def _augmented(
    options: Augmentation, mask_token: int, special_tokens: Sequence[int], seed: int, step: int
) -> Augmented:
    return Augmented(options, mask_token, special_tokens, seed_of(seed, "augmentation", step))
