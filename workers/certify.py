"""Open the artifact afresh, hold it against what it has to be, measure it, and write the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from workers.disk import write_json
from workers.engine.device import compute_device, peak_device_memory_bytes, return_freed_memory
from workers.errors import CrashError, UserError, is_out_of_memory
from workers.evaluation.context import Reading, context_part
from workers.evaluation.held_out import HeldOut
from workers.evaluation.locality import prove_windows
from workers.evaluation.speed import check_reads, check_runs, measure_reading, measure_speed
from workers.evaluation.ways import choose_ways, open_artifact, open_original, remove_expanded
from workers.fingerprint import environment_of
from workers.formats.opening import Opened, Readable
from workers.formats.shipped_loader import name_of_loader
from workers.formats.snippets import load_snippet
from workers.model_card import model_card
from workers.proofs import check_size, prove_shape, prove_stages, prove_vocabulary
from workers.recipe import Recipe
from workers.report import check_constraints, outcome_of, quality_part, report_of, speed_part
from workers.sources.unchanged import check_unchanged

Emit = Callable[[dict[str, Any]], None]

# Logits of the reopened artifact may differ from the engine's by rounding alone, here as a fraction of the largest.
LOGIT_TOLERANCE = 1e-3
# A header is longer or shorter by some hundred bytes; below this ratio the weights themselves have grown.
NEARLY_EQUAL = 0.98
# A larger share of held-out tokens that the artifact's tokenizer has not is worth a warning.
MUCH_RETOKENIZED = 0.05


def certify(work: Path, request: dict[str, Any], emit: Emit, memory_limit_bytes: int | None = None) -> dict[str, Any]:
    """Prove and measure ``{work}/artifact``; write its ``report.json`` and ``README.md``.

    Under ``memory_limit_bytes``, or what the machine has, a model that is too large is read block by block. Returns
    ``result`` (what a job shows) and ``constraints_violated``.

    Raises:
        CrashError: ``artifact_mismatch``, ``artifact_incomplete``, ``shape_not_reached``, ``zeros_missing``,
            ``not_on_grid``, ``window_missing``, ``not_local`` or ``size_exceeded``: the artifact is not what was
            computed.
        UserError: ``not_smaller``, ``nothing_changed`` or ``non_finite_evaluation``.
    """
    try:
        return _certify(work, request, emit, memory_limit_bytes)
    finally:
        remove_expanded(work)


def _certify(work: Path, request: dict[str, Any], emit: Emit, memory_limit_bytes: int | None) -> dict[str, Any]:
    begin = time.perf_counter()
    recipe = Recipe.model_validate(request["recipe"])
    device = compute_device()

    def progress(step: str, fraction: float) -> None:
        emit({"event": "progress", "fraction": fraction, "stage": len(recipe.stages) - 1, "step": step})

    source = json.loads((work / "source" / "model.json").read_text(encoding="utf-8"))
    compressed = json.loads((work / "compressed.json").read_text(encoding="utf-8"))
    progress("certify.open_original", 0.0)
    ways = choose_ways(work, recipe, device, memory_limit_bytes)
    if warning := ways.warning():
        emit(warning)
        return_freed_memory()
    original = open_original(work, ways, device)
    check_unchanged(work / "source")
    task = original.architecture.task
    held_out = _held_out(work, recipe, original, emit)
    if isinstance(original, Opened):  # by block it takes long, and reading the text finds out
        _check_usable(original, held_out, recipe)
    progress("certify.open", 0.05)
    artifact = open_artifact(work, ways, recipe, device)
    _check_logits(artifact, work / "probe.safetensors")
    if task == "causal":
        _check_generation_settings(artifact, work / "artifact", recipe.evaluation.prompt, emit)
    size = check_size(work / "artifact", source, recipe)
    size["artifact_parameters"] = compressed["num_parameters"] if recipe.early_stages else size["original_parameters"]
    prove_shape(artifact, compressed["num_blocks"], compressed["matrix_shapes"])
    prove_vocabulary(artifact, recipe, compressed["vocab_size"])
    if recipe.window is not None:
        prove_windows(original, artifact, compressed["windows"], recipe.window)
    _warn_of_size(size, emit)
    stages = prove_stages(artifact, recipe, compressed["stages"])
    share = 0.65 if recipe.window is None else 0.3
    quality = quality_part(
        held_out.measure(artifact, lambda done: progress("certify.evaluate", 0.1 + share * done)),
        recipe.evaluation,
    )
    _warn_of_retokenized(quality, emit)
    quality_apart = _quality_apart(
        work, recipe, original, artifact, emit, lambda done: progress("certify.evaluate", 0.1 + share + 0.1 * done)
    )
    context: dict[str, Any] | None = None
    if recipe.window is not None:
        pieces = held_out.pieces(artifact)
        reading = Reading(
            work, recipe, held_out.ids, pieces, lambda done: progress("certify.context", 0.5 + 0.35 * done)
        )
        context = context_part(original, artifact, reading, emit)
    progress("certify.speed", 0.85)
    opened: dict[str, Readable] = {"original": original, "artifact": artifact}
    models = {name: each.model for name, each in opened.items() if isinstance(each, Opened)}
    generation: dict[str, Any] | None = None
    if task != "causal":
        speeds = measure_reading(models, {"original": held_out.longest, "artifact": held_out.longest_of(artifact)})
    else:
        speeds, texts = measure_speed(
            models, {name: each.tokenizer for name, each in opened.items()}, recipe.evaluation.prompt
        )
        if texts:
            generation = {"prompt": recipe.evaluation.prompt, **{name: texts.get(name) for name in opened}}
    report = report_of(
        request,
        source["revision"],
        load_snippet(recipe.output.format or "safetensors", task, name_of_loader(work / "artifact")),
        task,
        {
            "opened": ways.to_report(),
            "size": size,
            "quality": quality,
            "quality_apart": quality_apart,
            "context": context,
            "speed": speed_part(opened, speeds),
            "generation": generation,
            "stages": stages,
            "constraints": check_constraints(request.get("constraints", {}), quality, size),
            "environment": {
                **environment_of(compressed["fingerprint"], compressed["made_under"], work / "source" / "data.json"),
                "peak_device_memory_bytes": peak_device_memory_bytes(),
            },
            "timings": {
                "compress_seconds": compressed["seconds"],
                "num_timed_blocks": compressed["num_timed_blocks"],
                "certify_seconds": round(time.perf_counter() - begin, 3),
            },
        },
    )
    write_json(work / "artifact" / "report.json", report)
    (work / "artifact" / "README.md").write_text(model_card(report, request["recipe"]), encoding="utf-8")
    return outcome_of(report)


def _quality_apart(
    work: Path,
    recipe: Recipe,
    original: Readable,
    artifact: Readable,
    emit: Emit,
    progress: Callable[[float], None],
) -> dict[str, Any] | None:
    """Quality on the text that :attr:`Recipe.evaluation_apart` names; None, with a warning, where there is none of it.

    Nobody asked for this text: where a model cannot be measured on it, the job goes on.
    """
    apart, texts = recipe.evaluation_apart, work / "source" / "apart.jsonl"
    if apart is None or original.architecture.task != "causal":
        return None
    reason = "calibration or training uses all of it."
    if texts.exists():
        try:
            return quality_part(HeldOut(texts, apart, original).measure(artifact, progress), apart)
        except UserError as error:
            reason = error.message
    which = "general text" if apart.is_general else "your own text"
    message = f"Quality on {which}, apart from the evaluation text, is not measured: {reason}"
    emit({"event": "warning", "code": "quality_apart_missing", "message": message, "param": "recipe.evaluation"})
    return None


def _check_usable(original: Opened, held_out: HeldOut, recipe: Recipe) -> None:
    """Raise UserError ``model_unusable`` for an original that fails at what is measured later."""
    if original.architecture.task == "causal":
        check_runs(original.model, original.tokenizer, recipe.evaluation.prompt)
    else:
        check_reads(original.model, held_out.longest)


@torch.inference_mode()
def _check_logits(artifact: Readable, probe: Path) -> None:
    """The reopened artifact gives the logits that the engine computed with the compressed weights."""
    expected = load_file(probe)
    try:
        (logits,) = artifact.read([expected["input_ids"]], lambda _: None)(1)
    except UserError as error:  # the artifact is ours
        raise CrashError("artifact_mismatch", f"The artifact cannot be read: {error.message}") from error
    logits = logits.float().cpu()
    difference = float((logits - expected["logits"]).abs().max())
    allowed = LOGIT_TOLERANCE * float(expected["logits"].abs().max())
    if not difference <= allowed:  # also where either is NaN
        raise CrashError(
            "artifact_mismatch",
            f"The reopened artifact's logits differ by {difference:.3g} from those it should give; "
            f"up to {allowed:.3g} would be rounding.",
        )


def _check_generation_settings(artifact: Readable, folder: Path, prompt: str, emit: Emit) -> None:
    """Leave out a generation_config.json that `model.generate` stumbles over: the model card's lines have to run."""
    path = folder / "generation_config.json"
    if not path.exists():
        return
    try:
        inputs = artifact.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with artifact.running() as model:
            model.generate(**inputs.to(model.device), max_new_tokens=2)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        path.unlink()
        message = (
            f"generation_config.json is left out, as model.generate fails with it: {type(error).__name__}: {error}"
        )
        emit({"event": "warning", "code": "generation_config_dropped", "message": message[:500], "param": "model.id"})


