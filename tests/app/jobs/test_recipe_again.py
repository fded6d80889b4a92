"""The recipe.json of an artifact is a submission: posted as it is, it asks for the same again."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.settings import Settings
from tests.workers.attempts import compressed
from workers.fetch import fetch

NEAREST = {"technique": "round_to_nearest", "group_size": 32}


@pytest.mark.parametrize(
    "recipe",
    [
        {"stages": [{"technique": "gptq", "group_size": 32}]},
        {"stages": [{"technique": "awq", "group_size": None, "ignore": ["*.down_proj"]}]},
        {"stages": [{"technique": "mixed_precision", "group_size": 32, "average_bits": 5.0}]},
        {"stages": [{"technique": "smoothquant"}]},
        {"stages": [{"technique": "dynamic_int8"}]},
        {"stages": [{**NEAREST, "scheme": "W3A16"}]},
        {"stages": [{"technique": "round_to_nearest", "scheme": "NF4"}]},
        {"stages": [{"technique": "round_to_nearest", "scheme": "FP8"}]},
        {"stages": [{"technique": "round_to_nearest", "scheme": "FP16"}]},
        {"stages": [{"technique": "magnitude"}], "output": {"format": "sparse-bitmask"}},
        {"stages": [{"technique": "sparsegpt", "sparsity": 0.25}, {**NEAREST, "scheme": "W4A16"}]},
        {"stages": [{"technique": "wanda", "mask_structure": "2:4"}], "evaluation": {}, "seed": 3},
    ],
    ids=lambda recipe: str(recipe["stages"][0]["technique"]),
)
def test_what_an_artifact_was_made_of_can_be_posted_again(
    client: TestClient, auth: dict[str, str], model_id: str, settings: Settings, recipe: dict[str, Any], tmp_path: Path
) -> None:
    model = settings.model_roots[0] / model_id.removeprefix("file:")
    attempt = compressed(tmp_path / "work", model, recipe)
    body = json.loads((attempt.artifact / "recipe.json").read_text())
    answer = client.post("/v1/jobs", json=body, headers=auth)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["model"] == body["model"]
    for name in ("version", "stages", "output", "seed"):
        assert job["recipe"][name] == body["recipe"][name]
    (tmp_path / "again").mkdir()
    fetch(tmp_path / "again", {**attempt.request, **body}, attempt.events.append)
    fetched = json.loads((tmp_path / "again" / "source" / "model.json").read_text())
    assert fetched["revision"] == body["model"]["revision"]
