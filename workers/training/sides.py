"""The training text in two: what is trained on, and what is kept to measure the loss on.

Which is which hangs on the text alone, and not on a stage's samples: what one stage has trained on, no other measures
its loss on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from workers.training.seeds import seed_of

# Longer texts of no class are cut at white space, so that a text of one document has two sides too.
_CHARACTERS_A_PIECE = 2_000


class Sides:
    """The texts that fetch left in a JSON Lines file, and their classes."""

    def __init__(self, path: Path, fraction: float, seed: int) -> None:
        """Hold out the ``fraction`` of the different pieces of text that comes first by a hash with ``seed``."""
        self._path = path
        self._seed = seed
        hashes = np.unique(np.fromiter((self._hash(text) for text, _ in self._read()), dtype=np.uint64))
        count = max(1, round(fraction * len(hashes))) if len(hashes) > 1 else 0
        self._limit = int(hashes[count - 1]) if count else -1

    def __call__(self, held_out: bool) -> Iterator[tuple[str, int | None]]:
        """The texts of one side with their classes, in order."""
        return ((text, label) for text, label in self._read() if (self._hash(text) <= self._limit) == held_out)

    def _hash(self, text: str) -> int:
        return seed_of(self._seed, " ".join(text.split()).lower())

    def _read(self) -> Iterator[tuple[str, int | None]]:
        with self._path.open(encoding="utf-8") as lines:
            for line in lines:
                told = json.loads(line)
                label = told.get("label")
                for piece in [told["text"]] if label is not None else _cut(told["text"]):
                    yield piece, label


def _cut(text: str) -> Iterator[str]:
    """The text in pieces that end where a line or a word does."""
    begin = 0
    while len(text) - begin > _CHARACTERS_A_PIECE:
        end = begin + _CHARACTERS_A_PIECE
        found = max(text.rfind("\n", begin, end), 0) or max(text.rfind(" ", begin, end), 0)
        end = found if found > begin else end
        yield text[begin:end]
        begin = end
    if text[begin:].strip():
        yield text[begin:]
