"""Recipes by name, for those who do not want to write one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workers.recipe import Recipe
from workers.recipe_parts import BUILTIN_DATASET


@dataclass(frozen=True)
class Preset:
    """A recipe with a name."""

    name: str
    description: str
    recipe: dict[str, Any]  # as JSON has it; training null where the user has to name text


def _recipe(*stages: dict[str, Any]) -> dict[str, Any]:
    """The stages as a recipe that is spelled out."""
    # Any text will do to check the rest: which one it is to be, the user says.
    told = {"stages": list(stages), "training": {"dataset": BUILTIN_DATASET}}
    return {**Recipe.model_validate(told).model_dump(mode="json"), "training": None}


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "int8",
            "8-bit weights, one scale a channel: half of a 16-bit model's linear layers, hardly any loss.",
            _recipe({"technique": "round_to_nearest", "scheme": "W8A16", "group_size": None}),
        ),
        Preset(
            "int4",
            "4-bit weights by GPTQ, in groups of 64: 27 % of a 16-bit model's linear layers; takes minutes.",
            _recipe({"technique": "gptq", "scheme": "W4A16", "group_size": 64}),
        ),
        Preset(
            "int4-fast",
            "4-bit weights by rounding, in groups of 64, with clip search. No calibration; loses more than int4.",
            _recipe({"technique": "round_to_nearest", "scheme": "W4A16", "group_size": 64, "clip_search": True}),
        ),
        Preset(
            "int4-all",
            "int4 with the embedding and the output head packed too: the fewest bytes, and more loss.",
            _recipe({"technique": "gptq", "scheme": "W4A16", "group_size": 64, "embeddings": True}),
        ),
        Preset(
            "fp8",
            "FP8 weights and activations: half of a 16-bit model's linear layers, for GPUs that multiply FP8.",
            _recipe({"technique": "round_to_nearest", "scheme": "FP8"}),
        ),
        Preset(
            "sparse50",
            "Half of the linear layers' weights become zero, by SparseGPT; takes minutes. The bytes on disk stay.",
            _recipe({"technique": "sparsegpt", "sparsity": 0.5}),
        ),
        Preset(
            "classifier-7x",
            "For a trained encoder of six blocks or more: a sixth of them left out, taught again by the original on "
            'labelled text of yours, then 4 bits, embeddings too. Send {"preset": "classifier-7x", "training": …}.',
            _recipe(
                {"technique": "depth_pruning", "method": "divergence", "fraction": 0.17},
                {
                    "technique": "logit_distillation",
                    "num_epochs": 3,
                    "max_seq_length": 128,
                    "learning_rate": 5e-5,
                    "alpha": 0.1,
                    "hidden_weight": 1.0,
                    # What the teacher has learned by heart it says no more about than the labels do.
                    "augmentation": {"mask_probability": 0.1, "delete_probability": 0.1},
                },
                {
                    "technique": "round_to_nearest",
                    "scheme": "W4A16",
                    "group_size": 128,
                    "clip_search": True,
                    "embeddings": True,
                },
            ),
        ),
    )
}
