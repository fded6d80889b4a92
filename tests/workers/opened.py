"""Models that a test makes, as if they had been opened."""

from __future__ import annotations

from typing import Any

from workers.architectures import ARCHITECTURES, Task
from workers.formats.opening import Opened


def opened(model: Any, model_type: str = "llama", task: Task = "causal") -> Opened:
    """``model`` as one of ``model_type`` that was opened whole; it has no tokenizer."""
    return Opened(model, None, 0.0, ARCHITECTURES[model_type, task], None)
