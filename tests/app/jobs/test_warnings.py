"""What is said of a job as it is accepted, from its model's facts alone."""

from pathlib import Path

import pytest

from app.jobs.schemas import JobSubmission
from app.jobs.warnings import warnings_of
from tests.models import write_tiny_llama
from workers.sources.inspection import inspect_model


@pytest.mark.parametrize(("limit_bytes", "codes"), [(None, []), (100_000_000, []), (1_000_000, ["training_memory"])])
def test_a_training_that_takes_more_than_jobs_may_have_is_told(
    limit_bytes: int | None, codes: list[str], tmp_path: Path
) -> None:
    write_tiny_llama(tmp_path / "model")
    facts = inspect_model("file:model", model_roots=[tmp_path])
    stage = {"technique": "fine_tuning", "num_steps": 1, "max_seq_length": 32, "batch_size": 4}
    dataset = {"dataset": {"texts": ["some words to learn"]}}
    recipe = {"stages": [stage], "training": dataset, "evaluation": dataset}
    submission = JobSubmission.model_validate({"model": {"id": "file:model"}, "recipe": recipe})
    warnings = warnings_of(submission, facts, limit_bytes)
    assert [warning["code"] for warning in warnings] == codes
    assert all(warning["param"] == "recipe.stages[0]" for warning in warnings)
