"""Finds the passages that two texts share, however either one is cut, joined, wrapped or capitalised."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from zlib import crc32

# GPT-3 calls 13 words in a row an overlap (Brown et al. 2020, appendix C).
_RUN_WORDS = 13
# Paragraphs too short for such a run count as shared when all of their shorter runs are known.
_SHORT_RUN_WORDS = 5
_MAX_HASHES = 2**22

# A passage ends with its sentence or its line; the white space after it belongs to it.
_END = re.compile(r"[.!?][\"')\]]*\s+|[\u3002\uff01\uff1f]\s*|\n\s*")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
# Scripts that put no space between words: every character counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


class Passages:
    """What some text holds, as hashes: enough to leave it out of another text."""

    def __init__(self) -> None:
        self._units = _Hashes()
        self._runs = _Hashes()
        self._short_runs = _Hashes()

    def add(self, text: str) -> None:
        """Remember the paragraphs, sentences, lines and runs of words of ``text``."""
        words: list[int] = []
        for paragraph in _paragraphs(text):
            self._units.add(_key("".join(paragraph)))
            for passage in paragraph:
                self._units.add(_key(passage))
                words.extend(_words(passage))
        for hashes, num_words in ((self._runs, _RUN_WORDS), (self._short_runs, _SHORT_RUN_WORDS)):
            for run in _runs(words, num_words):
                hashes.add(run)

    def left_out_of(self, text: str) -> str:
        """``text`` without what has been added: paragraphs that are known, and passages within a known run of words."""
        paragraphs = list(_paragraphs(text))
        words: list[int] = []
        ends: list[int] = []
        for paragraph in paragraphs:
            for passage in paragraph:
                words.extend(_words(passage))
                ends.append(len(words))
        covered = self._covered(words)
        kept: list[str] = []
        start, index = 0, 0
        for paragraph in paragraphs:
            first, spans = start, []
            for _ in paragraph:
                spans.append((start, ends[index]))
                start, index = ends[index], index + 1
            if not self._knows(paragraph, words[first:start]):
                kept += [
                    passage for passage, (a, b) in zip(paragraph, spans, strict=True) if covered.find(1, a, b) == -1
                ]
        left = "".join(kept)
        return left if left.strip() else ""

    def _knows(self, paragraph: Sequence[str], words: Sequence[int]) -> bool:
        if _key("".join(paragraph)) in self._units or all(_key(passage) in self._units for passage in paragraph):
            return True
        if not _SHORT_RUN_WORDS <= len(words) < _RUN_WORDS:
            return False
        return all(run in self._short_runs for run in _runs(words, _SHORT_RUN_WORDS))

    def _covered(self, words: Sequence[int]) -> bytearray:
        """One byte a word: 1 within a known run."""
        covered = bytearray(len(words))
        for start, run in enumerate(_runs(words, _RUN_WORDS)):
            if run in self._runs:
                covered[start : start + _RUN_WORDS] = b"\1" * _RUN_WORDS
        return covered


class _Hashes:
    """A set of hashes of bounded size: when full it keeps every second one, chosen by value, and knows of no others.

    Long passages hold many runs, and are still found by the ones that were kept.
    """

    def __init__(self) -> None:
        self._kept: set[int] = set()
        self._one_in = 1

    def add(self, value: int) -> None:
        if value % self._one_in == 0:
            self._kept.add(value)
            if len(self._kept) > _MAX_HASHES:
                self._one_in *= 2
                self._kept = {kept for kept in self._kept if kept % self._one_in == 0}

    def __contains__(self, value: int) -> bool:
        return value in self._kept


def _paragraphs(text: str) -> Iterator[list[str]]:
    """The passages of each paragraph; together they are the text."""
    paragraph: list[str] = []
    start = 0
    for end in _ends(text):
        passage = text[start:end]
        start = end
        if passage.strip() or not paragraph:
            paragraph.append(passage)
        else:
            paragraph[-1] += passage
        if _BLANK_LINE.search(passage):
            yield paragraph
            paragraph = []
    if paragraph:
        yield paragraph


def _ends(text: str) -> Iterable[int]:
    for match in _END.finditer(text):
        yield match.end()
    yield len(text)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(_normal(text).encode(), digest_size=8).digest(), "little")


def _words(text: str) -> list[int]:
    return [crc32(word.encode()) for word in _WORD.findall(_normal(text))]


def _runs(words: Sequence[int], num_words: int) -> Iterator[int]:
    # The hash of a tuple of integers is the same in every process, unlike that of a string.
    return (hash(tuple(words[start : start + num_words])) for start in range(len(words) - num_words + 1))
