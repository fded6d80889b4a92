"""One table: what the engine needs to know of an architecture. Torch-free.

A row says where the decoder blocks, embedding, final norm and head are, in names of the checkpoint, and
which linear layers of a block share one input. Blocks, names and groups are relative to the prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a causal language model are."""

    model_type: str
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    # Linear layers of one block, in order of execution; those in one group read the same input.
    linear_groups: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Every linear layer of one block."""
        return tuple(name for group in self.linear_groups for name in group)


ARCHITECTURES: Mapping[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama"),
        Architecture("mistral"),
        Architecture("qwen2"),
        Architecture("qwen3"),
    )
}

ENCODERS = frozenset({"bert", "distilbert", "roberta", "albert", "electra", "deberta", "deberta-v2", "modernbert"})


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The table's row for a ``config.json``.

    Raises UserError ``unsupported_architecture``, or ``not_a_causal_model`` for an encoder.
    """
    model_type = config.get("model_type")
    names = config.get("architectures") or []
    if model_type in ENCODERS or (names and not any(str(name).endswith("ForCausalLM") for name in names)):
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
