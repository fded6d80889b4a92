"""What config.json says of layers that are two factors, and of blocks that have another's parameters. Torch-free.

``"attar": {"low_rank": {"model.layers.0.mlp.down_proj": 12}, "shared": {"model.layers.1": "model.layers.0"}}``: a layer
with its rank, a block with the one whose parameters it has. ``workers.formats.load_compact`` opens such a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.architectures.architecture import Architecture, Producer

KEY = "attar"
# What a linear layer of low rank is made of: the first reads its input, the second gives its output.
IN_FACTOR, OUT_FACTOR = "in_factor", "out_factor"


@dataclass(frozen=True)
class Compact:
    """Such a description; empty for a plain model."""

    ranks: Mapping[str, int] = field(default_factory=dict)  # by layer that is two factors
    sources: Mapping[str, str] = field(default_factory=dict)  # by block that shares: the one whose parameters it has

    def __bool__(self) -> bool:
        return bool(self.ranks or self.sources)

    def to_config(self) -> dict[str, Any]:
        """The entry of config.json; nothing for a plain model."""
        return {KEY: {"low_rank": dict(self.ranks), "shared": dict(self.sources)}} if self else {}

    def source_of(self, name: str, blocks: str) -> str:
        """The stored name of a module or parameter; ``blocks`` is where the model has its blocks."""
        if not self.sources or not name.startswith(blocks + "."):
            return name
        number, dot, rest = name.removeprefix(blocks + ".").partition(".")
        return self.sources.get(f"{blocks}.{number}", f"{blocks}.{number}") + dot + rest

    def groups(self, architecture: Architecture, block: str) -> tuple[tuple[str, ...], ...]:
        """:attr:`Architecture.linear_groups` of one block, by its name: factors in place of the layers that have them.

        The first factors of a group read its input; each second factor reads what the first gives, alone.
        """
        groups: list[tuple[str, ...]] = []
        for group in architecture.linear_groups:
            factored = [layer for layer in group if f"{block}.{layer}" in self.ranks]
            groups.append(tuple(f"{layer}.{IN_FACTOR}" if layer in factored else layer for layer in group))
            groups += [(f"{layer}.{OUT_FACTOR}",) for layer in factored]
        return tuple(groups)

    def producer(
        self, architecture: Architecture, block: str, group: Sequence[str], config: Mapping[str, Any]
    ) -> Producer | None:
        """:meth:`Architecture.producer` of one of these groups."""
        layer, _, last = group[0].rpartition(".")
        if last == OUT_FACTOR:
            return Producer(f"{layer}.{IN_FACTOR}", "linear")
        found = architecture.producer([layer if last == IN_FACTOR else group[0]], config)
        if found is not None and found.kind == "linear" and f"{block}.{found.name}" in self.ranks:
            return Producer(f"{found.name}.{OUT_FACTOR}", "linear")
        return found


def compact_of(config: Mapping[str, Any]) -> Compact:
    """What a checked config.json says."""
    entry = config.get(KEY) or {}
    return Compact(entry.get("low_rank", {}), entry.get("shared", {}))


def is_transposed(architecture: Architecture, layer: str) -> bool:
    """Whether the weight of a layer lies as in_features × out_features; factors never do."""
    return architecture.is_transposed and layer.rpartition(".")[2] not in (IN_FACTOR, OUT_FACTOR)


def problem_of(architecture: Architecture, config: Mapping[str, Any]) -> str | None:
    """What is wrong with the entry of a config.json, which anyone may have written; None for a sound one."""
    if KEY not in config:
        return None
    entry = config[KEY]
    if not isinstance(entry, Mapping) or not set(entry) <= {"low_rank", "shared"}:
        return f"{KEY} has to have low_rank and shared, and nothing else"
    ranks, sources = entry.get("low_rank", {}), entry.get("shared", {})
    if not isinstance(ranks, Mapping) or not isinstance(sources, Mapping):
        return f"low_rank and shared in {KEY} have to be objects"
    if not ranks and not sources:
        return f"{KEY} names no layer and no block"
    # A rank that is no less than the hidden size, or the next larger one, makes nothing smaller.
    most = max(int(config.get(architecture.size(name)) or 0) for name in ("hidden_size", "intermediate_size"))
    num_blocks = config[architecture.size("num_hidden_layers")]
    for layer, rank in ranks.items():
        block, rest = _split(architecture, layer)
        is_layer = 0 <= block < num_blocks and rest in architecture.linear_layers
        if not is_layer or type(rank) is not int or not 1 <= rank <= most:
            return f"low_rank in {KEY} names {str(layer)[:100]!r}, which is no layer of a block, or a rank beyond it"
    for block, source in sources.items():
        (number, rest), (earlier, rest_of_source) = (_split(architecture, name) for name in (block, source))
        if not 0 <= earlier < number < num_blocks or rest or rest_of_source or source in sources:
            return f"shared in {KEY} has {str(block)[:100]!r}, which has not the parameters of an earlier block"
    if any(f"{architecture.blocks}.{_split(architecture, layer)[0]}" in sources for layer in ranks):
        return f"{KEY} gives ranks to layers of a block that has another's parameters"
    return None


def _split(architecture: Architecture, name: Any) -> tuple[int, str]:
    """The number of the block that a name begins with, −1 where it does not, and what follows it."""
    found = re.fullmatch(re.escape(architecture.blocks) + r"\.(0|[1-9][0-9]{0,8})(?:\.(.+))?", str(name), re.ASCII)
    return (int(found[1]), found[2] or "") if found else (-1, "")
