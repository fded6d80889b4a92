"""What a window costs and saves as contexts grow: memory of the KV cache, and perplexity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.checkpoint import Checkpoint
from workers.evaluation.estimates import Estimate, perplexity
from workers.evaluation.locality import block_windows
from workers.evaluation.pieces import Piece
from workers.evaluation.quality import check_finite
from workers.evaluation.retokenized import PairedWindow, paired_contexts
from workers.formats.opening import Readable
from workers.recipe import Recipe

# Each length costs a reading of the text by both models; so many times the window, all of its effect is to be seen.
MOST_LENGTHS = 6
_FEWEST_LENGTHS = 3
_SHORTEST = 4
# Of what may wait of a text that is read by block, here used inside one: a token has many times as much there.
_PART_OF_WAITING = 16
# Token ids that are read, and how many of them, at their end, are scored.
Context = tuple[Tensor, int]


def context_lengths(window: int, longest: int) -> list[int]:
    """Powers of two from below the window on, in order, none above ``longest`` (tokens, at least 4).

    Where none lies between the two, ``longest`` itself is among them.
    """
    powers = [1 << exponent for exponent in range(longest.bit_length()) if _SHORTEST <= 1 << exponent <= longest]
    below, others = [power for power in powers if power < window], [power for power in powers if power >= window]
    if powers[-1] <= window < longest:
        others.append(longest)
    others = others[: MOST_LENGTHS - 1]
    return below[-max(1, _FEWEST_LENGTHS - len(others)) :] + others


def longest_context(window: int, max_positions: int | None, num_tokens: int) -> int:
    """Tokens of the longest context of a text of ``num_tokens`` that :func:`context_part` reads."""
    return context_lengths(window, min(max_positions or num_tokens, num_tokens))[-1]


def kv_cache_bytes(config: Any, length: int, value_bytes: int) -> int:
    """Bytes of the keys and values of one sequence of ``length`` tokens, by a config of transformers.

    A block with a window keeps no more tokens than that.
    """
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_tokens = sum(length if window is None else min(length, window) for window in block_windows(config))
    return int(2 * num_tokens * num_heads * head_dim * value_bytes)


@dataclass(frozen=True)
class Reading:
    """What both models read of the evaluation text, and whom to tell."""

    work: Path
    recipe: Recipe
    ids: Tensor  # tokens of the original
    pieces: Sequence[Piece] | None  # the text as two tokenizers write it; None where both have one
    progress: Callable[[float], None]


def context_part(
    original: Readable, artifact: Readable, reading: Reading, emit: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The ``context`` part of the report of a recipe that gives its model a window.

    Warns where the text is too short to show what the window costs.

    Raises:
        UserError: ``non_finite_evaluation``.
    """
    window, num_tokens = reading.recipe.window, reading.ids.numel()
    assert window is not None
    if num_tokens <= window:
        message = (
            f"The evaluation text has {num_tokens} tokens, no more than the window of {window}: what the window costs "
            "beyond it is not measured."
        )
        emit({"event": "warning", "code": "short_context", "message": message, "param": "recipe.evaluation.num_tokens"})
    num_bytes = _bytes_of_values(reading.work, original)
    max_positions = original.max_positions
    lengths = context_lengths(window, min(max_positions or num_tokens, num_tokens))
    measured = []
    for number, length in enumerate(lengths):
        quality = _measure(original, artifact, reading, length, number / len(lengths), 1 / len(lengths))
        measured.append({"length": length, **_cache_bytes(original, artifact, length, num_bytes), **quality})
    at_most: dict[str, Any] = {"original_kv_cache_bytes": None, "kv_cache_bytes": None}
    if max_positions is not None:
        at_most = _cache_bytes(original, artifact, max_positions, num_bytes)
    return {"window": window, "max_positions": max_positions, **at_most, "lengths": measured}


