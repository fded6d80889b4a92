"""The token ids that config.json and generation_config.json name, such as that of the end of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_ENDS = ("_token_id", "_token_ids")
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


def named_ids(settings: Mapping[str, Any]) -> Iterator[int]:
    """Every id that has a name there, however deep: one, or a list of them."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from named_ids(value)
        elif key.endswith(_ENDS):
            yield from (each for each in (value if isinstance(value, list) else [value]) if type(each) is int)


def renumbered(settings: Mapping[str, Any], new_id_of: Mapping[int, int]) -> dict[str, Any]:
    """The settings with new ids. One that names no token stays; lists of what not to write lose tokens that are gone.

    ``new_id_of`` has every id that is there still.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found[key] = renumbered(value, new_id_of)
        elif key.endswith(_ENDS) and isinstance(value, list):
            found[key] = [new_id_of.get(each, each) for each in value]
        elif key.endswith(_ENDS):
            found[key] = new_id_of.get(value, value)
        elif key in _SUPPRESSED and isinstance(value, list):
            found[key] = [new_id_of[each] for each in value if each in new_id_of]
        elif key == "bad_words_ids" and isinstance(value, list):
            found[key] = [[new_id_of[each] for each in word] for word in value if set(word) <= new_id_of.keys()] or None
        elif key == "sequence_bias" and isinstance(value, list):
            left = [(word, bias) for word, bias in value if set(word) <= new_id_of.keys()]
            found[key] = [[[new_id_of[each] for each in word], bias] for word, bias in left] or None
        else:
            found[key] = value
    return found
