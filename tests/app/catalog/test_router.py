"""Techniques with their schemas, and presets that are valid recipes."""

from starlette.testclient import TestClient

from workers.recipe import Recipe
from workers.techniques import TECHNIQUES


def test_every_technique_is_listed_with_a_json_schema(client: TestClient, auth: dict[str, str]) -> None:
    answer = client.get("/v1/techniques", headers=auth).json()
    assert {technique["name"] for technique in answer["data"]} == set(TECHNIQUES)
    for technique in answer["data"]:
        assert technique["summary"]
        options = technique["options"]
        assert options["additionalProperties"] is False
        assert options["properties"]["technique"]["const"] == technique["name"]
        assert all("default" in option for option in options["properties"].values())


def test_every_preset_is_a_resolved_recipe(client: TestClient, auth: dict[str, str]) -> None:
    answer = client.get("/v1/recipes", headers=auth).json()
    assert {"int8", "int4", "int4-fast", "sparse50"} <= {preset["name"] for preset in answer["data"]}
    for preset in answer["data"]:
        assert Recipe.model_validate(preset["recipe"]).model_dump(mode="json") == preset["recipe"]


def test_a_preset_that_promises_no_calibration_needs_none(client: TestClient, auth: dict[str, str]) -> None:
    presets = {preset["name"]: preset for preset in client.get("/v1/recipes", headers=auth).json()["data"]}
    assert not Recipe.model_validate(presets["int4-fast"]["recipe"]).statistics
    assert Recipe.model_validate(presets["int4"]["recipe"]).statistics


def test_a_preset_is_submitted_by_its_name_or_by_its_recipe(
    client: TestClient, auth: dict[str, str], model_id: str
) -> None:
    for preset in client.get("/v1/recipes", headers=auth).json()["data"]:
        by_name, by_recipe = (
            client.post("/v1/jobs", json={"model": {"id": model_id}, "recipe": recipe}, headers=auth)
            for recipe in (preset["name"], preset["recipe"])
        )
        assert (by_name.status_code, by_recipe.status_code) == (202, 202)
        assert by_name.json()["recipe"] == by_recipe.json()["recipe"] == preset["recipe"]
