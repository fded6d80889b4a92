"""From a fetched model to an artifact: load, stages, export. Reads downwards."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from workers.architectures import architecture_of
from workers.disk import write_json
from workers.engine.change import check_changed
from workers.engine.checkpoint import Checkpoint
from workers.engine.device import compute_device, return_freed_memory
from workers.engine.journal import Journal
from workers.engine.reshaping import reshape
from workers.engine.results import Streamed
from workers.engine.skeleton import Skeleton
from workers.engine.stored_size import StoredSize
from workers.engine.stream import Stream
from workers.engine.text import (
    DOCUMENT_SEPARATOR,
    calibration_samples,
    check_masks,
    chosen_sequences,
    of_one_length,
    read_documents,
    sequences,
    tokenize,
)
from workers.evaluation.speed import check_prompt
from workers.fingerprint import change_of, fingerprint, made_under
from workers.formats import bitsandbytes, compressed_tensors, sparse_bitmask
from workers.formats.parts import Parts
from workers.memory import free_bytes, waiting_bytes
from workers.recipe import Recipe
from workers.sources.tokenizer_file import tokenizer_failures
from workers.sources.unchanged import check_unchanged
from workers.techniques import LayerOptions, MixedPrecision, RoundToNearest

Emit = Callable[[dict[str, Any]], None]

# Tokens whose logits the artifact has to give again, and in how many sequences an encoder reads them.
NUM_PROBE_TOKENS = 64
NUM_PROBE_SEQUENCES = 4
# What part of the phase is over when all is computed; the rest is writing it out.
COMPUTED = 0.98
# What an artifact takes over from the source beside its weights and config.json.
COMPANION_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template*", "*.tiktoken", "spiece.model", "sentencepiece*",
)  # fmt: skip


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
    architecture = architecture_of(checkpoint.config)
    # Before the tokenizer, which reads config.json too and would be blamed for what is wrong there.
    skeleton = Skeleton(checkpoint, architecture, compute_device())
    if not recipe.structure_stages:
        _check_stored_size(request, recipe, skeleton)
    recipe = _without_zero_points_in_float16(recipe, skeleton, emit)
    with tokenizer_failures("invalid_tokenizer", "The tokenizer cannot be opened"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    if architecture.task == "masked":
        check_masks(tokenizer)
    elif architecture.task == "causal":
        check_prompt(tokenizer, recipe.evaluation.prompt, checkpoint.max_positions)
    calibration = _calibration(work, recipe, tokenizer, skeleton, emit)
    probe = _probe(work, tokenizer, skeleton)
    journal = _journal(work, recipe, emit)
    may_wait, told = waiting_bytes(free_bytes(memory_limit_bytes)), _Told(recipe, emit)
    skeleton, shapes = reshape(skeleton, recipe, calibration, journal, may_wait, told.shaping, told.shaped)
    if recipe.structure_stages:
        _check_stored_size(request, recipe, skeleton)
    _warn_of_ignored(recipe, skeleton, emit)
    for index in range(max(1, len(shapes)), len(recipe.stages)):
        emit({"event": "stage", "index": index, "status": "running", "metrics": {}})
    streamed = Stream(skeleton, recipe, journal, told.streaming, may_wait).run(calibration, probe)
    emit({"event": "progress", "fraction": COMPUTED, "stage": len(recipe.stages) - 1, "step": "export"})
    check_unchanged(work / "source")
    _export(work / "artifact", skeleton, recipe, request, streamed, journal.parts)
    save_file({"input_ids": probe, "logits": streamed.probe_logits.contiguous()}, work / "probe.safetensors")
    stages = [
        _stage_report(recipe, index, streamed, skeleton, shapes[index] if index < len(shapes) else None)
        for index in range(len(recipe.stages))
    ]
    write_json(
        work / "compressed.json",
        {
            "stages": stages,
            "seconds": {name: round(value, 3) for name, value in streamed.seconds.items()},
            "num_timed_blocks": skeleton.num_blocks - journal.num_blocks,
            "num_calibration_tokens": sum(samples.numel() for samples in calibration),
            "fingerprint": journal.fingerprint,
            "made_under": made_under(
                [*journal.fingerprints, *[journal.fingerprint] * (skeleton.num_blocks - journal.num_blocks)]
            ),
        },
    )
    for index, stage in enumerate(stages[len(shapes) :], len(shapes)):
        emit({"event": "stage", "index": index, "status": "succeeded", "metrics": stage["metrics"]})


class _Told:
    """Says how far the job is: a part of the time goes into its shape, the rest into the stream."""

    def __init__(self, recipe: Recipe, emit: Emit) -> None:
        self._share = recipe.structure_share
        self._num_shapes, self._last = len(recipe.structure_stages), len(recipe.stages) - 1
        self._emit = emit

    def shaping(self, stage: int, step: str, block: int, num_blocks: int, fraction: float) -> None:
        """``fraction`` of a stage that decides the shape is done."""
        self._say(stage, step, block, num_blocks, self._share * (stage + fraction) / self._num_shapes)

    def shaped(self, stage: int, metrics: dict[str, Any]) -> None:
        """Such a stage is done."""
        self._emit({"event": "stage", "index": stage, "status": "succeeded", "metrics": metrics})
        if stage + 1 < self._num_shapes:
            self._emit({"event": "stage", "index": stage + 1, "status": "running", "metrics": {}})

    def streaming(self, step: str, block: int, num_blocks: int, fraction: float) -> None:
        """``fraction`` of what the stream does is done."""
        self._say(self._last, step, block, num_blocks, self._share + (1 - self._share) * fraction)

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
    for index, stage in enumerate(recipe.stages):
        if not isinstance(stage, LayerOptions):
            continue
        unmatched = [pattern for pattern in stage.ignore if not fnmatch.filter(names, pattern)]
        if unmatched:
            message = (
                f"{len(unmatched)} of the patterns name no linear layer of this model and spare none, the first "
                f"{unmatched[0]!r}. A layer's name is like {skeleton.block_layers[0]}."
            )
            param = f"recipe.stages[{index}].ignore"
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


def _calibration(work: Path, recipe: Recipe, tokenizer: Any, skeleton: Skeleton, emit: Emit) -> list[Tensor]:
    """Samples × tokens for each length of samples; nothing where no stage or plan needs them."""
    if not recipe.needs_calibration:
        return []
    wanted, param = recipe.calibration, "recipe.calibration.dataset"
    documents = read_documents(work / "source" / "calibration.jsonl")
    length = min(wanted.max_seq_length, skeleton.checkpoint.max_positions)
    if skeleton.architecture.task == "causal":
        ids = tokenize(tokenizer, documents, param=param)
        samples = [calibration_samples(ids, wanted.num_samples, length, recipe.seed)]
        is_short = samples[0].numel() < wanted.num_samples * wanted.max_seq_length
    else:
        # Texts of people are as short as they are: only their number can fall short.
        found = sequences(tokenizer, list(documents), length, param=param, cuts=True)
        samples = [ids for _, ids in of_one_length(chosen_sequences(found, wanted.num_samples, recipe.seed))]
        is_short = len(found) < wanted.num_samples
    if is_short:
        emit(
            {
                "event": "warning",
                "code": "short_calibration",
                "message": f"The calibration text and the model's positions give {sum(map(len, samples))} samples of "
                f"{samples[-1].shape[1]} tokens; {wanted.num_samples} of {wanted.max_seq_length} were asked for.",
                "param": "recipe.calibration",
            }
        )
    return samples


def _probe(work: Path, tokenizer: Any, skeleton: Skeleton) -> Tensor:
    """Sequences × tokens of the evaluation text, whose logits the artifact has to give."""
    documents, param = read_documents(work / "source" / "evaluation.jsonl"), "recipe.evaluation.dataset"
    if skeleton.architecture.task == "causal":
        return tokenize(tokenizer, documents, param=param)[:NUM_PROBE_TOKENS].unsqueeze(0)
    # A classifier gives one row of logits a sequence: several short ones say more than a long one.
    text = DOCUMENT_SEPARATOR.join(islice(documents, NUM_PROBE_SEQUENCES * NUM_PROBE_TOKENS))
    length = min(NUM_PROBE_TOKENS // NUM_PROBE_SEQUENCES, skeleton.checkpoint.max_positions)
    found = sequences(tokenizer, [text], length, param=param, cuts=True)
    _, longest = of_one_length(found)[-1]
    return longest[:NUM_PROBE_SEQUENCES]


def _export(
    folder: Path,
    skeleton: Skeleton,
    recipe: Recipe,
    request: dict[str, Any],
    streamed: Streamed,
    parts: Parts,
) -> None:
    """Write the artifact's weights, config, tokenizer and resolved recipe."""
    checkpoint = skeleton.checkpoint
    check_changed(recipe, streamed, checkpoint, parts)
    folder.mkdir()
    if recipe.stores_bitmasks:
        parts.assemble(folder, sparse_bitmask.STEM)
        sparse_bitmask.write_loader(folder)
    else:
        parts.assemble(folder)
    config = {key: value for key, value in checkpoint.config.items() if key not in {"quantization_config", "auto_map"}}
    if recipe.cast is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = recipe.cast
    if streamed.grids:
        config["quantization_config"] = _quantization_config(skeleton, recipe, streamed)
    write_json(folder / "config.json", config)
    for pattern in COMPANION_FILES:
        for path in sorted(checkpoint.folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    source = json.loads((folder.parent / "source" / "model.json").read_text(encoding="utf-8"))
    # A body that can be posted again; which texts it was made with, the report says.
    model = {"id": request["model"]["id"], "revision": source["revision"]}
    write_json(folder / "recipe.json", {"model": model, "recipe": recipe.model_dump(mode="json")})


def _quantization_config(skeleton: Skeleton, recipe: Recipe, streamed: Streamed) -> dict[str, Any]:
    if recipe.output.format == "bitsandbytes":
        stage, layer = recipe.quantization, next(iter(streamed.grids))
        assert isinstance(stage, RoundToNearest)
        return bitsandbytes.quantization_config(
            streamed.grids,
            skeleton.linear_layers,
            skeleton.checkpoint.stored_dtype(f"{layer}.weight"),
            double_quant=stage.double_quant,
        )
    assert recipe.output.packing is not None
    return compressed_tensors.quantization_config(
        streamed.grids,
        skeleton.linear_layers,
        recipe.output.packing,
        activations=recipe.activations,
        unpacks_on_load=recipe.quantizes_embeddings,
    )


def _stage_report(
    recipe: Recipe, index: int, streamed: Streamed, skeleton: Skeleton, shape: dict[str, Any] | None
) -> dict[str, Any]:
    """What the report says of a stage: totals for people, each layer for who looks closer.

    ``shape`` are the metrics of a stage that changed the model's shape.
    """
    if shape is not None:
        return {"technique": recipe.stages[index].technique, "metrics": shape, "fallbacks": [], "layers": {}}
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
