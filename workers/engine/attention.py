"""The checkpoint of a model whose attention is local: the same weights under another config."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from workers.disk import write_json
from workers.engine.checkpoint import GENERATION_SETTINGS, Checkpoint
from workers.engine.shaping import Shaping
from workers.engine.text import tokenize
from workers.errors import UserError
from workers.shapes.attention import config_of_a_window, windows_of
from workers.sources.tokenizer_file import tokenizer_failures
from workers.techniques import SlidingWindow


def narrow_attention(shaping: Shaping, stage: SlidingWindow) -> tuple[Checkpoint, dict[str, Any]]:
    """The model's checkpoint with the stage's window, and what the report says of it.

    Raises:
        UserError: as :func:`config_of_a_window` says, or ``invalid_tokenizer``.
    """
    before = shaping.skeleton.checkpoint
    config = config_of_a_window(stage, shaping.param, before.config)
    windows = windows_of(config)
    metrics = {
        "window": stage.window,
        "num_local_blocks": sum(window is not None for window in windows),
        "full_blocks": [block for block, window in enumerate(windows) if window is None],
        "model_type": config["model_type"],
        "original_model_type": before.config["model_type"],
    }
    after = before.with_config(config)
    if config["model_type"] != before.config["model_type"]:
        after = after.with_tokenizer(_write_tokenizer(shaping, config))
    return after, metrics


def _write_tokenizer(shaping: Shaping, config: Mapping[str, Any]) -> Path:
    """A folder with the tokenizer as it works now, whole, and what an earlier stage left beside it.

    transformers chooses a tokenizer's class by the type of model in the config.json beside it, and Llama's class does
    more than its files say: under another type the same files would read text differently.

    Raises:
        UserError: ``invalid_tokenizer`` where it does so all the same.
    """
    folder, tokenizer = shaping.folder, shaping.texts.tokenizer(shaping.skeleton)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", config)
    settings = shaping.skeleton.checkpoint.tokenizer_folder / GENERATION_SETTINGS
    if settings.exists():  # with the ids of this tokenizer, which the source's may not have
        shutil.copyfile(settings, folder / GENERATION_SETTINGS)
    with tokenizer_failures("invalid_tokenizer", "The tokenizer cannot be opened again"):
        written: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    param = "recipe.evaluation.dataset"
    texts = [tokenize(each, shaping.texts.evaluation(), param=param) for each in (tokenizer, written)]
    if not torch.equal(*texts):
        raise UserError(
            "invalid_tokenizer",
            f"The tokenizer reads text differently beside a {config['model_type']} model.",
            param="model.id",
            hint="Save the tokenizer again with the save_pretrained of a current transformers.",
        )
    return folder
