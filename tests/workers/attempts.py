"""The processes of an attempt, run in this one: fetch, compress and certify on a work folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.certify import certify
from workers.fetch import fetch
from workers.pipeline import compress

# Sentences that a tiny tokenizer knows, enough for some thousand tokens.
TEXTS = [
    f"Sentence {number}: large language models are made smaller by pruning and quantization, number {number * number}."
    for number in range(200)
]


@dataclass
class Attempt:
    """A work folder and what its processes said."""

    work: Path
    request: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def artifact(self) -> Path:
        """The artifact's folder."""
        return self.work / "artifact"

    @property
    def report(self) -> dict[str, Any]:
        """The artifact's report."""
        report: dict[str, Any] = json.loads((self.artifact / "report.json").read_text())
        return report


def fetched(work: Path, model: Path, recipe: dict[str, Any], **request: Any) -> Attempt:
    """An attempt at ``recipe`` whose model and texts are in its folder; small texts where the recipe names none."""
    recipe = {
        "calibration": {"dataset": {"texts": TEXTS[:150]}, "num_samples": 16, "max_seq_length": 64},
        "evaluation": {"dataset": {"texts": TEXTS[150:]}, "num_tokens": 512, "max_seq_length": 128},
        **recipe,
    }
    attempt = Attempt(
        work,
        {
            "job_id": "job_test",
            "model": {"id": f"file:{model.name}", "revision": None},
            "model_roots": [str(model.parent)],
            "recipe": recipe,
            "constraints": {},
            **request,
        },
    )
    work.mkdir(parents=True)
    fetch(work, attempt.request, attempt.events.append)
    return attempt


def compressed(work: Path, model: Path, recipe: dict[str, Any], **request: Any) -> Attempt:
    """The same, with its artifact."""
    attempt = fetched(work, model, recipe, **request)
    compress(work, attempt.request, attempt.events.append)
    return attempt


def certified(work: Path, model: Path, recipe: dict[str, Any], **request: Any) -> Attempt:
    """The same, with its artifact proven and measured."""
    attempt = compressed(work, model, recipe, **request)
    attempt.outcome = certify(work, attempt.request, attempt.events.append)
    return attempt
