"""The training text as token ids on disk, a sample at a time, and in which order they are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.engine.text import DOCUMENT_SEPARATOR, sequences
from workers.errors import UserError
from workers.sources.tokenizer_file import tokenizer_failures
from workers.techniques.training_options import Augmentation
from workers.training.seeds import seed_of

_TOKENS, _INDEX = "tokens.bin", "index.npz"
_BYTES_A_TOKEN = 4
# Characters that are tokenized at a time.
_CHARACTERS_AT_A_TIME = 1_000_000
_TEXTS_AT_A_TIME = 1_000
# Held-out text beyond this says hardly more, and is read many times.
MOST_HELD_OUT_TOKENS = 65_536
_FEWEST_SAMPLES = 8
NOT_SCORED = -100  # a target that cross entropy leaves out


class Samples:
    """Sequences of token ids in one file, which is mapped and not read, and the class of each where it has one."""

    def __init__(self, folder: Path) -> None:
        self._tokens = np.memmap(folder / _TOKENS, dtype=np.int32, mode="r")
        index = np.load(folder / _INDEX)
        self._is_held_out: np.ndarray[Any, Any] = index["is_held_out"]
        self._ends: np.ndarray[Any, Any] = index["ends"]
        self._labels: np.ndarray[Any, Any] | None = index["labels"] if len(index["labels"]) else None

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def has_labels(self) -> bool:
        """Whether each has a class."""
        return self._labels is not None

    def is_held_out(self, number: int) -> bool:
        """Whether a sample is kept to measure the loss on."""
        return bool(self._is_held_out[number])

    def length(self, number: int) -> int:
        """Of a sample, in tokens."""
        return int(self._ends[number] - (self._ends[number - 1] if number else 0))

    def ids(self, number: int) -> Tensor:
        """Of a sample (int64)."""
        begin = int(self._ends[number - 1]) if number else 0
        return torch.from_numpy(self._tokens[begin : int(self._ends[number])].astype(np.int64))

    def label(self, number: int) -> int:
        """The class of a sample."""
        assert self._labels is not None
        return int(self._labels[number])


def write_windows(
    sides: Callable[[bool], Iterable[tuple[str, int | None]]], tokenizer: Any, max_seq_length: int, folder: Path
) -> None:
    """The text of each side as one row of ids, separated by blank lines, cut into samples of ``max_seq_length`` tokens.

    ``sides`` gives what is trained on, or what is held out. Of a text shorter than a sample, one sample.
    """
    lengths: list[int] = []
    is_held_out: list[bool] = []
    with (folder / _TOKENS).open("wb") as file:
        for side in (False, True):
            begin = file.tell()
            for number, piece in enumerate(_pieces(text for text, _ in sides(side))):
                with tokenizer_failures("invalid_tokenizer", "The tokenizer failed on the training text"):
                    encoded = tokenizer(
                        piece, return_attention_mask=False, add_special_tokens=number == 0, verbose=False
                    )
                file.write(np.asarray(encoded["input_ids"], dtype=np.int32).tobytes())
            num_tokens = (file.tell() - begin) // _BYTES_A_TOKEN
            length = max(1, min(max_seq_length, num_tokens))
            count = num_tokens // length
            lengths += [length] * count
            is_held_out += [side] * count
            file.truncate(begin + count * length * _BYTES_A_TOKEN)
            file.seek(0, os.SEEK_END)
    write_index(folder, lengths, [], is_held_out)


def write_sequences(
    sides: Callable[[bool], Iterable[tuple[str, int | None]]], tokenizer: Any, max_seq_length: int, folder: Path
) -> None:
    """Each text as a sample of its own, with its class; without one, a longer text is cut into several samples."""
    lengths: list[int] = []
    labels: list[int] = []
    is_held_out: list[bool] = []
    with (folder / _TOKENS).open("wb") as file:
        for side in (False, True):
            waiting = iter(sides(side))
            while some := list(islice(waiting, _TEXTS_AT_A_TIME)):
                classes = [label for _, label in some if label is not None]
                found = sequences(
                    tokenizer,
                    [text for text, _ in some],
                    max_seq_length,
                    param="recipe.training.dataset",
                    cuts=not classes,
                    fewest_tokens=0,
                )
                for ids in found:
                    file.write(ids.numpy().astype(np.int32).tobytes())
                    lengths.append(ids.numel())
                labels += classes
                is_held_out += [side] * len(found)
    write_index(folder, lengths, labels, is_held_out)


def write_index(folder: Path, lengths: Sequence[int], labels: Sequence[int], is_held_out: Sequence[bool]) -> None:
    """Say where each sample of the tokens ends, its class, and whether it is kept to measure the loss on."""
    with (folder / _INDEX).open("wb") as file:
        np.savez(
            file,
            ends=np.cumsum(lengths, dtype=np.int64),
            labels=np.asarray(labels, dtype=np.int64),
            is_held_out=np.asarray(is_held_out, dtype=np.bool_),
        )


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces of about so many characters, with what separates them."""
    waiting: list[str] = []
    num_characters = 0
    is_first = True
    for text in texts:
        waiting.append(text)
        num_characters += len(text)
        if num_characters >= _CHARACTERS_AT_A_TIME:
            yield ("" if is_first else DOCUMENT_SEPARATOR) + DOCUMENT_SEPARATOR.join(waiting)
            waiting, num_characters, is_first = [], 0, False
    if waiting:
        yield ("" if is_first else DOCUMENT_SEPARATOR) + DOCUMENT_SEPARATOR.join(waiting)


