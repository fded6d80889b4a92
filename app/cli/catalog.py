"""`attar recipes` and `attar techniques`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from app.cli.connection import open_client
from app.cli.output import AsJson, Failed, console, plain, print_json


def register(application: typer.Typer) -> None:
    """Add these commands."""
    application.command()(recipes)
    application.command()(techniques)


def recipes(as_json: AsJson = False) -> None:
    """List the preset recipes."""
    with open_client() as client:
        answer = client.recipes()
    if as_json:
        print_json(answer)
        return
    table = Table("name", "stages", "what it does", box=None, pad_edge=False)
    for preset in answer["data"]:
        stages = " + ".join(stage["technique"] for stage in preset["recipe"]["stages"])
        table.add_row(plain(preset["name"]), plain(stages), plain(preset["description"]))
    console.print(table)


def techniques(
    name: Annotated[str | None, typer.Argument(help="Show this one alone.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List every technique with its options."""
    with open_client() as client:
        answer = client.techniques()
    if name is not None:
        names = [technique["name"] for technique in answer["data"]]
        if name not in names:
            hint = f"One of: {', '.join(names)}."
            raise Failed(f"there is no technique {plain(name)!r}", code="unknown_technique", exit_code=2, hint=hint)
        answer["data"] = [technique for technique in answer["data"] if technique["name"] == name]
    if as_json:
        print_json(answer)
        return
    for technique in answer["data"]:
        console.print(f"{plain(technique['name'])} ({plain(technique['kind'])})", style="bold")
        console.print(f"  {plain(technique['summary'])}", soft_wrap=True)
        table = Table("option", "values", "default", "", box=None, pad_edge=False, padding=(0, 1, 0, 2))
        schema = technique["options"]
        for name, option in schema["properties"].items():
            if name != "technique":
                default = "required" if name in schema.get("required", ()) else plain(_value(option.get("default")))
                table.add_row(name, plain(_values(option)), default, plain(option.get("description", "")))
        console.print(table)
        console.print()


def _values(option: Mapping[str, Any]) -> str:
    """What a JSON Schema allows, in a few words."""
    if "enum" in option:
        return ", ".join(_value(value) for value in option["enum"])
    if "const" in option:
        return _value(option["const"])
    if "anyOf" in option:
        return " or ".join(_values(part) for part in option["anyOf"])
    lower = option.get("minimum", option.get("exclusiveMinimum"))
    upper = option.get("maximum", option.get("exclusiveMaximum"))
    bounds = {
        (True, True): f" {lower} to {upper}",
        (True, False): f" from {lower}",
        (False, True): f" up to {upper}",
        (False, False): "",
    }[lower is not None, upper is not None]
    return f"{option.get('type', 'value')}{bounds}"


def _value(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
