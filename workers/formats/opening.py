"""Opening a checkpoint the way its reader will: with plain transformers, or the loader that lies beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workers.errors import CrashError
from workers.formats import bitsandbytes
from workers.formats.sparse_bitmask import loader_of
from workers.recipe import Format

_SNIPPET = """\
# pip install {packages}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/artifact")
tokenizer = AutoTokenizer.from_pretrained("path/to/artifact")
inputs = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
"""
_SPARSE_SNIPPET = """\
# pip install {packages}
# For plain transformers, write the dense form: python path/to/artifact/load_sparse.py path/to/artifact dense
import sys

from transformers import AutoTokenizer

sys.path.insert(0, "path/to/artifact")
from load_sparse import load_model

model = load_model("path/to/artifact")
tokenizer = AutoTokenizer.from_pretrained("path/to/artifact")
inputs = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
"""
_PACKAGES: dict[Format, str] = {
    "safetensors": "torch transformers",
    "compressed-tensors": "torch transformers compressed-tensors",
    "bitsandbytes": "torch transformers accelerate bitsandbytes",
    "sparse-bitmask": "torch transformers",
}


def load_snippet(output_format: Format) -> str:
    """Python that opens an artifact, with what has to be installed for it."""
    snippet = _SPARSE_SNIPPET if output_format == "sparse-bitmask" else _SNIPPET
    return snippet.format(packages=_PACKAGES[output_format])


@dataclass(frozen=True)
class Opened:
    """A model and its tokenizer as a user would have them."""

    model: Any
    tokenizer: Any
    load_seconds: float


def open_checkpoint(folder: Path, device: torch.device) -> Opened:
    """Open a folder in float32, its 4-bit layers included.

    Raises:
        CrashError: ``artifact_incomplete`` where transformers misses a weight or finds one that it does not know.
    """
    begin = time.perf_counter()
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, local_files_only=True
    )
    bitsandbytes.to_float32(model)
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
