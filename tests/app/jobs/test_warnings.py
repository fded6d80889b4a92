"""What is said of a job as it is accepted, from its model's facts alone."""

from pathlib import Path

import pytest

from app.jobs.schemas import JobSubmission
from app.jobs.warnings import warnings_of
from tests.models import write_tiny_llama
from workers.sources.inspection import inspect_model

TUNE = {"technique": "fine_tuning", "num_steps": 1, "max_seq_length": 32, "batch_size": 4}
WORDS = {"dataset": {"texts": ["some words to learn"]}}


@pytest.mark.parametrize(("limit_bytes", "codes"), [(None, []), (100_000_000, []), (1_000_000, ["training_memory"])])
def test_a_training_that_takes_more_than_jobs_may_have_is_told(
    limit_bytes: int | None, codes: list[str], tmp_path: Path
) -> None:
    write_tiny_llama(tmp_path / "model")
    facts = inspect_model("file:model", model_roots=[tmp_path])
    recipe = {"stages": [TUNE], "training": WORDS, "evaluation": {"dataset": {"texts": ["others to be measured on"]}}}
    submission = JobSubmission.model_validate({"model": {"id": "file:model"}, "recipe": recipe})
    warnings = warnings_of(submission, facts, limit_bytes)
    assert [warning["code"] for warning in warnings] == codes
    assert all(warning["param"] == "recipe.stages[0]" for warning in warnings)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"training": WORDS, "evaluation": WORDS}, "Training and evaluation"),
        ({"calibration": WORDS, "training": WORDS, "evaluation": WORDS}, "Training and calibration and evaluation"),
        ({"training": WORDS, "evaluation": {**WORDS, "allow_overlap": True}}, None),
        ({"training": {"dataset": "builtin:python-docs"}}, None),
    ],
)
def test_a_text_that_is_divided_is_told_with_those_who_read_it(
    parts: dict[str, object], message: str | None, tmp_path: Path
) -> None:
    write_tiny_llama(tmp_path / "model")
    facts = inspect_model("file:model", model_roots=[tmp_path])
    recipe = {"stages": [TUNE, {"technique": "gptq"}], **parts}
    submission = JobSubmission.model_validate({"model": {"id": "file:model"}, "recipe": recipe})
    told = [warning["message"] for warning in warnings_of(submission, facts) if warning["code"] == "text_divided"]
    assert [each.partition(" name ")[0] for each in told] == ([message] if message else [])
