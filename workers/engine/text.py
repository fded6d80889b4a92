"""Texts as windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.errors import UserError
from workers.sources.tokenizer_file import tokenizer_failures

DOCUMENT_SEPARATOR = "\n\n"
FEWEST_TOKENS = 8


def read_documents(path: Path) -> Iterator[str]:
    """The texts that fetch left in a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def tokenize(tokenizer: Any, documents: Iterable[str], *, param: str) -> Tensor:
    """All documents as one row of token ids (int64), separated by blank lines as papers do.

    Raises:
        UserError: ``empty_dataset`` if that is fewer than eight tokens.
    """
    with tokenizer_failures("invalid_tokenizer", "The tokenizer failed on the text"):
        ids = tokenizer(DOCUMENT_SEPARATOR.join(documents), return_attention_mask=False, verbose=False)["input_ids"]
    if len(ids) < FEWEST_TOKENS:
        raise UserError(
            "empty_dataset",
            f"The text has {len(ids)} tokens; at least {FEWEST_TOKENS} are needed.",
            param=param,
            hint="Give longer texts.",
        )
    return torch.tensor(ids, dtype=torch.int64)


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
