"""What can be said against a submission before it is queued, from configs and headers alone."""

from __future__ import annotations

from app.artifacts import service as artifacts
from app.database import Database
from app.errors import of_job_error
from app.jobs.schemas import JobSubmission
from app.jobs.size_limits import check_budget, check_size
from app.settings import Settings
from app.storage import ObjectMissingError, Storage
from workers.architectures import architecture_of
from workers.architectures.compact import compact_of
from workers.errors import JobError, UserError
from workers.recipe import Recipe
from workers.recipe_parts import Evaluation, Training
from workers.shapes import facts_after
from workers.sources.checkpoint import ArtifactFacts
from workers.sources.classifier_head import class_names, makes_classifier
from workers.sources.datasets import MAX_CHECKED_LINES, check_dataset
from workers.sources.facts import ModelFacts
from workers.sources.identifiers import JobId, parse_model_id
from workers.sources.inspection import inspect_model
from workers.sources.labels import labels_of
from workers.techniques import QuantizationOptions, SparsityOptions, placed
from workers.techniques.schemes import group_size_fits
from workers.training_rules import check_training

_OFFERED_SIZES = (32, 64, 96, 128, 192, 256)  # in hints


def check(
    submission: JobSubmission, *, tenant_id: str, settings: Settings, database: Database, storage: Storage
) -> ModelFacts:
    """The facts of the model that the job will start from.

    Takes as long as the hub takes: call it outside any transaction. Raises ServiceError, naming the field.
    """
    try:
        facts = inspect_model(
            submission.model.id,
            submission.model.revision,
            model_roots=settings.model_roots,
            artifact=_artifact_of(submission.model.id, tenant_id, database, storage),
            classes=_classes_of(submission.recipe, settings),
            timeout_seconds=settings.hub_timeout_seconds,
        )
        architecture_of(facts.config)  # which refuses what is not supported, before any stage is asked for its shape
        shaped = facts_after(submission.recipe.stages, facts)
        check_format(submission.recipe, shaped)
        check_group_size(submission.recipe, shaped)
        check_embeddings(submission.recipe, shaped)
        check_budget(submission.recipe, facts)
        check_size(submission, facts)
        check_mask_structure(submission.recipe, shaped)
        check_training(submission.recipe, facts.config)
        _check_datasets(submission.recipe, facts, settings)
    except JobError as error:
        raise of_job_error(error) from error
    return facts


def asks_hub(submission: JobSubmission) -> bool:
    """Whether checking it waits for a hub."""
    recipe = submission.recipe
    parts = (recipe.calibration_text, recipe.training, recipe.evaluation)
    datasets = [part.dataset for part in parts if part is not None]
    return not submission.model.id.startswith(("file:", "job:")) or any(
        isinstance(dataset, str) and dataset.startswith("hub:") for dataset in datasets
    )


def check_group_size(recipe: Recipe, facts: ModelFacts) -> None:
    """Refuse a group size that divides no linear layer; one that divides some falls back in the others.

    Raises UserError ``group_size_fits_no_layer``.
    """
    widths = facts.linear_in_features
    for index, stage in enumerate(recipe.stages):
        if not isinstance(stage, QuantizationOptions):
            continue
        size, only = stage.group_size, stage.facts.group_sizes
        if size is None or any(group_size_fits(width, size) for width in widths):
            continue
        fitting = [size for size in only or _OFFERED_SIZES if any(group_size_fits(width, size) for width in widths)]
        otherwise = "or another scheme" if only else "or null for one scale a channel"
        raise UserError(
            "group_size_fits_no_layer",
            f"Groups of {size} divide no linear layer: their inputs have {_listed(widths)} columns.",
            param=f"recipe.stages[{index}].group_size",
            hint=f"Sizes that fit: {_listed(fitting or ([] if only else widths))}; {otherwise}.",
        )


def check_format(recipe: Recipe, facts: ModelFacts) -> None:
    """Refuse an architecture whose layers the output format cannot hold as codes.

    Raises UserError ``output_format_impossible``.
    """
    architecture = architecture_of(facts.config)
    if recipe.stores_bitmasks and compact_of(facts.config):
        raise UserError(
            "output_format_impossible",
            "The model has factors of low rank or shared blocks, and no loader opens those and bitmasks.",
            param="recipe.output.format",
            hint="Set recipe.output.format to safetensors.",
        )
    if architecture.is_transposed and recipe.output.format == "compressed-tensors":
        raise UserError(
            "output_format_impossible",
            f"compressed-tensors packs linear layers, and those of {architecture.model_type} are convolutions.",
            param="recipe.output.format",
            hint="Set recipe.output.format to safetensors: values at full width, their packed size in the report.",
        )
    if not architecture.opens_packed and recipe.output.packing == "pack-quantized":
        raise UserError(
            "output_format_impossible",
            f"transformers does not open a {architecture.model_type} whose layers are packed codes.",
            param="recipe.output.format",
            hint="Use a scheme that is not packed (NF4, FP8, W8A8); or set recipe.output.format to safetensors: values "
            "at full width, their packed size in the report.",
        )


