"""Which tokens a text needs, the tokenizer that has these alone, and the checkpoint with their rows."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from workers.disk import write_json
from workers.engine.checkpoint import GENERATION_SETTINGS, Checkpoint
from workers.engine.shaping import Shaping
from workers.engine.skeleton import Skeleton
from workers.engine.text import DOCUMENT_SEPARATOR
from workers.errors import UserError
from workers.formats.token_ids import named_ids, renumbered
from workers.formats.tokenizer_json import TokenizerJson
from workers.shapes.vocabulary import config_of_fewer_tokens
from workers.sources.tokenizer_file import TOKENIZER_JSON, tokenizer_failures
from workers.techniques import VocabularyPruning

_DOCUMENTS_AT_A_TIME = 64


def leave_out_tokens(shaping: Shaping, stage: VocabularyPruning) -> tuple[Checkpoint, dict[str, Any]]:
    """The model's checkpoint without the tokens that the text never uses, and what the report says of them.

    Raises:
        UserError: as :func:`config_of_fewer_tokens` says; ``unsupported_tokenizer``, ``invalid_value``,
            ``nothing_changed``, or ``tokenizer_not_reproduced`` where the text is not read as before.
    """
    skeleton, journal = shaping.skeleton, shaping.journal
    checkpoint = skeleton.checkpoint
    config_of_fewer_tokens(stage, shaping.param, checkpoint.config)
    tokenizer = _open(checkpoint.tokenizer_folder)
    tokens = _tokens_of(tokenizer, shaping.param)
    counts = {int(index): count for index, count in journal.once("counts", lambda: _count(shaping, tokenizer)).items()}
    # Ids that config.json is silent on become other numbers too.
    config = {**checkpoint.config, **ids_by_default(skeleton)}
    settings = _generation_settings(checkpoint)
    named = {*named_ids(config), *named_ids(settings)}
    kept = sorted(_Choice(shaping, stage, tokens, named).make(counts))
    num_rows = int(checkpoint.config["vocab_size"])
    rows = torch.tensor([index for index in kept if index < num_rows], dtype=torch.int64)
    if rows.numel() == num_rows:
        raise UserError(
            "nothing_changed",
            f"Every one of the model's {num_rows} tokens stays.",
            param=shaping.param,
            hint="Raise min_count or set num_tokens, give calibration text of the task alone, or leave the stage out.",
        )
    new_id_of = {old: new for new, old in enumerate(kept)}
    config = {**renumbered(config, new_id_of), "vocab_size": rows.numel()}
    _write(shaping.folder, tokenizer, tokens.pruned(new_id_of), config)
    if settings:
        write_json(shaping.folder / GENERATION_SETTINGS, renumbered(settings, new_id_of))
    shaping.progress("tokens.compare", 0, skeleton.num_blocks, 0.5)
    num_retokenized = journal.once("retokenized", lambda: _compare(shaping, tokenizer, new_id_of))
    architecture = skeleton.architecture
    names = [f"{module}.{kind}" for module in architecture.vocabulary_matrices for kind in ("weight", "bias")]
    stored = {architecture.tied_bias, *names} & set(checkpoint.parameters())
    after = checkpoint.with_selection({str(name): {0: rows} for name in stored}, config)
    return after.with_tokenizer(shaping.folder), {
        "vocab_size": rows.numel(),
        "original_vocab_size": num_rows,
        "num_counted_tokens": sum(counts.values()),
        "num_used_tokens": sum(1 for count in counts.values() if count),
        "num_retokenized": num_retokenized,
    }


class _Choice:
    """Which tokens stay."""

    def __init__(
        self, shaping: Shaping, stage: VocabularyPruning, tokens: TokenizerJson, named: Collection[int]
    ) -> None:
        """``named`` are the ids that the model's settings speak of."""
        self._stage = stage
        self._tokens = tokens
        self._param = shaping.param
        self._num_rows = int(shaping.skeleton.checkpoint.config["vocab_size"])
        self._name_of = {index: token for token, index in tokens.ids.items()}
        self._always = self._required(shaping.skeleton, named)

    def make(self, counts: Mapping[int, int]) -> set[int]:
        """The ids of the tokens that stay, if each occurs as often as ``counts`` says, and of rows without a token.

        Raises:
            UserError: ``invalid_value`` for a limit that cannot be kept to.
        """
        stage, kept = self._stage, set(self._always)
        ranked = sorted(self._name_of, key=lambda index: (-counts.get(index, 0), index))
        limit = stage.num_tokens or len(self._name_of) + self._num_rows
        if (least := self._rows_of(kept)) > limit:
            raise self._invalid("num_tokens", f"must be at least {least}: so many tokens stay always")
        num_rows = least
        for index in ranked:
            if counts.get(index, 0) < stage.min_count:
                break
            more = self._tokens.closure(self._name_of[index]) - kept
            if num_rows + self._rows_of(more) <= limit:
                kept |= more
                num_rows += self._rows_of(more)
        self._fill(kept, num_rows, ranked)
        return kept

    def _required(self, skeleton: Skeleton, named: Collection[int]) -> set[int]:
        tokens = self._tokens
        # Tokens beyond the model's rows cost it nothing.
        found = tokens.required() | {index for index in tokens.ids.values() if index >= self._num_rows}
        for number, token in enumerate(self._stage.keep):
            if token not in tokens.ids:
                raise self._invalid(
                    f"keep[{number}]", f"must be a token of the vocabulary, as it spells them, not {token[:100]!r}"
                )
            found |= tokens.closure(token)
        found |= {index for index in named if 0 <= index < self._num_rows}
        if skeleton.architecture.positions_follow_padding:
            # Positions begin after the padding token's id: it has to stay what it is, and so have all before it.
            found |= set(range(int(skeleton.model.config.pad_token_id) + 1))
        return found

    def _fill(self, kept: set[int], num_rows: int, ranked: Collection[int]) -> None:
        """Add the next tokens until their number, now ``num_rows``, is the multiple that is asked for.

        Each comes alone: the shortest that is left out has all of its merge path among those that stay.
        """
        wanted = math.ceil(num_rows / self._stage.multiple_of) * self._stage.multiple_of
        if wanted > self._rows_of(set(self._name_of) | kept):
            raise self._invalid("multiple_of", f"must be smaller: the model has not {wanted} tokens")
        while num_rows < wanted:
            for index in ranked:
                is_next = num_rows < wanted and index not in kept and index < self._num_rows
                if is_next and self._tokens.closure(self._name_of[index]) - kept == {index}:
                    kept.add(index)
                    num_rows += 1

    def _rows_of(self, ids: Collection[int]) -> int:
        """How many of the tokens have a row in the model; some tokenizers have more than that."""
        return sum(index < self._num_rows for index in ids)

    def _invalid(self, option: str, requirement: str) -> UserError:
        return UserError("invalid_value", f"{option} {requirement}.", param=f"{self._param}.{option}")


