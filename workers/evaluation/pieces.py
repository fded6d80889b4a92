"""A text as two tokenizers write it, one the other's with fewer tokens: cut where both have a border.

A *piece* is what lies between two neighbouring places where both tokenizers have a border. Where both write it with
the same tokens, each of these is a piece of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from workers.sources.tokenizer_file import tokenizer_failures


@dataclass(frozen=True)
class Piece:
    """A part of a text, as the original's tokenizer writes it, and as the artifact's does."""

    ids: tuple[list[int], list[int]]
    is_same: bool  # one token on both sides

    @property
    def num_retokenized(self) -> int:
        """Tokens of the original's tokenizer that the other does not write."""
        return 0 if self.is_same else len(self.ids[0])


# What stands before a text, the text itself, and what stands after it: special tokens around.
Framed = tuple[list[Piece], list[Piece], list[Piece]]


@dataclass(frozen=True)
class Pair:
    """The tokenizers of the original and of the artifact, one the other's with fewer tokens."""

    original: Any
    artifact: Any

    @property
    def is_one(self) -> bool:
        """Whether they have the same tokens."""
        return bool(self.original.get_vocab() == self.artifact.get_vocab())

    def new_id_of(self) -> dict[int, int]:
        """The artifact's id of each of the original's tokens that it has."""
        new = self.artifact.get_vocab()
        return {index: new[token] for token, index in self.original.get_vocab().items() if token in new}

    def pieces(self, texts: Sequence[str]) -> Iterator[Framed]:
        """Each text with the special tokens around it."""
        new_id_of = self.new_id_of()
        with tokenizer_failures("invalid_tokenizer", "The tokenizer failed on the text"):
            encoded = [
                tokenizer(list(texts), return_attention_mask=False, verbose=False).encodings
                for tokenizer in (self.original, self.artifact)
            ]
        for before, after in zip(*encoded, strict=True):
            (begin, body, end), (new_begin, new_body, new_end) = map(_parts, (before, after))
            around = [_pieces_of(before.ids[old], after.ids[new], new_id_of, [])
                      for old, new in ((begin, new_begin), (end, new_end))]  # fmt: skip
            borders = _borders(before.offsets[body], after.offsets[new_body])
            yield around[0], _pieces_of(before.ids[body], after.ids[new_body], new_id_of, borders), around[1]


def _parts(encoding: Any) -> tuple[slice, slice, slice]:
    """Where the special tokens before the text are, the text, and those after it."""
    is_special = encoding.special_tokens_mask
    begin = next((place for place, special in enumerate(is_special) if not special), len(is_special))
    end = next((place for place in range(len(is_special), begin, -1) if not is_special[place - 1]), begin)
    return slice(0, begin), slice(begin, end), slice(end, len(is_special))


def _borders(before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where both have a border within the text, as numbers of tokens before it; from each token's characters."""
    old, new = _borders_of(before), _borders_of(after)
    return [(old[place], new[place]) for place in sorted(old.keys() & new.keys())]


def _borders_of(offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """The characters that no token crosses, each with how many tokens end before it: some have no character at all."""
    ends = list(accumulate((end for _, end in offsets), max))
    begins = list(accumulate((begin for begin, _ in reversed(offsets)), min))[::-1]
    found: dict[int, int] = {}
    for number in range(1, len(offsets)):
        if ends[number - 1] <= begins[number]:
            found.setdefault(ends[number - 1], number)
    return found


def _pieces_of(
    before: Sequence[int], after: Sequence[int], new_id_of: Mapping[int, int], borders: Iterable[tuple[int, int]]
) -> list[Piece]:
    """What lies between the borders. A piece has tokens on both sides."""
    ends = [(0, 0), *borders]
    while len(ends) > 1 and (ends[-1][0] >= len(before) or ends[-1][1] >= len(after)):
        ends.pop()
    found: list[Piece] = []
    for (old, new), (old_end, new_end) in pairwise([*ends, (len(before), len(after))]):
        ids, others = list(before[old:old_end]), list(after[new:new_end])
        if [new_id_of.get(each) for each in ids] == others:
            found += [Piece(([one], [other]), is_same=True) for one, other in zip(ids, others, strict=True)]
        else:
            found.append(Piece((ids, others), is_same=False))
    return found


def num_retokenized(texts: Iterable[Framed]) -> int:
    """How many tokens of the original's tokenizer the other does not write."""
    return sum(piece.num_retokenized for parts in texts for part in parts for piece in part)
