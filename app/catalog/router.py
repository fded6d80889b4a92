"""``/v1/techniques`` and ``/v1/recipes``."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from app.auth import CurrentPrincipal
from app.catalog.presets import PRESETS
from app.errors import responses
from workers.techniques import TECHNIQUES

router = APIRouter(prefix="/v1", tags=["catalog"], responses=responses(401))


class TechniqueView(BaseModel):
    """What a technique is, and the JSON Schema of a stage that names it."""

    object: Literal["technique"]
    name: str
    kind: str
    summary: str
    statistics: list[str]
    options: dict[str, Any]


class TechniqueList(BaseModel):
    """Every technique."""

    object: Literal["list"]
    data: list[TechniqueView]
    has_more: bool


class PresetView(BaseModel):
    """A recipe that a job may name instead of writing one."""

    object: Literal["recipe"]
    name: str
    description: str
    recipe: dict[str, Any]


class PresetList(BaseModel):
    """Every preset."""

    object: Literal["list"]
    data: list[PresetView]
    has_more: bool


@router.get("/techniques", summary="Every technique with its options")
def list_techniques(_principal: CurrentPrincipal) -> TechniqueList:
    """The techniques that a stage can name; ``options`` is the JSON Schema of such a stage."""
    views = [
        TechniqueView(
            object="technique",
            name=name,
            kind=technique.kind,
            summary=technique.summary,
            statistics=sorted(technique.statistics),
            options=technique.model_json_schema(),
        )
        for name, technique in sorted(TECHNIQUES.items())
    ]
    return TechniqueList(object="list", data=views, has_more=False)


@router.get("/recipes", summary="Preset recipes")
def list_recipes(_principal: CurrentPrincipal) -> PresetList:
    """The presets, each with its recipe spelled out.

    Send the name; or the name as `preset` in a recipe object, beside what is to be other; or the recipe with changes.
    """
    views = [
        PresetView(
            object="recipe",
            name=preset.name,
            description=preset.description,
            recipe=preset.recipe,
        )
        for preset in PRESETS.values()
    ]
    return PresetList(object="list", data=views, has_more=False)
