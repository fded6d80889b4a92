"""The model that a config.json describes, without its weights."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, AutoConfig

from workers.architectures import AUTO_CLASSES, Architecture
from workers.architectures.compact import compact_of
from workers.engine.checkpoint import Checkpoint
from workers.errors import UserError
from workers.formats.load_compact import compact_class, factor_layers

logger = logging.getLogger(__name__)


def empty_model(checkpoint: Checkpoint, architecture: Architecture) -> Any:
    """The model of a config.json, its parameters on the meta device; UserError ``invalid_config`` if there is none."""
    auto: Any = getattr(transformers, AUTO_CLASSES[architecture.task])
    try:
        stored = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        own = type(stored) if checkpoint.has_stored_type else CONFIG_MAPPING[checkpoint.config["model_type"]]
        # It fills in what is nested; infinity, for which JSON has no number, is written as an object.
        config: Any = own.from_dict(own._decode_special_floats(copy.deepcopy(checkpoint.config)))
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        # The same in one piece: a pass stops once at each layer.
        config.chunk_size_feed_forward = 0
        attention = None if architecture.is_recurrent else "sdpa"
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
            )
            if compact_of(checkpoint.config):
                factor_layers(model)
                model.__class__ = compact_class(type(model))  # whoever makes another of its kind gets factors too
    except Exception as error:
        # Whatever transformers makes of a config that describes no model: the config is the user's.
        logger.exception("config.json describes no model")
        raise UserError(
            "invalid_config",
            f"config.json describes no model that transformers can build: {_first_line(error)}",
            param="model.id",
            hint="Compare config.json with the one that the checkpoint was saved with.",
        ) from error
    return model.eval()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
