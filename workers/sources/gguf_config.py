"""Rebuilds ``config.json`` from what a GGUF file's metadata and tensors say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from workers.errors import UserError

# GGUF's name of an architecture: the model type and class that it is in transformers.
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
# Llama 3 states these three only in its own config; GGUF keeps the factors that follow from them.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def build_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray[Any, Any] | None
) -> dict[str, Any]:
    """The config of a decoder; ``rope_factors`` are the values of the tensor ``rope_freqs.weight`` if there is one.

    Raises UserError ``unsupported_architecture`` or ``invalid_gguf``.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise _unsupported(f"Models of the GGUF architecture {str(architecture)[:40]!r} are not converted")
    if metadata.get(f"{architecture}.expert_count", 0):
        raise _unsupported("Mixtures of experts are not converted")
    model_type, class_name = _ARCHITECTURES[architecture]

    def number(key: str, default: float | None = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise UserError(
                "invalid_gguf",
                f"The GGUF file states no usable {architecture}.{key}.",
                param="model.id",
                hint="Convert the model to GGUF again.",
            )
        return value

    if "token_embd.weight" not in shapes:
        raise _unsupported("The GGUF file holds no token embedding")
    num_heads, hidden_size = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", number("rope.dimension_count", hidden_size // num_heads))
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": number("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": _shortest(number("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(metadata, architecture, head_dim, number("rope.freq_base", 10_000.0), rope_factors),
        "tie_word_embeddings": "output.weight" not in shapes,
        "vocab_size": shapes["token_embd.weight"][0],
        **_special_tokens(metadata),
    }
    has_bias = any(name.endswith("attn_q.bias") for name in shapes)
    if has_bias and model_type == "llama":
        raise _unsupported("Biases in attention layers of this architecture are not converted")
    return config


def build_generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How the model stops and pads."""
    return {"_from_model_config": True, **_special_tokens(metadata)}


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    values = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _SPECIAL.items()}
    return {name: value for name, value in values.items() if type(value) is int}


def _rope(
    metadata: Mapping[str, Any],
    architecture: str,
    head_dim: int,
    theta: float,
    factors: np.ndarray[Any, Any] | None,
) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _shortest(theta)}
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = metadata.get(f"{architecture}.rope.scaling.factor")
    original = metadata.get(f"{architecture}.rope.scaling.original_context_length")
    if kind == "linear" and factor is not None:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and factor is not None and original is not None:
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif kind != "none":
        raise _unsupported(f"Rotary scaling of the kind {str(kind)[:40]!r} is not converted")
    if factors is not None and not np.all(factors == 1):
        if kind != "none" or not _is_llama3(factors, head_dim, theta):
            raise _unsupported("The rotary frequencies are scaled in a way that is not known")
        rope |= {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    return rope


def _is_llama3(factors: np.ndarray[Any, Any], head_dim: int, theta: float) -> bool:
    """Whether the factors are those of Llama 3.1's formula (see ``_LLAMA3``) for their own maximum."""
    if factors.shape != (head_dim // 2,):
        return False
    largest = float(factors.max())
    low, high, original = _LLAMA3.values()
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return bool(np.allclose(factors, 1 / ((1 - smooth) / largest + smooth), rtol=1e-3))


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF turns 1e-5 into 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _unsupported(message: str) -> UserError:
    return UserError(
        "unsupported_architecture",
        f"{message}.",
        param="model.id",
        hint="Models of the architectures llama, qwen2 and qwen3 are converted; use safetensors for others.",
    )
