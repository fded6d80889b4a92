"""Which fields a request's body may have at a place, as the service's own OpenAPI document says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI


class BodySchema:
    """The JSON Schema of one operation's body."""

    def __init__(self, application: FastAPI, path: str, method: str) -> None:
        """Of ``method`` (such as ``post``) at ``path`` (a template such as ``/v1/jobs/{job_id}``)."""
        document = application.openapi()
        self._named: Mapping[str, Any] = document.get("components", {}).get("schemas", {})
        operation = document["paths"].get(path, {}).get(method.lower(), {})
        content = operation.get("requestBody", {}).get("content", {})
        self._root: Mapping[str, Any] = content.get("application/json", {}).get("schema", {})

    def fields(self, path: Sequence[str | int], body: object) -> list[str]:
        """Names that the object at ``path`` of ``body`` may have; none where any name may be used."""
        places = list(self._forms(self._root, body))
        for step in path:
            body = body[step] if isinstance(body, (Mapping, list)) else None  # type: ignore[index]
            places = [form for place in places for form in self._forms(_below(place, step), body)]
        return sorted({name for place in places for name in place.get("properties", ())})

    def _forms(self, schema: Mapping[str, Any], value: object) -> Iterator[Mapping[str, Any]]:
        """The forms that ``schema`` allows; of forms told apart by a field, the one that ``value`` names."""
        if "$ref" in schema:
            yield from self._forms(self._named.get(schema["$ref"].rpartition("/")[2], {}), value)
            return
        marker = schema.get("discriminator")
        if marker is not None and isinstance(value, Mapping):
            chosen = marker["mapping"].get(value.get(marker["propertyName"]))
            yield from self._forms({"$ref": chosen} if chosen else {}, value)
            return
        yield schema
        for form in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
            yield from self._forms(form, value)


def _below(schema: Mapping[str, Any], step: str | int) -> Mapping[str, Any]:
    below: Mapping[str, Any] = (
        schema.get("items", {}) if isinstance(step, int) else schema.get("properties", {}).get(step, {})
    )
    return below
