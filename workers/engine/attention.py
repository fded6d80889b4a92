"""The checkpoint of a model whose attention is local: the same weights under another config."""

from __future__ import annotations

from typing import Any

from workers.engine.checkpoint import Checkpoint
from workers.engine.shaping import Shaping
from workers.shapes.attention import config_of_a_window, windows_of
from workers.techniques import SlidingWindow


def narrow_attention(shaping: Shaping, stage: SlidingWindow) -> tuple[Checkpoint, dict[str, Any]]:
    """The model's checkpoint with the stage's window, and what the report says of it.

    Raises:
        UserError: as :func:`config_of_a_window` says.
    """
    before = shaping.skeleton.checkpoint
    config = config_of_a_window(stage, shaping.index, before.config)
    windows = windows_of(config)
    metrics = {
        "window": stage.window,
        "num_local_blocks": sum(window is not None for window in windows),
        "full_blocks": [block for block, window in enumerate(windows) if window is None],
        "model_type": config["model_type"],
        "original_model_type": before.config["model_type"],
    }
    return before.with_config(config), metrics
