"""What a reopened artifact has to prove of the stages that made it: size, shape, zeros, and few values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from workers.errors import CrashError, UserError
from workers.evaluation.size import Packed, layers_off_grid, measure_sparsity, packed_bytes, weights_bytes
from workers.formats import load_sparse
from workers.formats.opening import Readable, matrix_shape
from workers.recipe import Recipe
from workers.techniques import (
    Iterate,
    MixedPrecision,
    QuantizationOptions,
    SlidingWindow,
    SparsityOptions,
    TieEmbeddings,
    TrainingOptions,
)

# Headers of files differ by some hundred bytes, which in a model of a few layers is a hundredth.
NEARLY_THE_SAME = 1.05


def check_size(folder: Path, source: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Bytes before and after. A result has to be smaller, unless its weights prove what was done to them."""
    artifact_bytes, original_bytes = weights_bytes(folder), int(source["parameter_bytes"])
    has_few_values = recipe.quantization is not None and not recipe.stores_codes and recipe.cast is None
    # What contains a stage is what it contains.
    contained = [stage.pruning if isinstance(stage, Iterate) else stage for stage in recipe.stages]
    is_pruned = any(isinstance(stage, SparsityOptions) for stage in contained)
    # Training alone makes a model better, a window its cache smaller: neither has fewer weights. A window is proven by
    # itself; what is only trained has not more bytes either, as it would where the original's were codes.
    keeps_weights = all(
        isinstance(stage, SlidingWindow) or (isinstance(stage, TrainingOptions) and not stage.reshapes)
        for stage in recipe.stages
    )
    is_as_large = artifact_bytes <= NEARLY_THE_SAME * original_bytes
    is_proven = has_few_values or is_pruned or (keeps_weights and (is_as_large or recipe.window is not None))
    if artifact_bytes >= original_bytes and recipe.stores_bitmasks:
        raise UserError(
            "not_smaller",
            f"As bitmasks and values the result has {artifact_bytes:,} bytes and the original's parameters have "
            f"{original_bytes:,}.",
            param="recipe.output.format",
            hint="Ask for more sparsity; or set recipe.output.format to safetensors, which stores the zeros too.",
        )
    stage = recipe.quantization
    limit = stage.max_size_bytes if isinstance(stage, MixedPrecision) else None
    if limit is not None and artifact_bytes > limit:
        raise CrashError("size_exceeded", f"The result has {artifact_bytes:,} bytes; {limit:,} were allowed.")
    if artifact_bytes >= original_bytes and not is_proven:
        raise UserError(
            "not_smaller",
            f"The result has {artifact_bytes:,} bytes and the original's parameters have {original_bytes:,}: "
            "nothing was gained.",
            param="recipe.stages",
            hint="Leave out more, or add a stage that quantizes: what it starts from may already be quantized."
            if recipe.early_stages
            else "Choose fewer bits or larger groups; this model may already be quantized.",
        )
    return {
        "original_bytes": original_bytes,
        "artifact_bytes": artifact_bytes,
        "dense_bytes": _dense_bytes(folder) if recipe.stores_bitmasks else None,
        "compression_ratio": original_bytes / artifact_bytes,
        "original_parameters": source["num_parameters"],
        "original_file_bytes": source["source_file_bytes"],
        "original_format": source["source_format"],
    }


def _dense_bytes(folder: Path) -> int:
    """Bytes of the tensors that a sparse-bitmask artifact stands for."""
    return sum(tensor.num_bytes for tensor in load_sparse.read_tensors(folder))


def prove_stages(model: Readable, recipe: Recipe, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages' reports, with what the weights of the reopened artifact prove of each."""
    for stage, report in zip(recipe.stages, stages, strict=True):
        pruning = stage.pruning if isinstance(stage, Iterate) else stage
        if isinstance(pruning, SparsityOptions):
            report["metrics"] |= _prove_zeros(model, pruning, report["layers"])
        elif isinstance(stage, QuantizationOptions) and not recipe.stores_codes and recipe.cast is None:
            report["metrics"] |= _prove_grid(model, stage, report["layers"])
    return stages


def prove_shape(model: Readable, num_blocks: int, matrix_shapes: dict[str, list[int]]) -> None:
    """The reopened artifact has as many blocks as the stages have left, and layers and an embedding of their sizes."""
    with model.running() as running:
        found = len(running.get_submodule(model.architecture.blocks))
        if found != num_blocks:
            raise CrashError(
                "shape_not_reached", f"The artifact has {found} blocks where {num_blocks} were to be left."
            )
        for name, shape in matrix_shapes.items():
            rows_and_columns = matrix_shape(running.get_submodule(name))
            if rows_and_columns != shape:
                raise CrashError(
                    "shape_not_reached", f"The artifact's {name} is of {rows_and_columns} where {shape} was to be left."
                )


def prove_vocabulary(model: Readable, recipe: Recipe, vocab_size: int) -> None:
    """The reopened artifact has as many tokens as the stages have left, and one matrix if that was asked for."""
    with model.running() as running:
        found = running.get_submodule(model.architecture.embedding).num_embeddings
        tied = dict(running.all_tied_weights_keys)
    if found != vocab_size:
        raise CrashError("shape_not_reached", f"The artifact has {found} tokens where {vocab_size} were to be left.")
    is_asked = any(isinstance(stage, TieEmbeddings) for stage in recipe.stages)
    if is_asked and tied.get(f"{model.architecture.head}.weight") != f"{model.architecture.embedding}.weight":
        raise CrashError("shape_not_reached", "The artifact's head is not its embedding.")


def _prove_zeros(model: Readable, stage: SparsityOptions, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each layer has the zeros that it was to get, and all together what the recipe asks for."""
    assert stage.sparsity is not None
    found = measure_sparsity(model, {name: layer["sparsity"] for name, layer in layers.items()}, stage.pattern)
    if found.layers_below:
        raise CrashError(
            "zeros_missing",
            f"{len(found.layers_below)} layers have fewer zeros than asked for, the first {found.layers_below[0]}.",
        )
    # Where all layers have one sparsity, each is rounded by itself.
    if stage.pattern is None and found.num_zeros < math.floor(stage.sparsity * found.num_weights) - len(layers):
        raise CrashError("zeros_missing", f"Of all weights {found.fraction:.4f} are zero, not {stage.sparsity}.")
    return {"sparsity": found.fraction, "num_zeros": found.num_zeros}


def _prove_grid(model: Readable, stage: QuantizationOptions, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Values that no codes are stored for have to be as few as codes would be."""
    packed = {
        name: Packed(layer["num_bits"], layer["group_size"], stage.scale_bits(layer["num_bits"]))
        for name, layer in layers.items()
    }
    off_grid = layers_off_grid(model, packed)
    if off_grid:
        raise CrashError(
            "not_on_grid", f"{len(off_grid)} layers hold more values than their codes have, the first {off_grid[0]}."
        )
    return {"theoretical_packed_bytes": packed_bytes(model, packed)}
