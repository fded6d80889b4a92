"""Opening a checkpoint the way its reader will: with plain transformers, and nothing of ours."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workers.errors import CrashError

LOAD_SNIPPET = """\
# pip install torch transformers compressed-tensors
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
"""


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
