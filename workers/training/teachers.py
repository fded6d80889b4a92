"""What a student learns from: the teacher as it runs, or its largest logits as they were kept on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from workers.disk import flush, write_json
from workers.engine.device import training_products
from workers.training.losses import LossOfPieces, LossOfRows, divergence, divergence_of_top, logits_of
from workers.training.model import Whole
from workers.training.samples import NOT_SCORED, Batch, Samples, collate

# Samples between two entries of how far the teacher's logits are kept.
_SAMPLES_AN_ENTRY = 256
_FILLED = "filled.json"


class Teacher(Protocol):
    """Gives soft targets."""

    @property
    def states(self) -> dict[int, Tensor]:
        """Hidden states of blocks that were asked for, of the last batch."""

    def reader(self, batch: Batch, scored: Tensor) -> LossOfPieces:
        """The divergence of the student's logits from ours: of those positions of ``batch`` that are ``scored``.

        Or, of a classifier, of each sample.
        """


class OnlineTeacher:
    """A teacher that reads what the student reads."""

    def __init__(self, whole: Whole, temperature: float, *, causal: bool) -> None:
        self._whole = whole
        self._temperature = temperature
        self._causal = causal

    @property
    def states(self) -> dict[int, Tensor]:
        """Hidden states of blocks that were asked for, of the last batch."""
        return self._whole.states

    @torch.no_grad()
    def reader(self, batch: Batch, scored: Tensor) -> LossOfPieces:
        """Runs the teacher now, its head when a piece is asked for."""
        if not self._causal:
            logits = self._whole.class_logits(batch.ids, batch.mask)
            return lambda piece: self._losses(logits[piece])
        hidden = self._whole.hidden(batch.ids)[scored]
        head, cap = self._whole.head, self._whole.logit_cap
        weight, bias = head.get_parameter("weight"), getattr(head, "bias", None)

        def losses(piece: slice) -> LossOfRows:
            with torch.no_grad():
                return self._losses(logits_of(hidden[piece], weight, bias, cap))

        return losses

    def _losses(self, own: Tensor) -> LossOfRows:
        return lambda of_student, rows: divergence(of_student, own[rows], self._temperature)


class CachedTeacher:
    """The largest logits of a teacher, kept on disk: float16 values, int32 tokens, and what all tokens sum to."""

    def __init__(self, folder: Path, samples: Samples, top_k: int, temperature: float, *, causal: bool) -> None:
        """Open what :meth:`fill` has written in ``folder``, or make room for it."""
        self.states: dict[int, Tensor] = {}
        self._samples = samples
        self._temperature = temperature
        self._causal = causal
        self._folder = folder
        num_rows = sum(samples.length(number) for number in range(len(samples))) if causal else len(samples)
        folder.mkdir(exist_ok=True)
        self._values = _mapped(folder / "values.bin", np.float16, (num_rows, top_k))
        self._tokens = _mapped(folder / "tokens.bin", np.int32, (num_rows, top_k))
        self._log_totals = _mapped(folder / "totals.bin", np.float32, (num_rows,))
        ends = np.cumsum([samples.length(number) for number in range(len(samples))]) if causal else None
        self._ends = ends

    @property
    def is_filled(self) -> bool:
        """Whether the teacher has read every sample."""
        return self._num_filled() == len(self._samples)

    @torch.no_grad()
    def fill(
        self, teacher: Whole, padding: int, micro_batch_size: int, precision: str, progress: Callable[[float], None]
    ) -> None:
        """Have the teacher read every sample that it has not read."""
        since = done = self._num_filled()
        entry = self._read_entry()
        entry["chunks"] = [chunk for chunk in entry["chunks"] if chunk[0] <= done]
        while done < len(self._samples):
            numbers = list(range(done, min(done + micro_batch_size, len(self._samples))))
            batch = collate(self._samples, numbers, padding, None, causal=self._causal).to(teacher.skeleton.device)
            with training_products(precision):
                self._keep(teacher, batch)
            done = numbers[-1] + 1
            if done - since >= _SAMPLES_AN_ENTRY or done == len(self._samples):
                for mapped in (self._values, self._tokens, self._log_totals):
                    mapped.flush()
                entry["chunks"].append([done, self._digest_of(since, done), None])
                self._write_entry(entry)
                since = done
            progress(done / len(self._samples))

    def reader(self, batch: Batch, scored: Tensor) -> LossOfPieces:
        """Reads the logits of the batch's samples."""
        found = [self._rows_of(number) for number in batch.numbers]
        chosen = np.concatenate([rows[:-1] if self._causal else rows for rows in found])
        assert not self._causal or int(scored.sum()) == len(chosen)
        device = batch.ids.device
        values = torch.from_numpy(self._values[chosen]).to(device)
        tokens = torch.from_numpy(self._tokens[chosen].astype(np.int64)).to(device)
        totals = torch.from_numpy(self._log_totals[chosen]).to(device)

        def losses(piece: slice) -> LossOfRows:
            own, own_tokens, own_totals = values[piece], tokens[piece], totals[piece]
            return lambda of_student, rows: divergence_of_top(
                of_student, own[rows], own_tokens[rows], own_totals[rows], self._temperature
            )

        return losses

    def note_fingerprint(self, fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
        """Say under what the logits were made that have none yet; under what all were made."""
        entry = self._read_entry()
        entry["chunks"] = [[done, digest, under or fingerprint] for done, digest, under in entry["chunks"]]
        self._write_entry(entry)
        found: list[dict[str, Any]] = []
        for _, _, under in entry["chunks"]:
            if under not in found:
                found.append(under)
        return found

    def _num_filled(self) -> int:
        """How many samples the teacher has read, as far as they are whole."""
        done = 0
        for end, digest, _ in self._read_entry()["chunks"]:
            if self._digest_of(done, end) != digest:
                break
            done = end
        return done

    def _read_entry(self) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = json.loads((self._folder / _FILLED).read_bytes())
            return {"chunks": [[int(done), str(digest), under] for done, digest, under in entry["chunks"]]}
        except (OSError, ValueError, KeyError, TypeError):
            return {"chunks": []}

    def _write_entry(self, entry: dict[str, Any]) -> None:
        temporary = self._folder / ".filled.tmp"
        write_json(temporary, entry)
        temporary.rename(self._folder / _FILLED)
        flush(self._folder)

    def _digest_of(self, begin: int, end: int) -> str:
        """Of the logits of some samples."""
        rows = slice(self._first_row(begin), self._first_row(end))
        digest = xxhash.xxh3_128()
        for mapped in (self._values, self._tokens, self._log_totals):
            digest.update(np.ascontiguousarray(mapped[rows]).tobytes())
        return str(digest.hexdigest())

    def _first_row(self, number: int) -> int:
        if self._ends is None:
            return number
        return int(self._ends[number - 1]) if number else 0

    def _rows_of(self, number: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        if self._ends is None:
            return np.array([number])
        end = int(self._ends[number])
        return np.arange(end - self._samples.length(number), end)

    def _keep(self, teacher: Whole, batch: Batch) -> None:
        if not self._causal:
            self._keep_rows(batch.numbers, teacher.class_logits(batch.ids, batch.mask))
            return
        hidden = teacher.hidden(batch.ids)
        head, cap = teacher.head, teacher.logit_cap
        for index, number in enumerate(batch.numbers):
            length = self._samples.length(number)
            logits = logits_of(hidden[index, :length], head.get_parameter("weight"), getattr(head, "bias", None), cap)
            self._keep_rows(self._rows_of(number), logits)

    def _keep_rows(self, rows: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]], logits: Tensor) -> None:
        top_k = self._values.shape[1]
        values, tokens = logits.topk(top_k, dim=-1)
        # Shifted by the largest, which changes no probability and keeps float16's digits for the differences.
        largest = values[:, :1]
        self._values[rows] = (values - largest).half().cpu().numpy()
        self._tokens[rows] = tokens.int().cpu().numpy()
        self._log_totals[rows] = ((logits - largest) / self._temperature).logsumexp(dim=-1).cpu().numpy()


def _mapped(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A file of so many values, all of whose room is there: a full disk is an error here, and not a signal later."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if not path.exists() or path.stat().st_size != num_bytes:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)


def scored_positions(batch: Batch) -> Tensor:
    """Of a language model's batch: where a next token is asked for (samples × tokens, bool)."""
    assert batch.targets is not None
    return batch.targets != NOT_SCORED
