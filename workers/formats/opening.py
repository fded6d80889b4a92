"""Opening a checkpoint the way its reader will: with plain transformers, and nothing of ours."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from workers.architectures import AUTO_CLASSES, Architecture, Task, architecture_of
from workers.errors import CrashError

_LOAD_SNIPPET = """\
# pip install torch transformers compressed-tensors
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/to/artifact")
tokenizer = AutoTokenizer.from_pretrained("path/to/artifact")
"""
_USE_SNIPPETS: Mapping[Task, str] = {
    "causal": """\
inputs = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
""",
    "masked": """\
inputs = tokenizer(f"Hello {tokenizer.mask_token}", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model(**inputs).logits[0].argmax(dim=-1)))
""",
    "classification": """\
inputs = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)
print(model.config.id2label[model(**inputs).logits[0].argmax().item()])
""",
}


@dataclass(frozen=True)
class Opened:
    """A model and its tokenizer as a user would have them."""

    model: Any
    tokenizer: Any
    load_seconds: float
    architecture: Architecture
    max_positions: int | None  # tokens of the longest sequence; None where the config sets no limit


def load_snippet(task: Task) -> str:
    """The lines of Python that open an artifact and use it."""
    return _LOAD_SNIPPET.format(auto_class=AUTO_CLASSES[task]) + _USE_SNIPPETS[task]


def open_checkpoint(folder: Path, device: torch.device) -> Opened:
    """Open a folder in float32.

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
    model.to(device).eval()
    seconds = time.perf_counter() - begin
    # Old checkpoints hold more than the model has: what the architecture leaves out, no loader needs.
    info["unexpected_keys"] = [name for name in info["unexpected_keys"] if architecture.canonical(name) is not None]
    wrong = {key: sorted(info[key])[:5] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise CrashError("artifact_incomplete", f"{folder.name} does not hold what its config calls for: {wrong}")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return Opened(model, tokenizer, seconds, architecture, architecture.max_positions(config))
