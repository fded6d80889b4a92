"""Text that a teacher writes for its student, drawn token by token from what it thinks likely."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from workers.disk import flush, write_json
from workers.techniques.distillation_options import SyntheticText
from workers.training.model import Whole
from workers.training.samples import write_index
from workers.training.seeds import seed_of

_BYTES_A_TOKEN = 4
# Texts that are written at a time: the cache of keys and values grows with them.
_TEXTS_AT_A_TIME = 32


@torch.no_grad()
def write_synthetic(
    teacher: Whole,
    tokenizer: Any,
    options: SyntheticText,
    max_seq_length: int,
    held_out_fraction: float,
    seed: int,
    folder: Path,
    progress: Callable[[float], None],
) -> None:
    """Have the teacher write ``options.num_samples`` texts of ``max_seq_length`` tokens, as samples of ``folder``.

    Each begins as the tokenizer begins a text, or with a token drawn among all. What an earlier attempt wrote is kept.
    """
    entry, path = folder / "written.json", folder / "tokens.bin"
    done, digest = _written(entry, path, max_seq_length * _BYTES_A_TOKEN)
    with path.open("r+b" if done else "wb") as file:
        file.truncate(done * max_seq_length * _BYTES_A_TOKEN)
        file.seek(0, os.SEEK_END)
        while done < options.num_samples:
            count = min(_TEXTS_AT_A_TIME, options.num_samples - done)
            torch.manual_seed(seed_of(seed, done))
            ids = _write(teacher, tokenizer, options, count, max_seq_length)
            tokens = ids.numpy().astype(np.int32).tobytes()
            file.write(tokens)
            file.flush()
            digest.update(tokens)
            flush(path)
            done += count
            temporary = entry.with_name(".written.tmp")
            write_json(temporary, {"num_samples": done, "xxh3": digest.hexdigest()})
            temporary.rename(entry)
            progress(done / options.num_samples)
    # All are drawn alike: the last ones are as good as any.
    num_held_out = max(1, round(held_out_fraction * options.num_samples))
    is_held_out = [number >= options.num_samples - num_held_out for number in range(options.num_samples)]
    entry.unlink()
    write_index(folder, [max_seq_length] * options.num_samples, [], is_held_out)


def _written(entry: Path, tokens: Path, bytes_a_sample: int) -> tuple[int, xxhash.xxh3_128]:
    """How many samples an earlier attempt has left whole, and the digest of their tokens so far."""
    digest = xxhash.xxh3_128()
    try:
        told = json.loads(entry.read_bytes())
        left = int(told["num_samples"]) * bytes_a_sample
        with tokens.open("rb") as file:
            while left and (piece := file.read(min(left, 1 << 24))):
                digest.update(piece)
                left -= len(piece)
        if not left and told["xxh3"] == digest.hexdigest():
            return int(told["num_samples"]), digest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, xxhash.xxh3_128()


def _write(teacher: Whole, tokenizer: Any, options: SyntheticText, count: int, length: int) -> torch.Tensor:
    """Samples × tokens (int64). Sampling goes on where a text would end: the next one begins there."""
    device = teacher.skeleton.device
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    vocabulary_size = teacher.skeleton.module(teacher.skeleton.architecture.embedding).get_parameter("weight").shape[0]
    first = torch.full((count, 1), start) if start is not None else torch.randint(vocabulary_size, (count, 1))
    ids, cache = first.to(device), None
    written = [ids]
    while len(written) < length:
        output = teacher.model(input_ids=ids, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1].float() / options.temperature, output.past_key_values
        if options.top_k is not None and options.top_k < logits.shape[-1]:
            least = logits.topk(options.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        ids = torch.multinomial(logits.softmax(dim=-1), 1)
        written.append(ids)
    return torch.cat(written, dim=1).cpu()
