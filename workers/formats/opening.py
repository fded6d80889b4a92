"""Opening a checkpoint the way its reader will: with plain transformers, or the loader that lies beside it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from workers.architectures import AUTO_CLASSES, Architecture, architecture_of
from workers.errors import CrashError
from workers.formats import bitsandbytes
from workers.formats.sparse_bitmask import loader_of


@dataclass(frozen=True)
class Opened:
    """A model and its tokenizer as a user would have them."""

    model: Any
    tokenizer: Any
    load_seconds: float
    architecture: Architecture
    max_positions: int | None  # tokens of the longest sequence; None where the config sets no limit


def open_checkpoint(folder: Path, device: torch.device) -> Opened:
    """Open a folder in float32, its 4-bit layers included.

    Raises:
        CrashError: ``artifact_incomplete`` where transformers misses a weight or finds one that it does not know.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = architecture_of(config)
    auto: Any = getattr(transformers, AUTO_CLASSES[architecture.task])
    begin = time.perf_counter()
    model, info = auto.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, local_files_only=True
    )
    bitsandbytes.to_float32(model)
    model.to(device).eval()
    seconds = time.perf_counter() - begin
    # Old checkpoints hold more than the model has: what the architecture leaves out, no loader needs.
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if architecture.canonical(name) is not None]
    wrong = {key: sorted(info[key])[:5] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise CrashError("artifact_incomplete", f"{folder.name} does not hold what its config calls for: {wrong}")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return Opened(model, tokenizer, seconds, architecture, architecture.max_positions(config))


def open_archive(folder: Path, device: torch.device) -> Opened:
    """Open a sparse-bitmask artifact of ours in float32, by the loader that lies in it.

    Raises:
        CrashError: ``artifact_incomplete`` where that refuses a file, or misses a weight.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = architecture_of(config)
    begin = time.perf_counter()
    try:
        model = loader_of(folder).load_model(folder, dtype=torch.float32).to(device)
    except ValueError as error:
        raise CrashError("artifact_incomplete", f"{folder.name} is refused by its own loader: {error}") from error
    seconds = time.perf_counter() - begin
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return Opened(model, tokenizer, seconds, architecture, architecture.max_positions(config))