def check_embeddings(recipe: Recipe, facts: ModelFacts) -> None:
    """Refuse packed embeddings where the group size does not divide every matrix: loaders take one grid for all.

    Raises UserError ``group_size_fits_not_all``.
    """
    stage = recipe.quantization
    if stage is None or not stage.embeddings or not recipe.stores_codes or stage.group_size is None:
        return
    size = stage.group_size
    widths = sorted({*facts.linear_in_features, facts.config[architecture_of(facts.config).size("embedding_size")]})
    if all(group_size_fits(width, size) for width in widths):
        return
    fitting = [size for size in _OFFERED_SIZES if all(group_size_fits(width, size) for width in widths)]
    raise UserError(
        "group_size_fits_not_all",
        f"With embeddings, groups of {size} would have to divide every matrix: they have {_listed(widths)} columns.",
        param=f"recipe.stages[{len(recipe.stages) - 1}].group_size",
        hint=f"Sizes that fit: {_listed(fitting)}; or null for one scale a channel.",
    )


def check_mask_structure(recipe: Recipe, facts: ModelFacts) -> None:
    """Refuse an N:M mask whose M divides no linear layer.

    Raises UserError ``mask_structure_fits_no_layer``.
    """
    for param, stage in placed(recipe.stages):
        pattern = stage.pattern if isinstance(stage, SparsityOptions) else None
        if pattern is not None and not any(width % pattern[1] == 0 for width in facts.linear_in_features):
            raise UserError(
                "mask_structure_fits_no_layer",
                f"{pattern[1]} columns divide no linear layer: their inputs have {_listed(facts.linear_in_features)}.",
                param=f"{param}.mask_structure",
                hint="Use 2:4, or unstructured.",
            )


def _artifact_of(model_id: str, tenant_id: str, database: Database, storage: Storage) -> ArtifactFacts | None:
    """The files of the earlier result that ``job:ID`` names; None for other ids, or where there is none."""
    model = parse_model_id(model_id)
    if not isinstance(model, JobId):
        return None
    with database.transaction() as session:
        artifact = artifacts.find_artifact(session, tenant_id, model.job_id)
    if artifact is None:
        return None
    prefix, files = artifact

    def read_file(path: str, start: int, length: int) -> bytes:
        try:
            return b"".join(storage.open_range(f"{prefix}/{path}", start, length))
        except ObjectMissingError:
            raise UserError(
                "model_not_found",
                f"A file of {model_id} is gone: {path}.",
                param="model.id",
                hint="Run that job again.",
            ) from None

    return ArtifactFacts({file.path: file.size_bytes for file in files}, read_file)


def _classes_of(recipe: Recipe, settings: Settings) -> tuple[str, ...] | None:
    """What an encoder is to tell apart that the recipe makes a classifier of; None where it makes none.

    Text of the hub is read when the job runs: two classes stand for what it holds.
    """
    training = recipe.training
    if not makes_classifier(recipe) or training is None:
        return None
    if isinstance(training.dataset, str) and training.dataset.startswith("hub:"):
        return ("0", "1")
    return class_names(training, settings.model_roots, max_lines=MAX_CHECKED_LINES)


def _check_datasets(recipe: Recipe, facts: ModelFacts, settings: Settings) -> None:
    parts = {"calibration": recipe.calibration_text, "training": recipe.training, "evaluation": recipe.evaluation}
    for name, part in parts.items():
        if part is not None:
            check_dataset(
                part.dataset,
                f"recipe.{name}.dataset",
                settings.model_roots,
                text_field=part.text_field,
                labels=labels_of(part, facts.config) if isinstance(part, Training | Evaluation) else None,
                timeout_seconds=settings.hub_timeout_seconds,
            )


def _listed(numbers: list[int] | tuple[int, ...]) -> str:
    return ", ".join(str(number) for number in numbers) or "no"
