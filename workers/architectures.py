"""One table: what the engine needs to know of an architecture. Torch-free.

A row says where the decoder blocks, the embedding, what lies around the blocks, and the head are, in names of the
checkpoint, and which linear layers of a block share one input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from workers.errors import UserError


@dataclass(frozen=True)
class Producer:
    """What makes the input of some linear layers, and of nothing else, so that it can take over a scale from them."""

    name: str  # of the module, within its block
    # `linear`: each row makes one column of that input, through nothing that a positive factor would not pass.
    kind: Literal["norm", "norm_plus_one", "linear"]
    only_if: tuple[tuple[str, Any], ...] = ()  # what config.json has to say for this to hold


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a causal language model are, by their names in the checkpoint."""

    model_type: str
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    # Modules with weights that a pass meets before the first block, and between the last one and the head. Those that
    # a model of this type may lack are in both lists all the same.
    before_blocks: tuple[str, ...] = ("model.embed_tokens",)
    after_blocks: tuple[str, ...] = ("model.norm",)
    head: str = "lm_head"
    earlier_head: str = "lm_head"  # its name in checkpoints, where transformers has renamed it since
    prefix: str = ""  # of every name but the head's; checkpoints of the bare body lack it
    # Ends of names that old checkpoints hold and the model computes by itself.
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
    is_transposed: bool = False  # linear weights lie in_features × out_features, as Conv1D has them
    # Linear layers of one block, in order of execution; those in one group read the same input.
    linear_groups: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
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

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Every linear layer of one block."""
        return tuple(name for group in self.linear_groups for name in group)

    def size(self, name: str) -> str:
        """What config.json calls ``hidden_size`` or another of Llama's sizes, or ``embedding_size``."""
        return self.renamed.get(name, "hidden_size" if name == "embedding_size" else name)

    def canonical(self, stored: str) -> str | None:
        """The model's name of a tensor that a checkpoint may store under another one; None for what is no parameter."""
        if stored.endswith(self.buffers):
            return None
        if stored.startswith(self.earlier_head + "."):
            return self.head + stored.removeprefix(self.earlier_head)
        if stored.startswith((self.prefix, self.head + ".")):
            return stored
        return self.prefix + stored

    def producer(self, group: Sequence[str], config: Mapping[str, Any]) -> Producer | None:
        """What makes the input of a group of linear layers; None where nothing could take over a scale."""
        producer = self.producers.get(group[0])
        if producer is None or any(config.get(key, value) != value for key, value in producer.only_if):
            return None
        return producer

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the head is the embedding's matrix."""
        return bool(config.get("tie_word_embeddings", self.ties_by_default))


ARCHITECTURES: Mapping[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama"),
        Architecture("mistral"),
        Architecture("qwen2"),
        Architecture("qwen3"),
        Architecture(
            "gemma3_text",
            producers={
                "self_attn.q_proj": Producer("input_layernorm", "norm_plus_one"),
                "mlp.gate_proj": Producer("pre_feedforward_layernorm", "norm_plus_one"),
                "mlp.down_proj": Producer("mlp.up_proj", "linear"),
            },
            ties_by_default=True,
        ),
        Architecture(
            "phi3",
            linear_groups=(
                ("self_attn.qkv_proj",),
                ("self_attn.o_proj",),
                ("mlp.gate_up_proj",),
                ("mlp.down_proj",),
            ),
            producers={
                "self_attn.qkv_proj": Producer("input_layernorm", "norm"),
                "mlp.gate_up_proj": Producer("post_attention_layernorm", "norm"),
            },
        ),
        Architecture(
            "opt",
            blocks="model.decoder.layers",
            embedding="model.decoder.embed_tokens",
            before_blocks=(
                "model.decoder.embed_tokens",
                "model.decoder.embed_positions",
                "model.decoder.project_in",
            ),
            after_blocks=("model.decoder.final_layer_norm", "model.decoder.project_out"),
            linear_groups=(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.out_proj",),
                ("fc1",),
                ("fc2",),
            ),
            # A norm after its layers, as OPT-350m has it, feeds the residual stream too.
            producers={
                "self_attn.q_proj": Producer("self_attn_layer_norm", "norm", (("do_layer_norm_before", True),)),
                "fc1": Producer("final_layer_norm", "norm", (("do_layer_norm_before", True),)),
                "fc2": Producer("fc1", "linear", (("activation_function", "relu"),)),
            },
            ties_by_default=True,
            renamed={"intermediate_size": "ffn_dim", "embedding_size": "word_embed_proj_dim"},
        ),
        Architecture(
            "gpt2",
            blocks="transformer.h",
            embedding="transformer.wte",
            before_blocks=("transformer.wte", "transformer.wpe"),
            after_blocks=("transformer.ln_f",),
            prefix="transformer.",
            buffers=(".attn.bias", ".attn.masked_bias"),
            is_transposed=True,
            linear_groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
            producers={"attn.c_attn": Producer("ln_1", "norm"), "mlp.c_fc": Producer("ln_2", "norm")},
            ties_by_default=True,
            renamed={
                "hidden_size": "n_embd",
                "embedding_size": "n_embd",
                "intermediate_size": "n_inner",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions",
            },
        ),
        Architecture(
            "gpt_neox",
            blocks="gpt_neox.layers",
            embedding="gpt_neox.embed_in",
            before_blocks=("gpt_neox.embed_in",),
            after_blocks=("gpt_neox.final_layer_norm",),
            earlier_head="embed_out",
            buffers=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
            linear_groups=(
                ("attention.query_key_value",),
                ("attention.dense",),
                ("mlp.dense_h_to_4h",),
                ("mlp.dense_4h_to_h",),
            ),
            producers={
                "attention.query_key_value": Producer("input_layernorm", "norm"),
                "mlp.dense_h_to_4h": Producer("post_attention_layernorm", "norm"),
            },
        ),
    )
}

ENCODERS = frozenset({"bert", "distilbert", "roberta", "albert", "electra", "deberta", "deberta-v2", "modernbert"})


def may_be_causal(names: Sequence[object]) -> bool:
    """Whether the ``architectures`` of a config.json name a causal language model, or nothing."""
    return not names or any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The table's row for a ``config.json``.

    Raises UserError ``unsupported_architecture``, or ``not_a_causal_model`` for an encoder.
    """
    model_type = config.get("model_type")
    names = config.get("architectures") or []
    if model_type in ENCODERS or not may_be_causal(names):
        raise UserError(
            "not_a_causal_model",
            f"The model is {names[0] if names else model_type}, not a causal language model.",
            param="model.id",
            hint="Choose a model whose config.json names an architecture that ends in ForCausalLM.",
        )
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(
            "unsupported_architecture",
            f"Models of type {model_type!r} are not supported.",
            param="model.id",
            hint="Supported model types: " + ", ".join(sorted(ARCHITECTURES)) + ".",
        )
    return ARCHITECTURES[model_type]
