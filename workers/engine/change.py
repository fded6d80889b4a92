"""Whether a recipe did anything: what changed nothing is a failure."""

from __future__ import annotations

import torch
from safetensors import safe_open

from workers.engine.checkpoint import Checkpoint
from workers.engine.results import Streamed
from workers.errors import UserError
from workers.formats.parts import Parts
from workers.recipe import Recipe
from workers.techniques import LayerOptions


def check_changed(recipe: Recipe, streamed: Streamed, checkpoint: Checkpoint, parts: Parts) -> None:
    """Raise UserError ``nothing_changed`` where a stage left every weight as it was."""
    for index, stage in enumerate(recipe.stages):
        if not isinstance(stage, LayerOptions):  # it said before what it would change
            continue
        layers = streamed.metrics(index)
        if not layers:
            raise UserError(
                "nothing_changed",
                "Every linear layer is on the ignore list of this stage, so it changes nothing.",
                param=f"{recipe.param(index)}.ignore",
                hint="Shorten `ignore`, or leave the stage out.",
            )
        if stage.kind == "factorization" and not any(layer["rank"] for layer in layers.values()):
            raise UserError(
                "nothing_changed",
                "No layer would have fewer weights as two factors.",
                param=recipe.param(index),
                hint="Ask for a lower rank, ratio or energy, or a smaller multiple_of.",
            )
        if stage.kind == "pruning" and not any(layer["num_pruned"] for layer in layers.values()):
            raise UserError(
                "nothing_changed",
                "No weight became zero that was not zero before.",
                param=recipe.param(index),
                hint="Ask for more sparsity than the model already has.",
            )
    if recipe.trains_codes:  # which were trained before, to what is stored now
        return
    # Codes are another form of what they stand for, and so are the values of a source that had codes.
    is_stored_alike = not recipe.stores_codes and recipe.cast is None and "quantization_config" not in checkpoint.config
    if recipe.quantization is not None and is_stored_alike and _are_alike(checkpoint, parts):
        raise UserError(
            "nothing_changed",
            "Every weight has the value that it had before.",
            param=recipe.param(len(recipe.stages) - 1),
            hint="The model is on this grid already: choose fewer bits or other groups, or leave the stage out.",
        )


def _are_alike(checkpoint: Checkpoint, parts: Parts) -> bool:
    """Whether the parts hold what the checkpoint has."""
    for path in sorted(parts.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if not torch.equal(file.get_tensor(name), checkpoint.as_stored(name)):
                    return False
    return True
