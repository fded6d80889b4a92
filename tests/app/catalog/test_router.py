"""Techniques with their schemas, and presets that are valid recipes."""

import pytest
from starlette.testclient import TestClient

from app.settings import Settings
from tests.models import write_tiny_model
from workers.recipe import Recipe
from workers.recipe_parts import BUILTIN_DATASET, Training
from workers.techniques import TECHNIQUES


def test_every_technique_is_listed_with_a_json_schema(client: TestClient, auth: dict[str, str]) -> None:
    answer = client.get("/v1/techniques", headers=auth).json()
    assert {technique["name"] for technique in answer["data"]} == set(TECHNIQUES)
    for technique in answer["data"]:
        assert technique["summary"]
        options = technique["options"]
        assert options["additionalProperties"] is False
        assert options["properties"]["technique"]["const"] == technique["name"]
        required = options.get("required", [])
        assert all("default" in option or name in required for name, option in options["properties"].items())


def test_every_preset_is_a_resolved_recipe(client: TestClient, auth: dict[str, str]) -> None:
    answer = client.get("/v1/recipes", headers=auth).json()
    assert {"int8", "int4", "int4-fast", "sparse50"} <= {preset["name"] for preset in answer["data"]}
    for preset in answer["data"]:
        recipe = preset["recipe"]
        if any("num_steps" in stage for stage in recipe["stages"]):  # which text it trains on, the user says
            with pytest.raises(ValueError, match="trains"):
                Recipe.model_validate(recipe)
            recipe = {**recipe, "training": Training(dataset=BUILTIN_DATASET).model_dump(mode="json")}
        assert Recipe.model_validate(recipe).model_dump(mode="json") == recipe


def test_a_preset_that_promises_no_calibration_needs_none(client: TestClient, auth: dict[str, str]) -> None:
    presets = {preset["name"]: preset for preset in client.get("/v1/recipes", headers=auth).json()["data"]}
    assert not Recipe.model_validate(presets["int4-fast"]["recipe"]).statistics
    assert Recipe.model_validate(presets["int4"]["recipe"]).statistics


def test_a_preset_is_submitted_by_its_name_or_by_its_recipe(
    client: TestClient, auth: dict[str, str], model_id: str
) -> None:
    for preset in client.get("/v1/recipes", headers=auth).json()["data"]:
        if preset["name"] == "classifier-7x":  # not for this model
            continue
        by_name, by_recipe = (
            client.post("/v1/jobs", json={"model": {"id": model_id}, "recipe": recipe}, headers=auth)
            for recipe in (preset["name"], preset["recipe"])
        )
        assert (by_name.status_code, by_recipe.status_code) == (202, 202)
        assert by_name.json()["recipe"] == by_recipe.json()["recipe"] == preset["recipe"]


def test_a_preset_takes_the_text_that_it_trains_on(
    client: TestClient, auth: dict[str, str], settings: Settings
) -> None:
    write_tiny_model(
        settings.model_roots[0] / "classifier",
        "bert",
        task="classification",
        num_hidden_layers=6,
        hidden_size=128,
        intermediate_size=128,
    )
    body = {"model": {"id": "file:classifier"}, "recipe": "classifier-7x"}
    problem = client.post("/v1/jobs", json=body, headers=auth).json()
    assert (problem["code"], problem["param"]) == ("training_missing", "recipe.training")
    texts = {"dataset": {"texts": ["good", "bad"] * 8, "labels": [0, 1] * 8}}
    changed = {"preset": "classifier-7x", "training": texts, "seed": 3}
    answer = client.post("/v1/jobs", json={**body, "recipe": changed}, headers=auth)
    assert answer.status_code == 202, answer.json()
    recipe = answer.json()["recipe"]
    assert [stage["technique"] for stage in recipe["stages"]] == [
        "depth_pruning",
        "logit_distillation",
        "round_to_nearest",
    ]
    assert (recipe["seed"], recipe["training"]["dataset"]["labels"]) == (3, [0, 1] * 8)
    for wrong in ({"preset": "classifier-8x"}, {"preset": 7}):
        problem = client.post("/v1/jobs", json={**body, "recipe": wrong}, headers=auth).json()
        assert (problem["code"], problem["param"]) == ("unknown_preset", "recipe")
    stages = [{"technique": "magnitude"}]
    problem = client.post("/v1/jobs", json={**body, "recipe": {**changed, "stages": stages}}, headers=auth).json()
    assert (problem["code"], problem["param"]) == ("preset_with_stages", "recipe")
    problem = client.post("/v1/jobs", json={**body, "recipe": {**changed, "stage": []}}, headers=auth).json()
    assert (problem["code"], problem["param"]) == ("unknown_field", "recipe.stage")
