"""Texts as tokens: one long row for a model that goes on, sequences of their own for one that reads whole texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.errors import UserError
from workers.sources.tokenizer_file import tokenizer_failures

DOCUMENT_SEPARATOR = "\n\n"
FEWEST_TOKENS = 8
# Tokens that one pass takes through a block at a time: enough for large products, few enough to stay in memory.
TOKENS_PER_PASS = 4096


def read_documents(path: Path) -> Iterator[str]:
    """The texts that fetch left in a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def check_masks(tokenizer: Any) -> None:
    """Raise UserError ``invalid_tokenizer`` for a tokenizer without a token that stands for a masked one."""
    if tokenizer.mask_token_id is None:
        raise UserError(
            "invalid_tokenizer",
            "The tokenizer has no mask token, which a model with a masked-LM head is measured by.",
            param="model.id",
            hint="Add mask_token to tokenizer_config.json, as the tokenizer's own save_pretrained does.",
        )


def read_labels(path: Path) -> list[int] | None:
    """The classes of those texts; None where they have none."""
    with path.open(encoding="utf-8") as lines:
        found = [json.loads(line).get("label") for line in lines]
    return None if None in found else found


def tokenize(tokenizer: Any, documents: Iterable[str], *, param: str) -> Tensor:
    """All documents as one row of token ids (int64), separated by blank lines as papers do.

    Raises:
        UserError: ``empty_dataset`` if that is fewer than eight tokens.
    """
    with tokenizer_failures("invalid_tokenizer", "The tokenizer failed on the text"):
        ids = tokenizer(DOCUMENT_SEPARATOR.join(documents), return_attention_mask=False, verbose=False)["input_ids"]
    _check_length(len(ids), param)
    return torch.tensor(ids, dtype=torch.int64)


def sequences(
    tokenizer: Any,
    documents: Sequence[str],
    max_seq_length: int,
    *,
    param: str,
    cuts: bool,
    fewest_tokens: int = FEWEST_TOKENS,
) -> list[Tensor]:
    """Each document with the special tokens that the model reads around it, as rows of token ids (int64).

    A longer one than ``max_seq_length`` tokens, those included, becomes several rows if ``cuts``, else loses its end.

    Raises:
        UserError: ``empty_dataset`` if all have fewer than ``fewest_tokens`` together; ``invalid_tokenizer`` for one
            that cannot cut.
    """
    with tokenizer_failures("invalid_tokenizer", "The tokenizer failed on the text"):
        encoded = tokenizer(
            list(documents),
            truncation=True,
            max_length=max_seq_length,
            return_overflowing_tokens=cuts,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
    found = [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]
    _check_length(sum(ids.numel() for ids in found), param, fewest_tokens)
    return found


def of_one_length(found: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Sequences gathered by length, shortest first: their numbers, and sequences × tokens. Nothing has to be padded."""
    numbers: dict[int, list[int]] = {}
    for number, ids in enumerate(found):
        numbers.setdefault(ids.numel(), []).append(number)
    return [(chosen, torch.stack([found[number] for number in chosen])) for _, chosen in sorted(numbers.items())]


def chosen_sequences(found: Sequence[Tensor], num_samples: int, seed: int) -> list[Tensor]:
    """At most ``num_samples`` of the sequences, chosen at random by ``seed`` and kept in order."""
    if len(found) <= num_samples:
        return list(found)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(found), generator=generator)[:num_samples].sort().values
    return [found[number] for number in chosen.tolist()]


def part_of(samples: Sequence[Tensor], num_tokens: int) -> list[Tensor]:
    """The first of the samples × tokens of each length, in equal parts: about ``num_tokens`` tokens together."""
    share = num_tokens / sum(each.numel() for each in samples)
    return [each[: max(1, min(len(each), round(share * len(each))))] for each in samples]


def batches(samples: Tensor) -> Sequence[Tensor]:
    """Samples × tokens, as many at a time as one pass takes."""
    return torch.split(samples, max(1, TOKENS_PER_PASS // samples.shape[1]))


def calibration_samples(ids: Tensor, num_samples: int, max_seq_length: int, seed: int) -> Tensor:
    """Samples × tokens: windows of ``ids`` that do not overlap, chosen at random by ``seed`` and kept in order.

    A text shorter than one window gives one short sample, and one too short for all gives as many as it has.
    """
    length = min(max_seq_length, ids.numel())
    windows = ids[: ids.numel() // length * length].view(-1, length)
    if windows.shape[0] <= num_samples:
        return windows
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(windows.shape[0], generator=generator)[:num_samples]
    return windows[chosen.sort().values]


def _check_length(num_tokens: int, param: str, fewest_tokens: int = FEWEST_TOKENS) -> None:
    if num_tokens < fewest_tokens:
        raise UserError(
            "empty_dataset",
            f"The text has {num_tokens} tokens; at least {fewest_tokens} are needed.",
            param=param,
            hint="Give longer texts.",
        )
