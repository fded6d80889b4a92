"""The checkpoint of a model whose embedding and head have become one matrix."""

from __future__ import annotations

from typing import Any

import torch

from workers.engine.checkpoint import Checkpoint
from workers.engine.shaping import Shaping
from workers.errors import UserError
from workers.shapes.tying import config_of_one_matrix
from workers.techniques import TieEmbeddings


def tie_embeddings(shaping: Shaping, stage: TieEmbeddings) -> tuple[Checkpoint, dict[str, Any]]:
    """The model's checkpoint with one matrix for embedding and head, and what the report says of them.

    Its ``cosine`` is that between a token's rows in the two, mean over the tokens: 1 where nothing is lost.

    Raises:
        UserError: as :func:`config_of_one_matrix` says, or ``unsupported_architecture`` where the two have not the same
            shape, or the head has a bias that no tied head has.
    """
    skeleton, checkpoint = shaping.skeleton, shaping.skeleton.checkpoint
    architecture = skeleton.architecture
    config = config_of_one_matrix(stage, shaping.param, checkpoint.config)
    embedding, head = f"{architecture.embedding}.weight", f"{architecture.head}.weight"
    shapes = {name: list(skeleton.model.get_parameter(name).shape) for name in (embedding, head)}
    if shapes[embedding] != shapes[head]:
        raise _impossible(f"the embedding has the shape {shapes[embedding]} and the head {shapes[head]}", shaping.param)
    tied = architecture.tied_parameters(config)
    stored = set(checkpoint.parameters())
    means = {embedding: {"mean": [embedding, head], "embedding": [embedding], "head": [head]}[stage.keep]}
    # A tied head has the bias that goes by another name, which an untied one has and never reads.
    means |= {other: [bias] for bias, other in tied.items() if bias != head and {bias, other} <= stored}
    alone = [bias for bias, other in tied.items() if bias in stored and other not in stored]
    if alone:
        raise _impossible(f"its head has a bias of its own, {alone[0]}", shaping.param)
    metrics = shaping.journal.once("rows", lambda: {"cosine": _mean_cosine(checkpoint, embedding, head)})
    return checkpoint.with_means(means, config).without(set(tied), config), {"kept": stage.keep, **metrics}


def _mean_cosine(checkpoint: Checkpoint, embedding: str, head: str) -> float:
    cosines = torch.nn.functional.cosine_similarity(checkpoint.parameter(embedding), checkpoint.parameter(head), dim=-1)
    return float(cosines.mean())


def _impossible(problem: str, param: str) -> UserError:
    return UserError(
        "unsupported_architecture",
        f"The model's embedding cannot be its head: {problem}.",
        param=f"{param}.technique",
        hint="Leave tie_embeddings out.",
    )
