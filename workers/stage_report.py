"""What the report says of a stage that compressed layers."""

from __future__ import annotations

from typing import Any

from workers.engine.results import Streamed
from workers.engine.skeleton import Skeleton
from workers.recipe import Recipe
from workers.techniques import MixedPrecision


def stage_report(recipe: Recipe, index: int, streamed: Streamed, skeleton: Skeleton) -> dict[str, Any]:
    """Of stage ``index`` of ``recipe``: totals for people, each layer for who looks closer."""
    layers, fallbacks = streamed.metrics(index), streamed.fallbacks(index)
    errors = [layer["relative_error"] for layer in layers.values() if "relative_error" in layer]
    metrics: dict[str, Any] = {"num_layers": len(layers), "num_fallbacks": len(fallbacks)}
    if errors:
        metrics["mean_relative_error"] = sum(errors) / len(errors)
    if isinstance(stage := recipe.stages[index], MixedPrecision):
        num_weights = {name: skeleton.num_weights(name) for name in layers}
        bits = sum(layers[name]["num_bits"] * count for name, count in num_weights.items())
        metrics["average_bits"] = bits / sum(num_weights.values())
    return {
        "technique": stage.technique,
        "metrics": metrics,
        "fallbacks": fallbacks,
        "layers": layers,
    }
