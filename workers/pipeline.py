"""From a fetched model to an artifact: load, stages, export. Reads downwards."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from workers.architectures import architecture_of
from workers.architectures.compact import IN_FACTOR
from workers.disk import write_json
from workers.engine.change import check_changed
from workers.engine.checkpoint import Checkpoint
from workers.engine.device import compute_device, return_freed_memory
from workers.engine.journal import Journal
from workers.engine.skeleton import Skeleton
from workers.engine.stored_size import StoredSize
from workers.engine.stream import Stream
from workers.export import export
from workers.fingerprint import change_of, fingerprint, made_under
from workers.memory import free_bytes, waiting_bytes
from workers.preparation import Preparation
from workers.recipe import Recipe
from workers.shapes import config_after
from workers.shapes.attention import windows_of
from workers.sources.facts import ModelFacts
from workers.sources.unchanged import check_unchanged
from workers.stage_report import stage_report
from workers.techniques import ChosenLayers, placed
from workers.texts import Texts
from workers.training.augmentation import check_augmentation
from workers.training_memory import check_training_memory

Emit = Callable[[dict[str, Any]], None]

# What part of the phase is over when all is computed; the rest is writing it out.
COMPUTED = 0.98


def compress(work: Path, request: dict[str, Any], emit: Emit, memory_limit_bytes: int | None = None) -> None:
    """Run the recipe of ``request`` on ``{work}/source`` and leave ``{work}/artifact`` and ``{work}/compressed.json``.

    Also leaves ``{work}/probe.safetensors``: token ids, and the logits that the artifact has to give on them. Under
    ``memory_limit_bytes``, or what the machine has, more of the calibration's activations go to files.
    """
    recipe = Recipe.model_validate(request["recipe"])
    torch.manual_seed(recipe.seed)
    return_freed_memory()
    emit({"event": "progress", "fraction": 0.0, "stage": 0, "step": "load"})
    emit({"event": "stage", "index": 0, "status": "running", "metrics": {}})
    checkpoint = Checkpoint(work / "source" / "model", cast=getattr(torch, recipe.cast) if recipe.cast else None)
    # Before the tokenizer, which reads config.json too and would be blamed for what is wrong there.
    skeleton = Skeleton(checkpoint, architecture_of(checkpoint.config), compute_device())
    config_after(recipe.stages, checkpoint.config)  # what no stage can do is refused before any begins
    if not recipe.early_stages:
        _check_stored_size(request, recipe, skeleton)
    _check_training_memory(work, recipe, skeleton.device, memory_limit_bytes)
    recipe = _without_zero_points_in_float16(recipe, skeleton, emit)
    texts = Texts(work / "source", recipe, emit)
    check_augmentation(recipe, texts.tokenizer(skeleton))
    journal = _journal(work, recipe, emit)
    may_wait, told = waiting_bytes(free_bytes(memory_limit_bytes)), _Told(recipe, emit)
    preparation = Preparation(recipe, texts, journal, may_wait, told.preparing, told.measured, told.prepared)
    skeleton = preparation.run(skeleton)
    if recipe.early_stages:
        _check_stored_size(request, recipe, skeleton)
    _warn_of_ignored(recipe, skeleton, emit)
    calibration, probe = texts.calibration(skeleton), texts.probe(skeleton)
    num_early = len(recipe.early_stages)
    for index in range(max(1, num_early), len(recipe.stages)):
        emit({"event": "stage", "index": index, "status": "running", "metrics": {}})
    late = recipe.late
    streamed = Stream(skeleton, late, journal, told.streaming, may_wait, keeps_zeros=preparation.keeps_zeros).run(
        calibration, probe
    )
    emit({"event": "progress", "fraction": COMPUTED, "stage": len(recipe.stages) - 1, "step": "export"})
    check_unchanged(work / "source")
    check_changed(late, streamed, skeleton.checkpoint, journal.parts)
    export(work / "artifact", skeleton, recipe, request, streamed, journal.parts)
    save_file({"input_ids": probe, "logits": streamed.probe_logits.contiguous()}, work / "probe.safetensors")
    reports = [stage_report(late, index, streamed, skeleton) for index in range(len(late.stages))]
    if reports:
        reports[-1]["metrics"] |= preparation.training_of_codes
    write_json(
        work / "compressed.json",
        {
            "stages": [*preparation.reports, *reports],
            "num_parameters": skeleton.num_parameters,
            "num_blocks": skeleton.num_blocks,
            "matrix_shapes": skeleton.matrix_shapes,
            "vocab_size": skeleton.checkpoint.config["vocab_size"],
            "windows": None if recipe.window is None else windows_of(skeleton.checkpoint.config),
            "seconds": {name: round(value, 3) for name, value in streamed.seconds.items()},
            "num_timed_blocks": skeleton.num_blocks - journal.num_blocks,
            "num_calibration_tokens": sum(samples.numel() for samples in calibration),
            "fingerprint": journal.fingerprint,
            "made_under": made_under(
                [*journal.fingerprints, *[journal.fingerprint] * (skeleton.num_blocks - journal.num_blocks)],
                journal.decided_under,
            ),
        },
    )
    for index, stage in enumerate(reports, num_early):
        emit({"event": "stage", "index": index, "status": "succeeded", "metrics": stage["metrics"]})


def _check_training_memory(work: Path, recipe: Recipe, device: torch.device, limit_bytes: int | None) -> None:
    """Raise CrashError ``out_of_memory`` where a stage that comes later cannot hold what it trains."""
    if not recipe.training_stages:
        return
    told = json.loads((work / "source" / "model.json").read_text(encoding="utf-8"))
    facts = ModelFacts.from_dict({name: each for name, each in told.items() if name != "fingerprint"})
    is_shared = device.type == "cpu"
    free = free_bytes(limit_bytes) if is_shared else torch.cuda.mem_get_info(device)[0]
    check_training_memory(recipe, facts, free, is_shared=is_shared)


class _Told:
    """Says how far the job is: a part of the time goes into the early stages, the rest into the stream."""

    def __init__(self, recipe: Recipe, emit: Emit) -> None:
        trained = recipe.stages[-1:] if recipe.trains_codes else []
        times = [*(stage.relative_time for stage in (*recipe.early_stages, *trained)), 1.0]
        self._begins = [sum(times[:index]) / sum(times) for index in range(len(times) + 1)]
        self._num_early, self._last = len(recipe.early_stages), len(recipe.stages) - 1
        self._emit = emit

    def preparing(self, stage: int, step: str, block: int, num_blocks: int, fraction: float) -> None:
        """``fraction`` of an early stage is done."""
        begin, end = self._begins[stage : stage + 2]
        self._say(stage, step, block, num_blocks, begin + (end - begin) * fraction)

    def measured(self, stage: int, metrics: dict[str, Any]) -> None:
        """Such a stage has measured something on its way."""
        self._emit({"event": "stage", "index": stage, "status": "running", "metrics": metrics})

    def prepared(self, stage: int, metrics: dict[str, Any]) -> None:
        """Such a stage is done."""
        self._emit({"event": "stage", "index": stage, "status": "succeeded", "metrics": metrics})
        if stage + 1 < self._num_early:
            self._emit({"event": "stage", "index": stage + 1, "status": "running", "metrics": {}})

    def streaming(self, step: str, block: int, num_blocks: int, fraction: float) -> None:
        """``fraction`` of what the stream does is done."""
        begin = self._begins[-2]
        self._say(self._last, step, block, num_blocks, begin + (1 - begin) * fraction)

    def _say(self, stage: int, step: str, block: int, num_blocks: int, fraction: float) -> None:
        event = {"event": "progress", "fraction": COMPUTED * fraction, "stage": stage, "step": step}
        self._emit({**event, "block": block, "num_blocks": num_blocks})


def _check_stored_size(request: dict[str, Any], recipe: Recipe, skeleton: Skeleton) -> None:
    """Raise UserError ``constraint_impossible`` where the artifact is larger than the job allows, whatever comes."""
    limit = request.get("constraints", {}).get("max_size_bytes")
    if limit is not None and not recipe.stores_bitmasks:  # how large a bitmask's values are is known at the end alone
        StoredSize(skeleton, recipe).check(limit)


def _warn_of_ignored(recipe: Recipe, skeleton: Skeleton, emit: Emit) -> None:
    """Say which patterns name no layer: a typing error there would have a layer compressed that was to be spared."""
    names = {*skeleton.linear_layers, skeleton.architecture.embedding}
    names |= {name.removesuffix(f".{IN_FACTOR}") for name in names}  # stages before a factorization knew these
    for place, stage in placed(recipe.stages):
        if not isinstance(stage, ChosenLayers):
            continue
        unmatched = [pattern for pattern in stage.ignore if not fnmatch.filter(names, pattern)]
        if unmatched:
            message = (
                f"{len(unmatched)} of the patterns name no linear layer of this model and spare none, the first "
                f"{unmatched[0]!r}. A layer's name is like {skeleton.block_layers[0]}."
            )
            param = f"{place}.ignore"
            emit({"event": "warning", "code": "ignores_nothing", "message": message, "param": param})


def _without_zero_points_in_float16(recipe: Recipe, skeleton: Skeleton, emit: Emit) -> Recipe:
    """The recipe with even codes for the activations of a float16 model.

    Loaders subtract a token's smallest value from its largest in the model's own type: float16 may not have the
    difference, and of small values takes 2⁻¹⁰ for the least scale.
    """
    config, checkpoint = skeleton.checkpoint.config, skeleton.checkpoint
    opened_as = config.get("dtype", config.get("torch_dtype"))
    is_float16 = opened_as == "float16" or any(
        checkpoint.stored_dtype(f"{layer}.weight") == torch.float16 for layer in skeleton.block_layers
    )
    if recipe.activations is None or recipe.activations.symmetric or not is_float16:
        return recipe
    *earlier, last = recipe.stages
    emit(
        {
            "event": "warning",
            "code": "even_activations",
            "message": "The model is float16, which has not the range for zero-points of activations: they get even "
            "codes, as under symmetric_activations. A checkpoint in bfloat16 or float32 would have them.",
            "param": f"recipe.stages[{len(earlier)}].symmetric_activations",
        }
    )
    return recipe.model_copy(update={"stages": [*earlier, last.model_copy(update={"symmetric_activations": True})]})


def _journal(work: Path, recipe: Recipe, emit: Emit) -> Journal:
    """The journal in ``{work}/journal``: empty, or what an earlier attempt at the same work left."""
    source = work / "source"
    identity = {
        "attar": version("attar"),
        "model": json.loads((source / "model.json").read_text(encoding="utf-8"))["revision"],
        "recipe": recipe.model_dump(mode="json"),
        "data": json.loads((source / "data.json").read_text(encoding="utf-8")),
    }
    journal = Journal(work / "journal", identity, fingerprint())
    if journal.discarded is not None:
        emit({"event": "warning", "code": journal.discarded.code, "message": journal.discarded.message, "param": None})
    change = change_of(journal.fingerprints[-1], journal.fingerprint) if journal.fingerprints else ""
    if change:
        message = (
            f"The job goes on from block {journal.num_blocks} where something else decides how numbers are rounded: "
            f"{change}. The result is as good, but the same recipe will not give the same bytes again."
        )
        emit({"event": "warning", "code": "fingerprint_changed", "message": message[:2000], "param": None})
    return journal
