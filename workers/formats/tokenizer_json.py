"""tokenizer.json with fewer tokens, so that text written with those that are left is written as before.

Why it is, for a word whose old tokens are all kept:

- **BPE.** A word's characters are merged pair by pair, the pair of the lowest rank first, the leftmost among equals.
  No merge crosses the border of a token of the result, so what happened inside one is what happens to its characters
  alone: every symbol that was ever there is on that token's *own* merge path. These paths are kept
  (:meth:`TokenizerJson.closure`), and of the merges, in their order, those whose two parts and whose result are. By
  induction over the steps: the symbols are the same as before, and the pair that was merged can still be; it was the
  lowest of more, so it is the lowest again. Where no old merge was left, there is no new one. With ``ignore_merges`` a
  word that is a token is looked up first: a word that was none is none now.
- **WordPiece.** The longest token that begins at a place is taken. It is still there, and no longer one has come.
- **Unigram.** The path with the highest sum of scores is taken, at a tie the one whose last token begins first. The old
  path is still there with its sum, bit for bit, and no other sum has grown: an unknown character costs as much as
  before, since a token of the lowest score is kept, and one that has become unknown costs more than it did.
- **WordLevel.** A word is looked up.

Normalizer, pre-tokenizer and decoder know no ids and stay as they are.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MODELS = ("BPE", "WordPiece", "Unigram", "WordLevel")


class TokenizerJson:
    """The content of a tokenizer.json, and what of its tokens hangs together."""

    def __init__(self, content: str) -> None:
        """Take in what the tokenizers library has written.

        Raises:
            ValueError: the model is none of those above, or has a token twice.
        """
        self._content: dict[str, Any] = json.loads(content)
        self._model: dict[str, Any] = self._content["model"]
        self.type = str(self._model.get("type"))
        if self.type not in _MODELS:
            raise ValueError(f"its model is {self.type}, not one of {', '.join(_MODELS)}")
        if self.type == "BPE" and self._model.get("dropout"):
            raise ValueError("its merges are dropped at random (dropout)")
        if self.type == "Unigram":
            self._id_of = {piece: index for index, (piece, _) in enumerate(self._model["vocab"])}
            if len(self._id_of) < len(self._model["vocab"]):
                raise ValueError("it has a token twice")
        else:
            self._id_of = dict(self._model["vocab"])
        self._rank = {pair: rank for rank, pair in enumerate(self._merges())}
        self._first_prefix = str(self._model.get("continuing_subword_prefix") or "")
        self._suffix = str(self._model.get("end_of_word_suffix") or "")
        self._added = {token["content"]: int(token["id"]) for token in self._content.get("added_tokens") or []}

    @property
    def ids(self) -> dict[str, int]:
        """Every token, added ones too, and its id."""
        return self._id_of | self._added

    def required(self) -> set[int]:
        """The ids of tokens that any text may need.

        Added ones, the unknown one, those that are put around a text, bytes, and single characters: of these, where all
        bytes are there to write a character with, none.
        """
        found = set(self._added.values()) | self._around()
        unknown = self._model.get("unk_token")
        if unknown in self._id_of:
            found.add(self._id_of[unknown])
        if self.type == "Unigram" and self._model["vocab"]:
            scores = [score for _, score in self._model["vocab"]]
            found.add(scores.index(min(scores)))
            if self._model.get("unk_id") is not None:
                found.add(int(self._model["unk_id"]))
        names_of_bytes = [token for token in self._id_of if _BYTE.fullmatch(token)]
        found |= {self._id_of[token] for token in names_of_bytes}
        if not (self._model.get("byte_fallback") and len(names_of_bytes) >= 256):
            found |= {index for token, index in self._id_of.items() if len(self._bare(token)) == 1}
        return found

    def closure(self, token: str) -> set[int]:
        """The ids of ``token`` and of every token on its own merge path; of no BPE, its own alone."""
        found = {self.ids[token]}
        if self.type != "BPE" or token in self._added or _BYTE.fullmatch(token):
            return found
        symbols = list(self._characters(token))
        while True:
            found |= {self._id_of[symbol] for symbol in symbols if symbol in self._id_of}
            pairs = enumerate(pairwise(symbols))
            ranked = [(self._rank[pair], place) for place, pair in pairs if pair in self._rank]
            if not ranked:
                return found
            _, place = min(ranked)
            symbols[place : place + 2] = [self._merged(symbols[place], symbols[place + 1])]

    def pruned(self, new_id_of: Mapping[int, int]) -> str:
        """The content with the tokens alone whose ids are in ``new_id_of``, under their new ids, in the old order."""
        content = copy.deepcopy(self._content)
        model = content["model"]
        if self.type == "Unigram":
            model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new_id_of]
            if model.get("unk_id") is not None:
                model["unk_id"] = new_id_of[model["unk_id"]]
        else:
            kept = sorted((index, token) for token, index in model["vocab"].items() if index in new_id_of)
            model["vocab"] = {token: new_id_of[index] for index, token in kept}
        if self.type == "BPE":
            model["merges"] = [list(pair) for pair in self._merges() if self._stays(pair, model["vocab"])]
        for token in content.get("added_tokens") or []:
            token["id"] = new_id_of[token["id"]]
        if content.get("padding"):
            content["padding"]["pad_id"] = new_id_of.get(content["padding"]["pad_id"], 0)
        _renumber_around(content.get("post_processor"), lambda index: new_id_of[index])
        return json.dumps(content, ensure_ascii=False)

    def _merges(self) -> Iterator[tuple[str, str]]:
        for merge in self._model.get("merges") or []:
            first, second = merge.split(" ") if isinstance(merge, str) else merge
            yield first, second

    def _merged(self, first: str, second: str) -> str:
        return first + second.removeprefix(self._first_prefix)

    def _stays(self, pair: tuple[str, str], kept: Collection[str]) -> bool:
        return all(symbol in kept for symbol in (*pair, self._merged(*pair)))

    def _characters(self, token: str) -> Iterator[str]:
        """The symbols that a word's part begins as."""
        is_first, bare = not (self._first_prefix and token.startswith(self._first_prefix)), self._bare(token)
        for place, character in enumerate(bare):
            is_last = place == len(bare) - 1 and bool(self._suffix) and token.endswith(self._suffix)
            before = "" if place == 0 and is_first else self._first_prefix
            yield before + character + (self._suffix if is_last else "")

    def _bare(self, token: str) -> str:
        """The token without what marks a word's inside or end."""
        if len(token) > len(self._first_prefix):
            token = token.removeprefix(self._first_prefix)
        return token.removesuffix(self._suffix) if len(token) > len(self._suffix) else token

    def _around(self) -> set[int]:
        """The ids of the tokens that are put around a text."""
        found: set[int] = set()

        def take(index: int) -> int:
            found.add(index)
            return index

        _renumber_around(copy.deepcopy(self._content.get("post_processor")), take)
        return found


def _renumber_around(processor: dict[str, Any] | None, new_id: Callable[[int], int]) -> None:
    """Give the tokens that a post-processor puts around a text their new ids."""
    if processor is None:
        return
    for inner in processor.get("processors", []):
        _renumber_around(inner, new_id)
    if processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new_id(index) for index in token["ids"]]
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for name in ("sep", "cls"):
            processor[name][1] = new_id(processor[name][1])
