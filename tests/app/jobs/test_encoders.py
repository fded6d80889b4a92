"""Submissions of encoders: what preflight takes, warns of, and refuses by the field that is wrong."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.settings import Settings
from tests.app.jobs.refusals import GPTQ
from tests.models import write_tiny_model

NAMES: dict[str, Any] = {"id2label": {0: "ham", 1: "spam"}, "label2id": {"ham": 0, "spam": 1}}


@pytest.fixture(scope="module")
def roots(settings: Settings) -> Path:
    """The model root, with a classifier, a masked LM and files of texts."""
    root = settings.model_roots[0]
    write_tiny_model(root / "classes", "bert", task="classification", intermediate_size=128, **NAMES)
    write_tiny_model(root / "masked", "roberta", task="masked", intermediate_size=128)
    (root / "rows.csv").write_text("text,kind,odd\nsome words,ham,ham\nand more,spam,eggs\n")
    (root / "odd.csv").write_text("text,kind\nsome words,eggs\n")
    (root / "plain.txt").write_text("some words\n")
    return root


def submit(
    client: TestClient, auth: dict[str, str], model: str, evaluation: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    body = {
        "model": {"id": f"file:{model}"},
        "recipe": {"stages": [GPTQ], "evaluation": evaluation},
        **changes,
    }
    answer = client.post("/v1/jobs", json=body, headers=auth)
    return {"status": answer.status_code, **answer.json()} if answer.status_code != 202 else answer.json()


@pytest.mark.usefixtures("roots")
@pytest.mark.parametrize(
    "evaluation",
    [
        {"dataset": "file:rows.csv", "label_field": "kind"},
        {"dataset": {"texts": ["some words", "and more"], "labels": ["ham", 1]}},
        {"dataset": {"texts": ["some words", "and more"], "labels": ["0", "1"]}, "label_field": "label"},
    ],
)
def test_a_labelled_classifier_may_be_held_to_an_accuracy(
    client: TestClient, auth: dict[str, str], evaluation: dict[str, Any]
) -> None:
    job = submit(client, auth, "classes", evaluation, constraints={"min_accuracy": 0.9})
    assert job["warnings"] == []


@pytest.mark.usefixtures("roots")
@pytest.mark.parametrize(
    ("evaluation", "code", "param"),
    [
        ({"dataset": "file:rows.csv", "label_field": "class"}, "label_field_missing", "recipe.evaluation.label_field"),
        ({"dataset": "file:odd.csv", "label_field": "kind"}, "unknown_label", "recipe.evaluation.label_field"),
        ({"dataset": "file:plain.txt", "label_field": "kind"}, "label_field_missing", "recipe.evaluation.label_field"),
        ({"label_field": "kind"}, "label_field_missing", "recipe.evaluation.label_field"),
        (
            {"dataset": {"texts": ["one", "two"], "labels": ["ham", "eggs"]}},
            "unknown_label",
            "recipe.evaluation.dataset.labels",
        ),
        ({"dataset": {"texts": ["one", "two"], "labels": [0, 2]}}, "unknown_label", "recipe.evaluation.dataset.labels"),
        ({"dataset": {"texts": ["one"], "labels": ["9" * 5000]}}, "unknown_label", "recipe.evaluation.dataset.labels"),
        ({"dataset": {"texts": ["one"]}, "label_field": "kind"}, "invalid_value", "recipe.evaluation.label_field"),
    ],
)
def test_labels_that_name_no_class_are_refused(
    client: TestClient, auth: dict[str, str], evaluation: dict[str, Any], code: str, param: str
) -> None:
    problem = submit(client, auth, "classes", evaluation)
    assert (problem["status"], problem["code"], problem["param"]) == (422, code, param)
    assert problem["hint"] or "labels" in problem["detail"]


@pytest.mark.usefixtures("roots")
@pytest.mark.parametrize(
    ("model", "evaluation", "constraints", "params"),
    [
        (
            "classes",
            {"prompt": "Once"},
            {"min_accuracy": 0.9, "max_perplexity_ratio": 1.1},
            ["constraints.min_accuracy", "constraints.max_perplexity_ratio", "recipe.evaluation.prompt"],
        ),
        ("masked", {"dataset": "file:rows.csv", "label_field": "kind"}, {}, ["recipe.evaluation.label_field"]),
        ("masked", {"dataset": {"texts": ["a", "b"], "labels": [0, 1]}}, {}, ["recipe.evaluation.dataset.labels"]),
        ("masked", {}, {"max_perplexity_ratio": 1.1}, []),
    ],
)
def test_what_a_task_is_not_measured_by_is_a_warning(
    client: TestClient,
    auth: dict[str, str],
    model: str,
    evaluation: dict[str, Any],
    constraints: dict[str, float],
    params: list[str],
) -> None:
    job = submit(client, auth, model, evaluation, constraints=constraints)
    assert [warning["param"] for warning in job["warnings"]] == params
