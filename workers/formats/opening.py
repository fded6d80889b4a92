"""Opening a checkpoint the way its reader will: with plain transformers, or the loader that lies beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workers.errors import CrashError
from workers.formats.sparse_bitmask import loader_of
from workers.recipe import Format

_SNIPPET = """\
# pip install torch transformers compressed-tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
"""
_SPARSE_SNIPPET = """\
# pip install torch transformers
# For plain transformers, write the dense form: python {folder}/load_sparse.py {folder} dense
import sys

from transformers import AutoTokenizer

sys.path.insert(0, "{folder}")
from load_sparse import load_model

model = load_model("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
"""


def load_snippet(output_format: Format) -> str:
    """Lines of Python that load an artifact, with ``{folder}`` and ``{prompt}`` to fill in."""
    return _SPARSE_SNIPPET if output_format == "sparse-bitmask" else _SNIPPET


@dataclass(frozen=True)
class Opened:
    """A model and its tokenizer as a user would have them."""

    model: Any
    tokenizer: Any
    load_seconds: float


def open_checkpoint(folder: Path, device: torch.device) -> Opened:
    """Open a folder in float32.

    Raises:
        CrashError: ``artifact_incomplete`` where transformers misses a weight or finds one that it does not know.
    """
    begin = time.perf_counter()
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, local_files_only=True
    )
    model.to(device).eval()
    seconds = time.perf_counter() - begin
    wrong = {key: sorted(info[key])[:5] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise CrashError("artifact_incomplete", f"{folder.name} does not hold what its config calls for: {wrong}")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return Opened(model, tokenizer, seconds)


def open_archive(folder: Path, device: torch.device) -> Opened:
    """Open a sparse-bitmask artifact of ours in float32, by the loader that lies in it.

    Raises:
        CrashError: ``artifact_incomplete`` where that refuses a file, or misses a weight.
    """
    begin = time.perf_counter()
    try:
        model = loader_of(folder).load_model(folder, dtype=torch.float32).to(device)
    except ValueError as error:
        raise CrashError("artifact_incomplete", f"{folder.name} is refused by its own loader: {error}") from error
    seconds = time.perf_counter() - begin
    return Opened(model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True), seconds)