@dataclass(frozen=True)
class Division:
    """Which samples are trained on, and which are kept to measure the loss on."""

    training: Tensor  # numbers of samples (int64)
    held_out: Tensor


def divide(samples: Samples) -> Division:
    """The samples of both sides; of the held-out ones as many as are worth being read many times.

    Raises:
        UserError: ``too_little_text`` where there is too little of either.
    """
    training = [number for number in range(len(samples)) if not samples.is_held_out(number)]
    held_out: list[int] = []
    num_tokens = 0
    for number in range(len(samples)):
        if not samples.is_held_out(number):
            continue
        num_tokens += samples.length(number)
        if held_out and num_tokens > MOST_HELD_OUT_TOKENS:
            break
        held_out.append(number)
    if len(training) + len(held_out) < _FEWEST_SAMPLES or not training or not held_out:
        raise UserError(
            "too_little_text",
            f"The training text gives {len(training)} samples to train on and {len(held_out)} to measure the loss on; "
            f"at least {_FEWEST_SAMPLES} different ones are needed.",
            param="recipe.training.dataset",
            hint="Give more text, or a smaller max_seq_length.",
        )
    return Division(torch.tensor(training), torch.tensor(held_out))


class Order:
    """In which order samples are read: each once an epoch, by chance; the first epoch may have an order of its own."""

    def __init__(self, numbers: Tensor, seed: int, first_epoch: Tensor | None = None) -> None:
        """``first_epoch`` holds the same ``numbers`` in another order."""
        self._numbers = numbers
        self._seed = seed
        self._first_epoch = first_epoch
        self._epoch: tuple[int, Tensor] | None = None

    def batch(self, step: int, batch_size: int) -> list[int]:
        """The samples of a step, which may span two epochs."""
        return [self._at(position) for position in range(step * batch_size, (step + 1) * batch_size)]

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, self._numbers.numel())
        if self._epoch is None or self._epoch[0] != epoch:
            if epoch == 0 and self._first_epoch is not None:
                order = self._first_epoch
            else:
                generator = torch.Generator().manual_seed(seed_of(self._seed, epoch))
                order = self._numbers[torch.randperm(self._numbers.numel(), generator=generator)]
            self._epoch = (epoch, order)
        return int(self._epoch[1][index])


@dataclass(frozen=True)
class Batch:
    """Samples that are read together, padded at their ends."""

    numbers: list[int]
    ids: Tensor  # samples × tokens
    mask: Tensor  # samples × tokens, 1 where there is a token
    targets: Tensor | None  # of each token the next one, or NOT_SCORED; or the class of each sample

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        targets = None if self.targets is None else self.targets.to(device)
        return Batch(self.numbers, self.ids.to(device), self.mask.to(device), targets)


def collate(
    samples: Samples, numbers: Sequence[int], padding: int, changed: Augmented | None, *, causal: bool
) -> Batch:
    """These samples as one batch; ``changed`` says what chance makes of their tokens."""
    rows, aims = [], []
    for number in numbers:
        aim = samples.ids(number)
        row = aim
        if changed is not None:
            aim, row = changed(aim, number)
        rows.append(row)
        aims.append(aim)
    longest = max(row.numel() for row in rows)
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    following = torch.full((len(rows), longest), NOT_SCORED)
    for index, (row, aim) in enumerate(zip(rows, aims, strict=True)):
        ids[index, : row.numel()] = row
        mask[index, : row.numel()] = 1
        following[index, : aim.numel() - 1] = aim[1:]
    targets: Tensor | None = following
    if not causal:
        targets = torch.tensor([samples.label(number) for number in numbers]) if samples.has_labels else None
    return Batch(list(numbers), ids, mask, targets)


def of_like_length(numbers: Sequence[int], samples: Samples, most: int) -> Iterator[list[int]]:
    """The samples in groups of at most ``most``, shortest first: in none is more than a third of the tokens padding."""
    group: list[int] = []
    for number in sorted(numbers, key=lambda number: (samples.length(number), number)):
        if group and (len(group) == most or samples.length(number) > 1.5 * samples.length(group[0])):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


class Augmented:
    """Leaves out and masks tokens by chance, the same for a sample at a step however often it is asked."""

    def __init__(self, options: Augmentation, mask_token: int, special_tokens: Iterable[int], seed: int) -> None:
        self._options = options
        self._mask_token = mask_token
        self._special_tokens = torch.tensor(sorted(special_tokens), dtype=torch.int64)
        self._seed = seed

    def __call__(self, ids: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """The tokens that are left, and the same with some masked. Special tokens stay, and two tokens at least."""
        generator = torch.Generator().manual_seed(seed_of(self._seed, number))
        chances = torch.rand(2, ids.numel(), generator=generator)
        is_special = torch.isin(ids, self._special_tokens)
        stays = is_special | (chances[0] >= self._options.delete_probability)
        if int(stays.sum()) >= 2:
            ids, chances, is_special = ids[stays], chances[:, stays], is_special[stays]
        masked = (chances[1] < self._options.mask_probability) & ~is_special
        return ids, torch.where(masked, self._mask_token, ids)
