"""Recipes as a user gives them: a file, standard input, or the name of a preset."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from app.cli.output import Failed

_SUFFIXES = (".json", ".yaml", ".yml")


def read_recipe(text: str) -> str | dict[str, Any]:
    """The recipe object of a file (``-`` is standard input), or the preset's name as it is.

    Of an artifact's recipe.json, which is a whole submission, the recipe.
    """
    if text == "-":
        return _parse(sys.stdin.read(), "standard input", is_json=False)
    path = Path(text)
    if path.suffix.lower() not in _SUFFIXES and "/" not in text and not path.is_file():
        return text
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Failed(
            f"cannot read the recipe {text}: {reason}",
            code="wrong_use",
            exit_code=2,
            hint="`attar recipes` lists the presets",
        ) from error
    return _parse(content, text, is_json=path.suffix.lower() == ".json")


def _parse(content: str, name: str, *, is_json: bool) -> dict[str, Any]:
    try:
        recipe = json.loads(content) if is_json else yaml.safe_load(content)
        # What JSON cannot say (dates, infinity, an anchor inside itself) cannot be sent.
        recipe = json.loads(json.dumps(recipe, allow_nan=False))
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise Failed(f"{name} is no recipe: {error}", code="wrong_use", exit_code=2) from error
    if not isinstance(recipe, dict):
        raise Failed(
            f"{name} holds no recipe object",
            code="wrong_use",
            exit_code=2,
            hint='a recipe is an object such as {"stages": [{"technique": "gptq", "scheme": "W4A16"}]}',
        )
    if recipe.keys() == {"model", "recipe"} and isinstance(recipe["recipe"], dict):
        return dict(recipe["recipe"])
    return recipe
