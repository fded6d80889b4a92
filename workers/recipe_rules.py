"""The rules that span the stages of a recipe and its output."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from workers.techniques import (
    DistillationOptions,
    Iterate,
    LayerOptions,
    LogitDistillation,
    LowRank,
    MixedPrecision,
    QuantizationOptions,
    ShareLayers,
    SlidingWindow,
    SparsityOptions,
    Stage,
    StructureOptions,
    TrainingOptions,
    placed,
)
from workers.techniques.schemes import PACKED_BITS, SchemeFacts

if TYPE_CHECKING:
    from workers.recipe_parts import Output, Training

Packing = Literal["pack-quantized", "int-quantized", "float-quantized"]


def packings_of(scheme: SchemeFacts) -> tuple[Packing, ...]:
    """The ways in which compressed-tensors stores codes of a scheme, the usual one first; none for odd widths."""
    if scheme.dtype is not None or scheme.is_normal:
        return ()
    if scheme.is_float:
        return ("float-quantized",)
    if scheme.quantizes_activations:
        return ("int-quantized",)
    if scheme.num_bits not in PACKED_BITS:
        return ()
    return ("pack-quantized", "int-quantized") if scheme.num_bits == 8 else ("pack-quantized",)


class RecipeError(ValueError):
    """A rule that spans stages is broken; ``param`` is relative to the recipe."""

    def __init__(self, code: str, param: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def check_stages(stages: Sequence[Stage], output: Output) -> None:
    """Raise RecipeError where the stages do not fit each other or the output."""
    _check_compact(stages, output)
    _check_order(stages)
    quantizing = [index for index, stage in enumerate(stages) if isinstance(stage, QuantizationOptions)]
    if len(quantizing) > 1:
        raise RecipeError(
            "stages_conflict", f"stages[{quantizing[1]}].technique", "a model is quantized once; keep one such stage"
        )
    if quantizing and quantizing[0] != len(stages) - 1:
        raise RecipeError(
            "stages_conflict",
            f"stages[{quantizing[0] + 1}].technique",
            "nothing can follow quantization; move this stage before it",
        )
    _check_sparsities(stages)
    quantization = next((stage for stage in stages if isinstance(stage, QuantizationOptions)), None)
    if output.format in ("compressed-tensors", "bitsandbytes") and quantization is None:
        raise RecipeError(
            "output_format_impossible",
            "output.format",
            f"{output.format} stores quantized layers and no stage quantizes; use safetensors",
        )
    if output.format == "sparse-bitmask" and not any(isinstance(stage, SparsityOptions) for _, stage in placed(stages)):
        raise RecipeError(
            "output_format_impossible",
            "output.format",
            "sparse-bitmask stores values that pruning left, and no stage sets weights to zero; use safetensors",
        )
    if output.format == "sparse-bitmask" and quantization is not None:
        raise RecipeError(
            "output_format_impossible",
            "output.format",
            f"sparse-bitmask stores values that pruning left, and stages[{quantizing[0]}] quantizes them; "
            "use compressed-tensors",
        )
    if output.format != "compressed-tensors" and output.packing is not None:
        raise RecipeError("output_format_impossible", "output.packing", "packing belongs to compressed-tensors")
    if quantization is not None:
        _check_output_of(quantization, output)


def _check_order(stages: Sequence[Stage]) -> None:
    """Raise RecipeError ``stages_conflict`` where the model's shape changes after single weights were left out."""
    first: int | None = None
    for index, stage in enumerate(stages):
        if stage.reshapes and first is not None:
            option = "technique" if isinstance(stage, StructureOptions) else "student"
            raise RecipeError(
                "stages_conflict",
                f"stages[{index}].{option}",
                f"{stage.technique} changes the model's shape; move it before stages[{first}]",
            )
        if first is None and isinstance(stage, LayerOptions | SparsityOptions | Iterate):
            first = index
    techniques = [type(stage) for stage in stages]
    for index, stage in enumerate(stages):
        makes_new_type = isinstance(stage, LogitDistillation) and stage.makes_new_type
        if makes_new_type and SlidingWindow in techniques[:index]:
            raise RecipeError(
                "stages_conflict",
                f"stages[{index}].student.model_type",
                "a student of another type does not take over the window; move sliding_window behind it, or leave it "
                "out",
            )


def check_training(stages: Sequence[Stage], training: Training | None) -> None:
    """Raise RecipeError ``training_missing`` where a stage trains and the recipe names no text for it."""
    for param, stage in placed(stages):
        is_read = isinstance(stage, TrainingOptions) and getattr(stage, "synthetic", None) is None
        if training is None and is_read:
            raise RecipeError(
                "training_missing",
                "training",
                f"{param.removeprefix('recipe.')} trains and needs text; name a dataset"
                + (", or set synthetic" if isinstance(stage, DistillationOptions) else ""),
            )


