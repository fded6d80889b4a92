"""What a row of the table says: where the parts of a model are, by their names in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# What a model is for: to continue a text, to fill in masked tokens, or to put a text into one of several classes.
Task = Literal["causal", "masked", "classification"]
AttentionRows = Literal["separate", "stacked", "interleaved"]


@dataclass(frozen=True)
class Producer:
    """What makes the input of some linear layers, and of nothing else, so that it can take over a scale from them."""

    name: str  # of the module, within its block
    # `linear`: each row makes one column of that input, through nothing that a positive factor would not pass.
    kind: Literal["norm", "norm_plus_one", "linear"]
    only_if: tuple[tuple[str, Any], ...] = ()  # what config.json has to say for this to hold


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a model are, with the head of one task."""

    model_type: str
    task: Task = "causal"
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    # Modules with weights that a pass meets before the first block, and between the last one and the head. Those that
    # a model of this type may lack are in both lists all the same.
    before_blocks: tuple[str, ...] = ("model.embed_tokens",)
    after_blocks: tuple[str, ...] = ("model.norm",)
    head: str = "lm_head"
    earlier_head: str = "lm_head"  # its name in checkpoints, where transformers has renamed it since
    tied_bias: str | None = None  # the parameter that a tied head has as its bias, where that is not its own
    prefix: str = ""  # of the body's names; checkpoints of the bare body lack it
    # Ends of names that old checkpoints hold and the model computes by itself.
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
    other_heads: tuple[str, ...] = ()  # beginnings of names of what the model would be trained with for another task
    renamed_ends: Mapping[str, str] = field(default_factory=dict)  # of names in old checkpoints
    is_transposed: bool = False  # linear weights lie in_features × out_features, as Conv1D has them
    # Linear layers of one block, in order of execution; those in one group read the same input. Blocks with attention
    # have four groups: what makes queries, keys and values, what reads heads, what makes FFN neurons, and what reads
    # them.
    linear_groups: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    is_recurrent: bool = False  # blocks have a state in place of attention: no heads of it, no FFN, no positions
    opens_packed: bool = True  # transformers opens it where layers have words of codes in place of a weight
    # How queries, keys and values lie in the rows of the first group: a layer for each, one layer with one after the
    # other, or one with the three of each head together.
    attention_rows: AttentionRows = "separate"
    gates_are_stacked: bool = (
        False  # one layer makes the gates of all FFN neurons, and after them what they let through
    )
    has_head_dim: bool = False  # config.json can say how wide a head is, whatever the hidden size
    hidden_is_multiple_of_heads: bool = False  # transformers refuses others, even where config.json says head_dim
    factors_bind_heads: bool = False  # rotary factors have to be as many as the quotient says, even beside head_dim
    # Producers of inputs, by the first layer that reads each.
    producers: Mapping[str, Producer] = field(
        default_factory=lambda: {
            "self_attn.q_proj": Producer("input_layernorm", "norm"),
            "mlp.gate_proj": Producer("post_attention_layernorm", "norm"),
            "mlp.down_proj": Producer("mlp.up_proj", "linear"),
        }
    )
    # What config.json says when it is silent, and how it calls sizes that others call by Llama's names.
    ties_by_default: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    default_sizes: Mapping[str, int] = field(default_factory=dict)  # those that transformers takes for missing ones
    positions_follow_padding: bool = False  # the first position is the one after the padding token's id

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Every linear layer of one block."""
        return tuple(name for group in self.linear_groups for name in group)

    @property
    def vocabulary_matrices(self) -> tuple[str, ...]:
        """The modules with a row for each token: the embedding, and the head where it gives logits of tokens."""
        return (self.embedding,) if self.task == "classification" else (self.embedding, self.head)

    @property
    def call_options(self) -> Mapping[str, Any]:
        """What a forward pass over whole sequences is called with."""
        return {"use_cache": False} if self.task == "causal" else {}

    def size(self, name: str) -> str:
        """What config.json calls ``hidden_size`` or another of Llama's sizes, or ``embedding_size``."""
        return self.renamed.get(name, "hidden_size" if name == "embedding_size" else name)

    def max_positions(self, config: Mapping[str, Any]) -> int | None:
        """Tokens of the longest sequence that the model was made for; None where config.json sets no limit."""
        positions = None if self.is_recurrent else config.get(self.size("max_position_embeddings"))
        if not positions or not self.positions_follow_padding:
            return positions or None
        return int(positions) - int(config.get("pad_token_id") or 0) - 1

    def canonical(self, stored: str) -> str | None:
        """The model's name of a tensor that a checkpoint may store under another one; None for what is no parameter."""
        if stored.endswith(self.buffers):
            return None
        if stored.startswith(self.earlier_head + "."):
            return self.head + stored.removeprefix(self.earlier_head)
        name = stored if stored.startswith((self.prefix, *self._outside_body)) else self.prefix + stored
        if name.startswith(self.other_heads):
            return None
        for end, renamed in self.renamed_ends.items():
            if name.endswith(end):
                return name.removesuffix(end) + renamed
        return name

    def producer(self, group: Sequence[str], config: Mapping[str, Any]) -> Producer | None:
        """What makes the input of a group of linear layers; None where nothing could take over a scale."""
        producer = self.producers.get(group[0])
        if producer is None or any(config.get(key, value) != value for key, value in producer.only_if):
            return None
        return producer

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the head is the embedding's matrix."""
        return self.task != "classification" and bool(config.get("tie_word_embeddings", self.ties_by_default))

    def tied_parameters(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """Parameters of the head that are stored once, under another name, and that name."""
        if not self.is_tied(config):
            return {}
        bias = {} if self.tied_bias is None else {f"{self.head}.bias": self.tied_bias}
        return {f"{self.head}.weight": f"{self.embedding}.weight", **bias}

    @property
    def _outside_body(self) -> tuple[str, ...]:
        """Beginnings of names that have no prefix."""
        heads = (self.head, *self.after_blocks, *self.other_heads)
        return tuple(f"{name.partition('.')[0]}." for name in heads if not name.startswith(self.prefix))
