"""What pydantic found wrong with a request, told in the words of the API: code, path, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core.core_schema import ErrorType

from app.body_schema import BodySchema
from workers.recipe_rules import RecipeError
from workers.techniques import TECHNIQUES
from workers.techniques.options import OptionError

_CODES = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "union_tag_not_found": "missing_field",
    "union_tag_invalid": "unknown_technique",
    "json_invalid": "json_invalid",
}
_KNOWN = frozenset(get_args(ErrorType))
# The kinds that say "this is another type", rather than "this value will not do".
_TYPE_FAULTS = frozenset(kind for kind in _KNOWN if kind.endswith(("_type", "_parsing")))
# The kinds with which a percentage is refused where a fraction is wanted.
_FRACTION_FAULTS = frozenset({"less_than", "less_than_equal", "float_type"})
_IN_JSON = {"True": "true", "False": "false"}
_PERCENTAGE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?) ?%")

MAX_ERRORS = 100
_LONGEST_NAME = 50  # of a field; what is longer resembles none

_Found = tuple[list[str | int], Mapping[str, Any]]  # the path of a value, and pydantic's error


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    code: str
    detail: str
    param: str | None
    hint: str | None = None


def faults_of(errors: Sequence[Mapping[str, Any]], body: object, schema: BodySchema) -> list[Fault]:
    """The faults that ``errors`` (of pydantic, for the request's ``body``) tell of; at least one.

    Beyond the first hundred errors nobody reads on, and comparing all with all would hold a thread for hours.
    """
    found = [(_path(error["loc"], body, error["type"]), error) for error in errors[:MAX_ERRORS]]
    # Where a value may have one of two forms, pydantic complains for both: keep what was meant, that is, drop
    # "another type" where the other form has something better to say of the same value, or of a part of it.
    meant = [
        (path, error)
        for path, error in found
        if error["type"] not in _TYPE_FAULTS or not any(_says_more(other, path) for other in found)
    ]
    faults: list[Fault] = []
    for path, error in _misspelt_first(meant or found):
        fault = _fault(path, error)
        if fault.code == "unknown_field" and (names := schema.fields(path[:-1], body)):
            nearest = get_close_matches(str(path[-1])[:_LONGEST_NAME], names, n=1)
            fault.hint = f"Is {nearest[0]!r} meant? " if nearest else ""
            fault.hint += f"The fields here: {', '.join(names)}."
        if fault.param not in {other.param for other in faults}:
            faults.append(fault)
    return faults


def _misspelt_first(found: Sequence[_Found]) -> list[_Found]:
    """Unknown fields of objects that lack one before all else: most likely that one is meant."""
    lacking = {tuple(path[:-1]) for path, error in found if error["type"] == "missing"}
    return sorted(found, key=lambda each: each[1]["type"] != "extra_forbidden" or tuple(each[0][:-1]) not in lacking)


def _says_more(other: _Found, path: list[str | int]) -> bool:
    other_path, error = other
    is_part = len(other_path) > len(path) and other_path[: len(path)] == path
    return is_part or (other_path == path and error["type"] not in _TYPE_FAULTS)


def _fault(path: list[str | int], error: Mapping[str, Any]) -> Fault:
    kind, context = error["type"], error.get("ctx") or {}
    cause = context.get("error")
    if kind == "json_invalid":
        return Fault(code="json_invalid", detail=str(cause), param=None)
    if isinstance(cause, RecipeError):
        return Fault(code=cause.code, detail=_sentence(str(cause)), param=f"recipe.{cause.param}")
    if isinstance(cause, OptionError):
        return Fault(code=_code(kind), detail=f"{cause}.", param=_written([*path, cause.option]))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = [*path, "technique"]
    detail, hint = error["msg"].removeprefix("Value error, "), context.get("hint")
    if kind == "union_tag_invalid":
        detail = f"There is no technique {context['tag']!r}."
        hint = "One of: " + ", ".join(sorted(TECHNIQUES)) + "."
    elif kind == "union_tag_not_found":
        detail, hint = "A stage names its technique.", "One of: " + ", ".join(sorted(TECHNIQUES)) + "."
    elif kind == "extra_forbidden":
        detail = f"There is no field {path[-1]!r} here."
    elif kind == "string_pattern_mismatch":
        detail = f"{str(error['input'])[:100]!r} does not have the form {context['pattern']}."
    elif kind == "none_required":
        detail = "Input should be null"
    elif kind == "literal_error" and context["expected"] in _IN_JSON:
        detail = f"Input should be {_IN_JSON[context['expected']]}"
    elif kind in _FRACTION_FAULTS:
        hint = _fraction_for(error["input"], context)
    elif kind == "missing":
        detail = f"The field {path[-1]!r} is missing." if path else "The request has no body."
    param = context.get("param") or _written(path) or None
    return Fault(code=_code(kind), detail=_sentence(detail), param=param, hint=hint)


def _fraction_for(value: object, context: Mapping[str, Any]) -> str | None:
    """The hint for a percentage where a number of at most 1 is wanted; None where ``value`` is none."""
    if isinstance(value, str):
        match = _PERCENTAGE.fullmatch(value)
        return f"Give a number: {match[1]} % is {float(match[1]) / 100:g}." if match else None
    is_percentage = context.get("lt") == 1 or context.get("le") == 1
    if not is_percentage or not isinstance(value, int | float) or not 1 < value < 100:
        return None
    return f"Give a fraction: {value / 100:g} for {value:g} %."


def _code(kind: str) -> str:
    if kind in _CODES:
        return _CODES[kind]
    if kind in _TYPE_FAULTS:
        return "invalid_type"
    return "invalid_value" if kind in _KNOWN else kind  # a code of our own, by PydanticCustomError


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def _path(location: Iterable[str | int], body: object, kind: str) -> list[str | int]:
    """The part of a pydantic location that is there in the request: names of union members are left out."""
    place, *steps = location
    if place != "body":  # a query or header parameter: its name is its path
        return list(steps)
    path: list[str | int] = []
    value: Any = body
    for position, step in enumerate(steps):
        is_last = position == len(steps) - 1
        if _has(value, step):
            value = value[step]
        elif not (is_last and kind == "missing"):
            continue
        path.append(step)
    return path


def _has(value: object, step: str | int) -> bool:
    if isinstance(value, Mapping):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)


def _written(path: Iterable[str | int]) -> str:
    """``["recipe", "stages", 0, "scheme"]`` as ``recipe.stages[0].scheme``."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".")
