"""What the owner of a job is told as it is submitted, beside that it is accepted."""

from __future__ import annotations

from typing import Any

from app.jobs.schemas import JobSubmission
from workers.architectures import architecture_of
from workers.recipe_parts import Evaluation
from workers.sources.division import is_one_source
from workers.sources.facts import ModelFacts
from workers.sources.labels import has_labels, labels_of
from workers.techniques import SparsityOptions
from workers.training_memory import training_memory


def warnings_of(
    submission: JobSubmission, facts: ModelFacts, memory_limit_bytes: int | None = None
) -> list[dict[str, Any]]:
    """What the submission says that will have no effect, or another than it may seem.

    Workers of the same settings have ``memory_limit_bytes`` for a job; others may have more.
    """
    warnings = _warnings_of_task(submission, facts)
    quantization = submission.recipe.quantization
    if quantization is not None and not submission.recipe.stores_codes and submission.recipe.cast is None:
        warnings.append(
            {
                "code": "stored_in_full",
                "message": f"The {quantization.scheme} values are stored at the model's own width: the result is no "
                "smaller on disk. The report states their packed size.",
                "param": "recipe.output.format",
            }
        )
    is_pruned = any(isinstance(stage, SparsityOptions) for stage in submission.recipe.stages)
    if quantization is None and is_pruned and submission.recipe.output.format == "safetensors":
        warnings.append(
            {
                "code": "stored_in_full",
                "message": "Zeros are stored like all other values: the result is no smaller on disk. sparse-bitmask "
                "stores a bit for every weight, and the values that are left.",
                "param": "recipe.output.format",
            }
        )
    texts, evaluation = submission.recipe.texts_read, submission.recipe.evaluation
    readers = [name for name, text in texts.items() if is_one_source(text, evaluation)]
    if readers and not evaluation.is_general and not evaluation.allow_overlap:
        warnings.append(
            {
                "code": "text_divided",
                "message": f"{' and '.join(readers).capitalize()} and evaluation name one text: every third document "
                "of it (of fewer than three, the last third) is kept for evaluation alone.",
                "param": "recipe.evaluation.dataset",
            }
        )
    apart = submission.recipe.evaluation_apart
    if apart is not None and not apart.is_general and architecture_of(facts.config).task == "causal":
        warnings.append(
            {
                "code": "text_held_out",
                "message": "The evaluation text is not yours: of your own, every tenth document (of fewer than ten, "
                f"the last tenth of each), until there are about {apart.num_tokens:,} tokens, is kept to measure "
                "quality on it too. Nothing is kept with recipe.evaluation.allow_overlap.",
                "param": "recipe.evaluation.dataset",
            }
        )
    warnings += _warnings_of_memory(submission, facts, memory_limit_bytes)
    if submission.recipe.training is not None and not submission.recipe.reads_training_text:
        warnings.append(
            {
                "code": "training_not_applicable",
                "message": "No stage of the recipe trains on it: the training data is not used.",
                "param": "recipe.training",
            }
        )
    return warnings


def _warnings_of_task(submission: JobSubmission, facts: ModelFacts) -> list[dict[str, Any]]:
    """What a model of this task does not do, or is not measured by."""
    task, evaluation = architecture_of(facts.config).task, submission.recipe.evaluation
    has_accuracy = labels_of(evaluation, facts.config) is not None
    said = []
    if submission.constraints.min_accuracy is not None and not has_accuracy:
        reason = "its data has no labels" if task == "classification" else "the model is no classifier"
        message = f"The evaluation measures no accuracy, because {reason}: min_accuracy is not checked."
        said.append(("constraint_not_applicable", message, "constraints.min_accuracy"))
    if submission.constraints.max_perplexity_ratio is not None and task == "classification":
        message = "A classifier has no perplexity: max_perplexity_ratio is not checked."
        said.append(("constraint_not_applicable", message, "constraints.max_perplexity_ratio"))
    if has_labels(evaluation) and not has_accuracy:
        field = "label_field" if evaluation.label_field is not None else "dataset.labels"
        message = "The model is no classifier: the labels of the evaluation text are not used."
        said.append(("labels_not_applicable", message, f"recipe.evaluation.{field}"))
    if task != "causal" and evaluation.prompt != Evaluation().prompt:
        message = "An encoder does not go on with a prompt: it is not used."
        said.append(("prompt_not_applicable", message, "recipe.evaluation.prompt"))
    return [{"code": code, "message": message, "param": param} for code, message, param in said]


def _warnings_of_memory(submission: JobSubmission, facts: ModelFacts, limit_bytes: int | None) -> list[dict[str, Any]]:
    """Of stages that train and take more than jobs may have here."""
    if limit_bytes is None:
        return []
    return [
        {
            "code": "training_memory",
            "message": f"Training takes about {each.num_bytes:,} bytes of memory, at least "
            f"{each.num_processes * each.state_bytes:,} of them for weights, gradients and the optimizer's state, and "
            f"jobs may take {limit_bytes:,} here (ATTAR_MEMORY_LIMIT_BYTES).",
            "param": each.param,
        }
        for each in training_memory(submission.recipe, facts)
        if each.num_bytes > limit_bytes
    ]
