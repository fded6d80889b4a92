"""Whether a model can be trained as the stages of a recipe want: from its config alone, so that both sides ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.architectures import architecture_of
from workers.errors import UserError
from workers.recipe import Recipe
from workers.sources.division import is_one_source
from workers.sources.labels import has_labels
from workers.techniques import DistillationOptions, FineTuning, TrainingOptions, placed


def check_training(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Refuse a recipe that trains what the model, of this ``config``, cannot learn from its text.

    Raises UserError ``unsupported_task`` or ``label_field_missing``.
    """
    if not recipe.training_stages:
        return
    training, evaluation = recipe.training, recipe.evaluation
    is_shared = training is not None and is_one_source(training, evaluation)
    if training is not None and is_shared and evaluation.label_field not in (None, training.label_field):
        raise UserError(
            "label_fields_differ",
            "Training and evaluation name one text, and two fields for its labels.",
            param="recipe.evaluation.label_field",
            hint="Name one field, or give evaluation a text of its own.",
        )
    task = architecture_of(config).task
    for param, stage in placed(recipe.stages):
        if not isinstance(stage, TrainingOptions):
            continue
        if task == "masked":
            raise UserError(
                "unsupported_task",
                "Models with a masked-LM head are not trained.",
                param=f"{param}.technique",
                hint="Begin with fine_tuning and task classification, which gives the model a head for that.",
            )
        if isinstance(stage, FineTuning) and stage.task not in (None, task):
            raise UserError(
                "unsupported_task",
                f"The model is one for {task} and would have to become one for {stage.task}.",
                param=f"{param}.task",
                hint="Leave task out; only the first stage, of an encoder, can make a classifier.",
            )
        if isinstance(stage, DistillationOptions) and stage.synthetic is not None and task != "causal":
            raise UserError(
                "unsupported_task",
                "The model is no causal language model and writes no text.",
                param=f"{param}.synthetic",
                hint="Leave synthetic out and name a dataset in recipe.training.",
            )
        needs_labels = task == "classification" and not (isinstance(stage, DistillationOptions) and stage.alpha == 0)
        if needs_labels and recipe.training is not None and not has_labels(recipe.training):
            raise UserError(
                "label_field_missing",
                "The model is a classifier, and the training text says no classes.",
                param="recipe.training.label_field",
                hint="Name the field of a row that holds its class, or send labels beside inline texts; or distil with "
                "alpha 0, which has no hard targets.",
            )