def _bytes_of_values(work: Path, original: Readable) -> tuple[int, int]:
    """Bytes of a value of the types that loaders open original and artifact in.

    That is what config.json names, or else the type of what is stored.
    """
    checkpoint = Checkpoint(work / "source" / "model")
    stored = checkpoint.stored_dtype(f"{original.architecture.embedding}.weight")
    made = json.loads((work / "artifact" / "config.json").read_text(encoding="utf-8"))
    named = [config.get("dtype", config.get("torch_dtype")) for config in (checkpoint.config, made)]
    dtypes = [stored if name in (None, "auto") else getattr(torch, name) for name in named]
    return dtypes[0].itemsize, dtypes[1].itemsize


def _cache_bytes(original: Readable, artifact: Readable, length: int, num_bytes: tuple[int, int]) -> dict[str, Any]:
    found = {}
    for name, model, value_bytes in zip(("original_", ""), (original, artifact), num_bytes, strict=True):
        with model.running() as running:
            cache_bytes = kv_cache_bytes(running.config.get_text_config(), length, value_bytes)
        found[f"{name}kv_cache_bytes"] = cache_bytes
    return found


def _measure(
    original: Readable, artifact: Readable, reading: Reading, length: int, begin: float, share: float
) -> dict[str, Any]:
    """Perplexities in contexts of ``length`` tokens, which takes ``share`` of all, from ``begin`` on."""
    limit = reading.recipe.evaluation.max_seq_length
    max_seq_length = min(limit, original.max_positions or limit)
    most_scored = min(length // 2, max(1, max_seq_length // 2))
    windows: list[PairedWindow] = []
    if reading.pieces is None:
        rows = reading.ids[: reading.ids.numel() // length * length].view(-1, length)
        sides = [[(row, most_scored) for row in rows]] * 2
    else:
        windows = paired_contexts(reading.pieces, reading.ids.numel(), length, most_scored)
        sides = [[(each.ids, each.positions.numel()) for each in side]
                 for side in ([each.original for each in windows], [each.artifact for each in windows])]  # fmt: skip
    losses = []
    for part, (model, contexts) in enumerate(zip((original, artifact), sides, strict=True)):

        def said(done: float, part: int = part) -> None:
            reading.progress(begin + share * (part + done) / 2)

        losses.append(_losses(model, contexts, max_seq_length, said))
    if windows:
        losses[1] = [each.shared(found) for each, found in zip(windows, losses[1], strict=True)]
    before, after = map(torch.cat, losses)
    check_finite(before, after)
    estimates = {
        "original_perplexity": perplexity(before),
        "perplexity": perplexity(after),
        # Both models read the same tokens: the error of their ratio comes from the paired differences.
        "perplexity_ratio": perplexity(after - before),
    }
    return {
        "num_windows": len(sides[0]),
        "num_tokens": before.numel(),
        **{name: estimate.value for name, estimate in estimates.items()},
        **{f"{name}_standard_error": _or_none(estimate) for name, estimate in estimates.items()},
    }


def _or_none(estimate: Estimate) -> float | None:
    """Its standard error, if it is known."""
    return None if math.isnan(estimate.standard_error) else estimate.standard_error


@torch.inference_mode()
def _losses(
    model: Readable, contexts: Sequence[Context], max_seq_length: int, progress: Callable[[float], None]
) -> list[Tensor]:
    """−log p (nats, float64) of the tokens at the end of each of the contexts, in order."""
    together = max_seq_length
    if model.waiting is not None:  # nothing waits here, and each passage through the model reads it anew
        together = max(together, min(model.waiting.num_tokens, model.waiting.num_logits) // _PART_OF_WAITING)
    at_a_time = max(1, together // max(ids.numel() for ids, _ in contexts))
    losses: list[Tensor] = []
    with model.running() as running:
        while batch := contexts[len(losses) : len(losses) + at_a_time]:
            # What fills shorter ones up stands behind them, where no token looks.
            ids = nn.utils.rnn.pad_sequence([ids for ids, _ in batch], batch_first=True).to(running.device)
            first = min(each.numel() - num_scored for each, num_scored in batch)
            logits = running(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first + 1).logits
            for (each, num_scored), row in zip(batch, logits, strict=True):
                rows = row[each.numel() - num_scored - first : each.numel() - first].float()
                targets = each[-num_scored:].to(rows.device)
                losses.append(nn.functional.cross_entropy(rows, targets, reduction="none").double().cpu())
            progress(len(losses) / len(contexts))
    return losses
