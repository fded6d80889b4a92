"""Submissions with a sliding window: which models preflight takes, and which it refuses by the field that is wrong."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.settings import Settings
from tests.models import write_tiny_model

WINDOW = {"technique": "sliding_window", "window": 64}
CUT = {"technique": "depth_pruning", "num_blocks": 1, "keep_first": 0}
DECODER: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", DECODER),
    "biased": ("llama", {**DECODER, "attention_bias": True}),
    "qwen3": ("qwen3", {**DECODER, "head_dim": 32}),
    "mixed": (
        "qwen2", {**DECODER, "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1},
    ),
    "gemma": ("gemma3_text", {**DECODER, "head_dim": 16, "sliding_window": 128}),
    "gpt2": ("gpt2", {}),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _roots(settings: Settings) -> None:
    """Models in the model root; config.json of one says of its blocks what is no list."""
    for name, (model_type, config) in MODELS.items():
        write_tiny_model(settings.model_roots[0] / f"window-{name}", model_type, **config)
    write_tiny_model(settings.model_roots[0] / "window-odd", *MODELS["mixed"][:1], **MODELS["mixed"][1])
    path = settings.model_roots[0] / "window-odd" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": {"0": "full_attention"}}))


def submit(client: TestClient, auth: dict[str, str], model: str, stages: list[dict[str, Any]]) -> Any:
    body = {"model": {"id": f"file:window-{model}"}, "recipe": {"stages": stages}}
    return client.post("/v1/jobs", json=body, headers=auth)


@pytest.mark.parametrize(
    ("model", "stages"),
    [
        ("llama", [WINDOW]),
        ("llama", [CUT, WINDOW, {**WINDOW, "window": 32}, {"technique": "gptq", "group_size": 32}]),
        ("qwen3", [{**WINDOW, "full_blocks": [0]}]),
        ("mixed", [WINDOW]),
        # The block that stays may be the one without a window.
        ("mixed", [CUT, {**WINDOW, "window": 128, "full_blocks": []}]),
        ("mixed", [CUT, {**WINDOW, "full_blocks": [0]}]),
        ("gemma", [WINDOW]),
    ],
)
def test_models_that_can_have_a_window_are_taken(
    client: TestClient, auth: dict[str, str], model: str, stages: list[dict[str, Any]]
) -> None:
    answer = submit(client, auth, model, stages)
    assert answer.status_code == 202, answer.text
    assert answer.json()["warnings"] == []


@pytest.mark.parametrize(
    ("model", "stages", "code", "param"),
    [
        ("biased", [WINDOW], "unsupported_architecture", "recipe.stages[0].technique"),
        ("gpt2", [WINDOW], "unsupported_architecture", "recipe.stages[0].technique"),
        ("mixed", [{**WINDOW, "full_blocks": [1]}], "invalid_value", "recipe.stages[0].full_blocks"),
        ("mixed", [{**WINDOW, "window": 129}], "invalid_value", "recipe.stages[0].window"),
        ("mixed", [{**WINDOW, "window": 128}], "invalid_value", "recipe.stages[0].window"),
        ("qwen3", [{**WINDOW, "full_blocks": [2]}], "invalid_value", "recipe.stages[0].full_blocks"),
        ("gemma", [{**WINDOW, "full_blocks": [0]}], "invalid_value", "recipe.stages[0].full_blocks"),
        ("gemma", [{**WINDOW, "window": 128}], "invalid_value", "recipe.stages[0].window"),
        ("llama", [WINDOW, {**WINDOW, "window": 65}], "invalid_value", "recipe.stages[1].window"),
        ("odd", [WINDOW], "invalid_config", "model.id"),
    ],
)
def test_what_a_model_cannot_be_given_is_refused(
    client: TestClient, auth: dict[str, str], model: str, stages: list[dict[str, Any]], code: str, param: str
) -> None:
    answer = submit(client, auth, model, stages)
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["param"]) == (422, code, param)
