"""How many tokens a model may have once a stage has left out those that a text never uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.architectures import architecture_of
from workers.techniques import VocabularyPruning


def config_of_fewer_tokens(stage: VocabularyPruning, _param: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with as many tokens as the stage leaves at most: how many there are, the text decides.

    Raises:
        UserError: ``unsupported_task`` or ``unsupported_architecture``.
    """
    architecture_of(config)
    vocab_size = int(config["vocab_size"])
    return {**config, "vocab_size": min(vocab_size, stage.num_tokens or vocab_size)}
