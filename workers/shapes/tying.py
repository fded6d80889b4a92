"""Whether a model's embedding and head can become one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.architectures import architecture_of
from workers.errors import UserError
from workers.techniques import TieEmbeddings


def config_of_one_matrix(_stage: TieEmbeddings, param: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model with a tied head.

    Raises:
        UserError: ``unsupported_task``, ``unsupported_architecture``, or ``nothing_changed`` where it is tied already.
    """
    architecture = architecture_of(config)
    param = f"{param}.technique"
    if architecture.task == "classification":
        raise UserError(
            "unsupported_task",
            "The model is a classifier: its head has no row for each token to share with the embedding.",
            param=param,
            hint="Leave tie_embeddings out.",
        )
    if architecture.is_tied(config):
        raise UserError(
            "nothing_changed",
            "The model's head is its embedding already.",
            param=param,
            hint="Leave tie_embeddings out.",
        )
    return {**config, "tie_word_embeddings": True}