def _warn_of_size(size: dict[str, Any], emit: Emit) -> None:
    """Say aloud what the ratio alone would hide."""
    artifact, original = f"{size['artifact_bytes']:,}", f"{size['original_bytes']:,}"
    warning = {"event": "warning", "param": "model.id"}
    if size["original_format"] == "gguf" and size["artifact_bytes"] >= size["original_file_bytes"]:
        message = (
            f"The result has {artifact} bytes and the GGUF file has {size['original_file_bytes']:,}. "
            f"The report compares it with the 16-bit parameters that the file stands for, {original} bytes."
        )
        emit({**warning, "code": "larger_than_source_file", "message": message})
    elif size["compression_ratio"] < NEARLY_EQUAL:
        message = f"The result has {artifact} bytes and the original {original}: it is larger on disk."
        emit({**warning, "code": "larger_than_original", "message": message})


def _warn_of_retokenized(quality: dict[str, Any], emit: Emit) -> None:
    """Say where the text that was measured is not the text whose tokens were kept."""
    num_others, num_tokens = quality["num_retokenized"], quality["num_tokens"]
    if num_others > MUCH_RETOKENIZED * num_tokens:
        message = (
            f"Of the evaluation's tokens the result lacks {num_others}, and writes them with others: the text is not "
            "like the calibration text, whose tokens were kept."
        )
        param = "recipe.evaluation.dataset"
        emit({"event": "warning", "code": "much_retokenized", "message": message, "param": param})


def _held_out(work: Path, recipe: Recipe, original: Readable, emit: Emit) -> HeldOut:
    wanted = recipe.evaluation
    held_out = HeldOut(work / "source" / "evaluation.jsonl", wanted, original)
    if held_out.num_tokens < wanted.num_tokens:
        emit(
            {
                "event": "warning",
                "code": "short_evaluation",
                "message": f"The evaluation text has {held_out.num_tokens} tokens; {wanted.num_tokens} were asked for.",
                "param": "recipe.evaluation",
            }
        )
    return held_out
