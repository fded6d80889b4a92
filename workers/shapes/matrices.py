"""The matrices that the blocks of a model are made of, from its config alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from workers.architectures import Architecture, architecture_of
from workers.architectures.compact import compact_of
from workers.shapes.width import widths_of


def in_features(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The distinct numbers of columns of the blocks' linear layers, sorted."""
    return tuple(sorted({columns for _, columns in layers_of_block(config)}))


def sizes_between_layers(config: Mapping[str, Any]) -> tuple[int, int]:
    """How wide states are between the blocks, and inside of one: its neurons, or the channels of a recurrence."""
    architecture = architecture_of(config)
    if architecture.is_recurrent:
        hidden_size = int(config["hidden_size"])
        return hidden_size, int(config.get("expand", architecture.default_sizes["expand"])) * hidden_size
    widths = widths_of(config)
    return widths.hidden_size, widths.intermediate_size


def num_weights_of_blocks(config: Mapping[str, Any]) -> int:
    """Of the linear layers of all blocks, those that blocks share once, and none as factors."""
    return num_stored_blocks(config) * sum(rows * columns for rows, columns in layers_of_block(config))


def num_stored_blocks(config: Mapping[str, Any]) -> int:
    """How many blocks have parameters of their own."""
    return int(config[architecture_of(config).size("num_hidden_layers")]) - len(compact_of(config).sources)


def num_matrix_weights(config: Mapping[str, Any]) -> int:
    """Of the linear layers of all blocks, the embedding and, where it is another matrix with a row a token, the head.

    All but norms, biases and the like: a hundredth, or less.
    """
    architecture = architecture_of(config)
    is_alone = architecture.task == "classification" or architecture.is_tied(config)
    return num_weights_of_blocks(config) + (1 if is_alone else 2) * num_embedding_weights(config)


def num_embedding_weights(config: Mapping[str, Any]) -> int:
    """Of the token embedding."""
    return int(config["vocab_size"] * config[architecture_of(config).size("embedding_size")])


def layers_of_block(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of the linear layers of one block, as out_features and in_features."""
    architecture = architecture_of(config)
    if architecture.is_recurrent:
        return _matrices_of_recurrence(architecture, config)
    widths = widths_of(config)
    queries, keys = (number * widths.head_dim for number in (widths.num_attention_heads, widths.num_key_value_heads))
    stacks_gates, num_layers = architecture.gates_are_stacked, len(architecture.linear_groups[2])
    rows_of_attention = [queries, keys, keys] if architecture.attention_rows == "separate" else [queries + 2 * keys]
    rows_of_neurons = num_layers * [(2 if stacks_gates else 1) * widths.intermediate_size]
    return [
        *((rows, widths.hidden_size) for rows in rows_of_attention),
        (widths.hidden_size, queries),
        *((rows, widths.hidden_size) for rows in rows_of_neurons),
        (widths.hidden_size, widths.intermediate_size),
    ]


def _matrices_of_recurrence(architecture: Architecture, config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Those of Mamba (arXiv:2312.00752, algorithm 2) and of Mamba-2 (arXiv:2405.21060, section 7).

    But for the one that takes a step's rank to Mamba's channels, which is no layer of the table.
    """

    def size(name: str) -> int:
        return int(config.get(name, architecture.default_sizes[name]))

    hidden_size, state_size = int(config["hidden_size"]), size("state_size")
    inner_size = size("expand") * hidden_size
    if architecture.model_type == "mamba2":
        num_rows = 2 * inner_size + 2 * size("n_groups") * state_size + size("num_heads")
        return [(num_rows, hidden_size), (hidden_size, inner_size)]
    rank = math.ceil(hidden_size / 16)  # as it is by default: a hundredth of the weights hang on it
    return [(2 * inner_size, hidden_size), (rank + 2 * state_size, inner_size), (hidden_size, inner_size)]
