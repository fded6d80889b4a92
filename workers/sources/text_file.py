"""A file of texts that takes as much as is wanted, and tells what it holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

from workers.sources.datasets import Document

# Enough for any tokenizer: English has 4 to 5 characters a token. More would only cost time.
CHARACTERS_A_TOKEN = 12
_MAX_CHARACTERS = 4 * 10**9


class TextFile:
    """A JSON Lines file of texts that wants ``num_tokens`` tokens' worth of them; None for all there are."""

    def __init__(self, path: Path, num_tokens: int | None) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        wanted = _MAX_CHARACTERS if num_tokens is None else num_tokens * CHARACTERS_A_TOKEN
        self.wanted_characters = min(wanted, _MAX_CHARACTERS)
        self.labels: set[int] = set()
        self._num_characters = 0
        self._num_removed_characters = 0
        self.num_documents = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, document: Document, *, num_removed: int = 0) -> bool:
        """Take ``document``, unless it is blank or there is enough already; False when no more is wanted.

        ``num_removed`` characters of it were left out for being the other side's.
        """
        if self._num_characters < self.wanted_characters:
            self._num_removed_characters += num_removed
            text, label = document
            if text.strip():
                told = {"text": text} if label is None else {"text": text, "label": label}
                line = json.dumps(told, ensure_ascii=False).encode() + b"\n"
                self._file.write(line)
                self._digest.update(line)
                self._num_characters += len(text)
                self.num_documents += 1
                self.labels |= set() if label is None else {label}
        return self._num_characters < self.wanted_characters

    def describe(self) -> dict[str, Any]:
        """Digest and size of what was written."""
        return {
            "sha256": self._digest.hexdigest(),
            "num_documents": self.num_documents,
            "num_characters": self._num_characters,
            "num_removed_characters": self._num_removed_characters,
        }
