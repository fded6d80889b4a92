"""The report of an artifact, and what of it a job shows. ``docs/report.md`` tells its readers what each field means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from workers.architectures import Task
from workers.evaluation.speed import Speed
from workers.formats.opening import Readable
from workers.recipe_parts import Evaluation

REPORT_VERSION = 1
# What is estimated, each with its standard error; null where a task or its data has no such thing.
_ESTIMATES = (
    "original_perplexity", "perplexity", "perplexity_ratio", "kl_divergence", "top1_agreement",
    "original_accuracy", "accuracy", "accuracy_difference",
    "original_macro_f1", "macro_f1", "macro_f1_difference",
)  # fmt: skip


def speed_part(opened: Mapping[str, Readable], speeds: Mapping[str, Speed]) -> dict[str, Any]:
    """The ``speed`` part: how long each model took to open, to begin and to write; null where it was not measured."""
    return {
        name: {
            "load_seconds": model.load_seconds,
            "first_token_seconds": speeds[name].first_token_seconds if name in speeds else None,
            "tokens_per_second": speeds[name].tokens_per_second if name in speeds else None,
        }
        for name, model in opened.items()
    }


def quality_part(measured: Mapping[str, Any], text: Evaluation) -> dict[str, Any]:
    """The ``quality`` part: what was measured on ``text``, and null for what was not, as for an error not known."""
    names = [name for estimate in _ESTIMATES for name in (estimate, f"{estimate}_standard_error")]
    known = {
        name: None if name.endswith("_standard_error") and math.isnan(value) else value
        for name, value in measured.items()
    }
    return {"text": "general" if text.is_general else "task", **dict.fromkeys(names), **known}


def check_constraints(
    constraints: Mapping[str, Any], quality: Mapping[str, Any], size: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Each constraint with what was measured: ``met``, ``violated``, or ``not_applicable`` where nothing was."""
    measured = {
        "max_perplexity_ratio": (quality["perplexity_ratio"], 1),
        "max_size_bytes": (size["artifact_bytes"], 1),
        "min_accuracy": (quality["accuracy"], -1),
    }
    checked = []
    for name, limit in constraints.items():
        if limit is None:
            continue
        value, sign = measured[name]
        status = "not_applicable" if value is None else "met" if sign * value <= sign * limit else "violated"
        checked.append({"name": name, "limit": limit, "value": value, "status": status})
    return checked


def report_of(
    request: Mapping[str, Any], revision: str, load_snippet: str, task: Task, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """``report.json``: whose it is, the parts in ``measured``, and how to load what it is about."""
    return {
        "version": REPORT_VERSION,
        "job_id": request["job_id"],
        "model": {"id": request["model"]["id"], "revision": revision},
        "task": task,
        **measured,
        "load_snippet": load_snippet,
    }


def outcome_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """``result``, which a job shows, and ``constraints_violated``."""
    size, quality = report["size"], report["quality"]
    return {
        "result": {
            "size_bytes": size["artifact_bytes"],
            "original_size_bytes": size["original_bytes"],
            "compression_ratio": size["compression_ratio"],
            "perplexity": quality["perplexity"],
            "original_perplexity": quality["original_perplexity"],
            "accuracy": quality["accuracy"],
            "original_accuracy": quality["original_accuracy"],
        },
        "constraints_violated": [
            {key: item[key] for key in ("name", "limit", "value")}
            for item in report["constraints"]
            if item["status"] == "violated"
        ],
    }