def _open(folder: Path) -> Any:
    with tokenizer_failures("invalid_tokenizer", "The tokenizer cannot be opened"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _tokens_of(tokenizer: Any, param: str) -> TokenizerJson:
    """The tokenizer as it is in use: what transformers makes of the files, whichever they are."""
    problem = "it is not one of the tokenizers library"
    try:
        if getattr(tokenizer, "backend_tokenizer", None) is not None:
            return TokenizerJson(tokenizer.backend_tokenizer.to_str())
    except ValueError as error:
        problem = str(error)
    raise UserError(
        "unsupported_tokenizer",
        f"vocabulary_pruning cannot leave tokens out of this tokenizer: {problem}.",
        param=f"{param}.technique",
        hint="Leave vocabulary_pruning out, or save the model with a BPE, WordPiece, Unigram or WordLevel tokenizer.",
    )


def ids_by_default(skeleton: Skeleton) -> dict[str, Any]:
    """Ids of tokens that config.json is silent on, and that a model of this type has all the same."""
    config, num_rows = skeleton.checkpoint.config, int(skeleton.checkpoint.config["vocab_size"])
    defaults = {key: value for key, value in skeleton.model.config.to_dict().items() if key.endswith("_token_id")}
    return {
        key: value
        for key, value in defaults.items()
        if key not in config and isinstance(value, int) and 0 <= value < num_rows
    }


def _generation_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What generation_config.json says; nothing where there is none."""
    for folder in (checkpoint.tokenizer_folder, checkpoint.folder):
        if (path := folder / GENERATION_SETTINGS).exists():
            return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def _write(folder: Path, tokenizer: Any, content: str, config: Mapping[str, Any]) -> None:
    """Write the tokenizer with another tokenizer.json."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    (folder / TOKENIZER_JSON).write_text(content, encoding="utf-8")
    # transformers looks there too before it decides how to open a tokenizer.
    write_json(folder / "config.json", config)


def _readings(shaping: Shaping) -> list[Callable[[], Iterator[str]]]:
    """The text, a document at a time, in each way in which it is read.

    Each document alone, as in use. For a model that goes on with a text, also with blank lines around it, as
    calibration and evaluation read documents: tokens that begin a text are often others than those within.
    """
    texts = shaping.texts
    if shaping.skeleton.architecture.task != "causal":
        return [texts.of_task]
    around = DOCUMENT_SEPARATOR
    return [texts.of_task, lambda: (f"{around}{document}{around}" for document in texts.of_task())]


def _count(shaping: Shaping, tokenizer: Any) -> dict[str, int]:
    """How often each id occurs in the text, in the reading in which it is more."""
    counts: Counter[int] = Counter()
    shaping.progress("tokens.count", 0, shaping.skeleton.num_blocks, 0.0)
    for reading in _readings(shaping):
        found: Counter[int] = Counter()
        for encodings in _encoded(tokenizer, reading()):
            for encoding in encodings:
                found.update(encoding.ids)
        counts |= found
    return {str(index): count for index, count in sorted(counts.items())}


def _encoded(tokenizer: Any, documents: Iterable[str]) -> Iterator[list[Any]]:
    left = iter(documents)
    while some := list(islice(left, _DOCUMENTS_AT_A_TIME)):
        with tokenizer_failures("invalid_tokenizer", "The tokenizer failed on the text"):
            yield tokenizer(some, return_attention_mask=False, verbose=False).encodings


def _compare(shaping: Shaping, tokenizer: Any, new_id_of: Mapping[int, int]) -> int:
    """How many tokens of the text, each document alone, are in words that are written otherwise.

    Raises:
        UserError: ``tokenizer_not_reproduced`` where a word that has no token that was left out is among them.
    """
    pruned, counts = _open(shaping.folder), []
    ids = {token: new_id_of[index] for token, index in tokenizer.get_vocab().items() if index in new_id_of}
    if pruned.get_vocab() != ids:
        raise _not_reproduced("opened again, it has other tokens than it was to have", shaping.param)
    for reading in _readings(shaping):
        counts.append(0)
        for before, after in zip(_encoded(tokenizer, reading()), _encoded(pruned, reading()), strict=True):
            for old, new in zip(before, after, strict=True):
                counts[-1] += _num_rewritten(old, new, new_id_of, shaping.param)
    return counts[0]


def _num_rewritten(old: Any, new: Any, new_id_of: Mapping[int, int], param: str) -> int:
    """How many tokens of one encoding are in words with a token that was left out; all others have to be the same."""
    if all(each in new_id_of for each in old.ids):
        if [new_id_of[each] for each in old.ids] != new.ids:
            raise _not_reproduced("a text is not read as before", param)
        return 0
    found: list[dict[int | None, list[int | None]]] = [{}, {}]
    for encoding, words in zip((old, new), found, strict=True):
        ids = [new_id_of.get(each) for each in encoding.ids] if encoding is old else encoding.ids
        for word, each in zip(encoding.word_ids, ids, strict=True):
            words.setdefault(word, []).append(each)
    before, after = found
    if any(None not in ids and after.get(word) != ids for word, ids in before.items()):
        raise _not_reproduced("a word is not read as before", param)
    return sum(len(ids) for ids in before.values() if None in ids)


def _not_reproduced(problem: str, param: str) -> UserError:
    return UserError(
        "tokenizer_not_reproduced",
        f"The tokenizer with fewer tokens is not what it was: {problem}.",
        param=f"{param}.technique",
        hint="Leave vocabulary_pruning out; what is special about this tokenizer is not known.",
    )