def _check_sparsities(stages: Sequence[Stage]) -> None:
    """Raise RecipeError ``stages_conflict`` where a pruning stage asks for no more zeros than that before it leaves."""
    places = ((param.removeprefix("recipe."), stage) for param, stage in placed(stages))
    pruning = [(place, stage) for place, stage in places if isinstance(stage, SparsityOptions)]
    for (before, earlier), (place, later) in pairwise(pruning):
        if set(earlier.ignore) <= set(later.ignore) and _are_enough(earlier, later):
            option = "sparsity" if later.pattern is None else "mask_structure"
            raise RecipeError(
                "stages_conflict",
                f"{place}.{option}",
                f"{before} leaves {earlier.sparsity:g} of the weights zero already; ask for more than that",
            )


def _are_enough(earlier: SparsityOptions, later: SparsityOptions) -> bool:
    """Whether the zeros of one stage are as many, and lie so, as the one after it asks for.

    But for columns that a pattern does not reach, where its length does not divide a layer.
    """
    assert earlier.sparsity is not None
    assert later.sparsity is not None
    if later.sparsity > earlier.sparsity:
        return False
    if later.pattern is not None:
        return earlier.pattern is not None and later.pattern[1] % earlier.pattern[1] == 0
    return later.is_uniform and (earlier.is_uniform or earlier.pattern is not None)


def _check_compact(stages: Sequence[Stage], output: Output) -> None:
    """Raise RecipeError where factors of low rank, or shared blocks, do not fit other stages or the output."""
    compact = [index for index, stage in enumerate(stages) if isinstance(stage, LowRank | ShareLayers)]
    if not compact:
        return
    first = compact[0]
    if len(compact) > 1:
        raise RecipeError(
            "stages_conflict",
            f"stages[{compact[1]}].technique",
            f"stages[{first}] leaves factors or shared blocks, which are not factored or shared again; keep one",
        )
    contained = [stage.pruning if isinstance(stage, Iterate) else stage for stage in stages[:first]]
    if isinstance(stages[first], LowRank) and any(isinstance(stage, SparsityOptions) for stage in contained):
        raise RecipeError(
            "stages_conflict",
            f"stages[{first}].technique",
            "factors of a pruned weight keep none of its zeros; move low_rank before the stage that prunes",
        )
    if output.format == "sparse-bitmask":
        raise RecipeError(
            "output_format_impossible",
            "output.format",
            f"sparse-bitmask and {stages[first].technique} have a loader each, and none opens both; use safetensors",
        )
    last = stages[-1]
    if isinstance(stages[first], LowRank) and isinstance(last, QuantizationOptions) and last.embeddings:
        is_packed = output.format == "compressed-tensors"
        if is_packed and last.group_size is not None:
            raise RecipeError(
                "stages_conflict",
                f"stages[{len(stages) - 1}].group_size",
                "with embeddings one group size has to divide every matrix, and ranks are as they come; use null for "
                "one scale a channel, or leave embeddings out",
            )


def _check_output_of(quantization: QuantizationOptions, output: Output) -> None:
    """Raise RecipeError ``output_format_impossible`` where the output cannot say what the stage did."""
    scheme, packings = quantization.facts, packings_of(quantization.facts)
    if isinstance(quantization, MixedPrecision) and quantization.max_size_bytes and output.format == "safetensors":
        raise RecipeError(
            "output_format_impossible",
            "output.format",
            "safetensors stores values at full width, whatever max_size_bytes says; use compressed-tensors, or "
            "average_bits",
        )
    if output.format == "safetensors":
        if scheme.quantizes_activations:
            raise RecipeError(
                "output_format_impossible",
                "output.format",
                f"plain safetensors cannot say that activations are quantized, as {quantization.scheme} does; "
                "use compressed-tensors",
            )
    elif output.format == "bitsandbytes":
        if not scheme.is_normal:
            raise RecipeError(
                "output_format_impossible",
                "output.format",
                f"bitsandbytes stores NF4, not {quantization.scheme}; "
                f"use {'compressed-tensors' if packings else 'safetensors'}",
            )
    elif scheme.is_normal:
        raise RecipeError(
            "output_format_impossible",
            "output.format",
            f"compressed-tensors has no codes for {quantization.scheme}; use bitsandbytes, or safetensors for values",
        )
    elif not packings:
        raise RecipeError(
            "output_format_impossible",
            "output.format",
            f"compressed-tensors packs codes of 4 and 8 bits and {quantization.scheme} has {scheme.num_bits}; "
            "use safetensors, which stores values",
        )
    elif quantization.embeddings and output.packing != "pack-quantized":
        raise RecipeError(
            "output_format_impossible", "output.packing", "embeddings are read from pack-quantized codes alone"
        )
    elif output.packing not in packings:
        raise RecipeError(
            "output_format_impossible",
            "output.packing",
            f"{quantization.scheme} is stored as {' or '.join(packings)}, not as {output.packing}",
        )
