"""GGUF files become safetensors checkpoints: bf16 weights under their Hugging Face names, config and tokenizer."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from workers.errors import UserError
from workers.sources.bf16_writer import Chunks, write_checkpoint
from workers.sources.gguf_config import build_config, build_generation_config
from workers.sources.gguf_header import GgufError, GgufTensor, read_gguf_header
from workers.sources.gguf_tokenizer import write_tokenizer
from workers.sources.safetensors_header import TensorInfo

_TYPE_SIZES = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
# Blocks that gguf can turn into numbers; integers and the blocks of intermediate results are no weights.
_WEIGHT_TYPES = frozenset(
    int(kind)
    for kind in GGMLQuantizationType
    if kind.name[0] in "FBQTMI" and kind.name not in {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0"}
)
_CHUNK_ELEMENTS = 4 * 1024 * 1024

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Not a weight: the factors by which Llama 3 stretches its rotary frequencies. The config states them instead.
ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """A GGUF file open for reading. Takes over the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._closed = False
        try:
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise _invalid("it is empty") from None
        finally:
            os.close(descriptor)
        self._view = memoryview(self._map)
        try:
            self.metadata, self.tensors = read_gguf_header(self._view, _TYPE_SIZES)
        except GgufError as error:
            self.close()
            raise _invalid(str(error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory map back."""
        self._view.release()
        self._map.close()

    def config(self) -> dict[str, Any]:
        """The ``config.json`` that the metadata stands for; raises UserError ``unsupported_architecture``."""
        factors = self.tensors.get(ROPE_FACTORS)
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        values = None if factors is None else self._rows(factors, np.arange(1)).ravel()
        return build_config(self.metadata, shapes, values)

    def converted_tensors(self) -> dict[str, TensorInfo]:
        """The tensors of the checkpoint that :func:`convert_gguf` writes."""
        return {
            name: TensorInfo("BF16", tensor.shape, 2 * int(np.prod(tensor.shape, dtype=object)))
            for name, tensor in self._by_new_name().items()
        }

    def chunks(self, tensor: GgufTensor, num_heads: int | None) -> Chunks:
        """The tensor's values in float32, some rows at a time; ``num_heads`` undoes llama.cpp's order of q and k."""
        num_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        order = np.arange(num_rows)
        if num_heads is not None:
            # llama.cpp interleaves the halves of each head's rotary pairs; the checkpoint has them one after the other.
            order = order.reshape(num_heads, num_rows // num_heads // 2, 2).swapaxes(1, 2).ravel()
        step = max(1, _CHUNK_ELEMENTS * num_rows // int(np.prod(tensor.shape)))
        for first in range(0, num_rows, step):
            yield self._rows(tensor, order[first : first + step])

    def named_chunks(self, config: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], Callable[[], Chunks]]]:
        """Every tensor of the new checkpoint: its shape, and what gives its values."""
        permuted = self.metadata["general.architecture"] == "llama"
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        named: dict[str, tuple[tuple[int, ...], Callable[[], Chunks]]] = {}
        for name, tensor in self._by_new_name().items():
            num_heads = heads.get(name.split(".")[-2]) if permuted else None
            if num_heads is not None and tensor.shape[0] % (2 * num_heads):
                raise _invalid(f"{num_heads} heads do not divide {name} of shape {tensor.shape}")
            named[name] = tensor.shape, partial(self.chunks, tensor, num_heads)
        return named

    def _rows(self, tensor: GgufTensor, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        num_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        raw = np.frombuffer(self._view, np.uint8, tensor.num_bytes, tensor.offset).reshape(num_rows, -1)
        return np.asarray(dequantize(raw[rows], GGMLQuantizationType(tensor.type_id)), np.float32)

    def _by_new_name(self) -> dict[str, GgufTensor]:
        found: dict[str, GgufTensor] = {}
        for name, tensor in self.tensors.items():
            if name == ROPE_FACTORS:
                continue
            match = _BLOCK.fullmatch(name)
            new_name = _NAMES.get(name)
            if match and match[2] in _BLOCK_NAMES:
                new_name = f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{match[3]}"
            if new_name is None:
                raise _unsupported(f"it holds the tensor {name[:80]!r}, which plain decoders do not have")
            if tensor.type_id not in _WEIGHT_TYPES or len(tensor.shape) > 2:
                raise _unsupported(f"the tensor {name[:80]!r} is not a matrix of a known quantization")
            found[new_name] = tensor
        return found


def convert_gguf(path: Path, destination: Path, progress: Callable[[float], None] | None = None) -> None:
    """Write the checkpoint that the GGUF file at ``path`` stands for into ``destination``.

    Memory is bounded by a few megabytes of rows, whatever the model's size. ``progress`` hears fractions.

    Raises UserError ``invalid_gguf``, ``unsupported_architecture`` or ``unsupported_tokenizer``.
    """
    with GgufFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as gguf:
        config = gguf.config()
        destination.mkdir(parents=True, exist_ok=True)
        write_tokenizer(gguf.metadata, config, destination)
        write_checkpoint(gguf.named_chunks(config), destination, progress or (lambda _: None))
        generation_config = build_generation_config(gguf.metadata)
    # Last, so that a folder with a config is a whole one.
    for name, content in (("generation_config.json", generation_config), ("config.json", config)):
        (destination / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _invalid(problem: str) -> UserError:
    return UserError(
        "invalid_gguf",
        f"The GGUF file cannot be read: {problem}.",
        param="model.id",
        hint="The file is damaged or was not fully copied.",
    )


def _unsupported(problem: str) -> UserError:
    return UserError(
        "unsupported_architecture",
        f"The GGUF file cannot be converted: {problem}.",
        param="model.id",
        hint="Models of the architectures llama, qwen2 and qwen3 are converted; use safetensors for others.",
    )
