"""What is known of a model from its config and headers alone, before a single weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from workers.architectures import Architecture, row_of
from workers.architectures.compact import IN_FACTOR, OUT_FACTOR, compact_of, is_transposed, problem_of
from workers.errors import UserError
from workers.sources.safetensors_header import TensorInfo

SourceFormat = Literal["safetensors", "sparse-bitmask", "gguf"]

# compressed-tensors stores these beside a layer's codes; they are no parameters of the model.
_BOOKKEEPING = (".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".weight_global_scale")
_PACKED = ".weight_packed"
_MAX_DIMENSION = 2**24
_SIZES = (
    "hidden_size", "embedding_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
_SIZES_OF_ATTENTION = ("intermediate_size", "num_attention_heads")
_MAX_LABELS = 10_000  # transformers makes a name for each
_DTYPES = ("float16", "bfloat16", "float32", "float64", "auto")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ModelFacts:
    """A checked model. ``parameter_bytes`` counts every tensor at its stored dtype (bf16 for a GGUF source)."""

    model_id: str
    revision: str | None
    config: dict[str, Any]
    source_format: SourceFormat
    files: tuple[tuple[str, int], ...]
    parameter_bytes: int
    num_parameters: int
    source_file_bytes: int
    linear_in_features: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON's form of it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelFacts:
        """The inverse of :meth:`to_dict`, also after a way through JSON."""
        files = tuple((str(path), int(size)) for path, size in data["files"])
        return cls(**{**data, "files": files, "linear_in_features": tuple(data["linear_in_features"])})


def without_tied_head(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors but for a head that is stored beside the embedding it is tied to: they are one parameter."""
    row = row_of(config)
    if row is None or not _embedding(row, tensors):
        return dict(tensors)
    tied = tuple(row.tied_parameters(config))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(tied)}


def canonical(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The parameters among the tensors, by the names that the model has for them.

    Raises UserError ``checkpoint_mismatch`` where two tensors have one.
    """
    row = row_of(config)
    if row is None:
        return dict(tensors)
    stored_as: dict[str, str] = {}
    for stored in tensors:
        name = row.canonical(stored)
        if name is not None and (other := stored_as.setdefault(name, stored)) != stored:
            raise UserError(
                "checkpoint_mismatch",
                f"{other} and {stored} are stored for one parameter, {name}: loaders differ in which they take.",
                param="model.id",
                hint="Remove the one that is not meant, or save the model with save_pretrained of transformers.",
            )
    return {name: tensors[stored] for name, stored in stored_as.items()}


def count_parameters(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> int:
    """The weights that the tensors stand for: packed codes count as the weights that they hold."""
    total = 0
    for name, tensor in tensors.items():
        if name.endswith(_PACKED):
            total += tensor.num_elements * _codes_a_word(config)
        elif not name.endswith(_BOOKKEEPING):
            total += tensor.num_elements
    return total


def linear_in_features(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """The distinct input widths of the blocks' linear layers; empty for an architecture that is not in the table."""
    row = row_of(config)
    if row is None:
        return ()
    widths = set()
    names = [f".{layer}{factor}" for layer in row.linear_layers for factor in ("", f".{IN_FACTOR}", f".{OUT_FACTOR}")]
    layers = tuple(f"{name}{end}" for name in names for end in (".weight", _PACKED))
    for name, tensor in tensors.items():
        if name.startswith(row.blocks + ".") and name.endswith(layers) and len(tensor.shape) == 2:
            if name.endswith(_PACKED):
                widths.add(tensor.shape[1] * _codes_a_word(config))
            elif name.endswith(".weight"):
                widths.add(tensor.shape[0 if is_transposed(row, name.removesuffix(".weight")) else 1])
    return tuple(sorted(widths))


def check_config(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a config that its weights contradict: a loader would allocate or invent what it claims.

    Raises UserError ``invalid_config``, ``weights_missing`` or ``unsupported_quantization``.
    """
    quantization = config.get("quantization_config")
    if quantization is not None:
        _check_quantization(quantization)
        if not any(name.endswith(_BOOKKEEPING) for name in tensors):
            raise _invalid("quantization_config is there, and no tensor is quantized")
    row = row_of(config)
    if row is None:
        return
    optional = {*_OPTIONAL_SIZES, *(_SIZES_OF_ATTENTION if row.is_recurrent else ())}
    for size in dict.fromkeys((*_SIZES, *_OPTIONAL_SIZES, *row.default_sizes)):
        key = row.size(size)
        value = config.get(key, row.default_sizes.get(size))
        if value is None and (size in optional or key == "n_inner"):
            continue
        if type(value) is not int or not 1 <= value <= _MAX_DIMENSION:
            raise _invalid(f"{key} in config.json is not a positive number of a sensible size")
    if problem := problem_of(row, config):
        raise _invalid(problem)
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and dtype not in _DTYPES:
        raise _invalid(f"dtype in config.json is not one of {', '.join(_DTYPES)}")
    if type(num_labels := config.get("num_labels", 2)) is not int or not 0 <= num_labels <= _MAX_LABELS:
        raise _invalid("num_labels in config.json is not a number of a sensible size")
    embedding = _embedding(row, tensors)
    if embedding is None:
        raise _missing(f"{row.embedding}.weight")
    columns = config[row.size("embedding_size")]
    if f"{row.embedding}{_PACKED}" in tensors:
        columns = -(-columns // _codes_a_word(config))
    if embedding.shape != (config["vocab_size"], columns):
        raise _invalid(
            f"vocab_size and {row.size('embedding_size')} in config.json do not fit the embedding of shape "
            f"{embedding.shape}"
        )
    _check_dtypes(tensors)
    _check_blocks(row, config, tensors)
    heads = {f"{row.head}{suffix}" for suffix in (".weight", _PACKED)}
    if not row.is_tied(config) and not heads & set(tensors):
        raise _missing(f"{row.head}.weight")


def _embedding(row: Architecture, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    return tensors.get(f"{row.embedding}.weight") or tensors.get(f"{row.embedding}{_PACKED}")


def _check_dtypes(tensors: Mapping[str, TensorInfo]) -> None:
    for name, tensor in tensors.items():
        if name.endswith((*_BOOKKEEPING, _PACKED)) or tensor.dtype in _FLOATS:
            continue
        # Codes may be stored one byte each, beside their scale.
        if tensor.dtype in ("I8", "F8_E4M3") and f"{name}_scale" in tensors:
            continue
        raise _invalid(f"{name} is of type {tensor.dtype}, not one of {', '.join(_FLOATS)}")


def _check_blocks(row: Architecture, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    compact, num_blocks = compact_of(config), config[row.size("num_hidden_layers")]
    index = re.compile(rf"{re.escape(row.blocks)}\.([0-9]{{1,8}})\.")
    present = {int(match[1]) for name in tensors if (match := index.match(name))}
    # Counted, and not listed: config.json may claim millions.
    is_each_own = all(number < num_blocks and f"{row.blocks}.{number}" not in compact.sources for number in present)
    if not is_each_own or len(present) != num_blocks - len(compact.sources):
        raise _invalid(f"num_hidden_layers in config.json is {num_blocks} and the weights hold {len(present)} blocks")
    for number in sorted(present):
        block = f"{row.blocks}.{number}"
        for layer in (each for group in compact.groups(row, block) for each in group):
            name = f"{block}.{layer}"
            tensor = tensors.get(f"{name}.weight") or tensors.get(f"{name}{_PACKED}")
            if tensor is None:
                raise _missing(f"{name}.weight")
            if len(tensor.shape) != 2 or 0 in tensor.shape:
                raise _invalid(f"{name} has the shape {tensor.shape}, not that of a linear layer")


def _codes_a_word(config: Mapping[str, Any]) -> int:
    """Codes in one 32-bit word of ``weight_packed``."""
    return 32 // _packed_bits(config.get("quantization_config"))


def _packed_bits(quantization: object) -> int:
    groups = quantization.get("config_groups") if isinstance(quantization, Mapping) else None
    values = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in values if isinstance(group, Mapping)]
    bits = [weight.get("num_bits") for weight in weights if isinstance(weight, Mapping)]
    if not bits or bits[0] not in (1, 2, 4, 8) or any(width != bits[0] for width in bits):
        raise _unsupported("its packed weights do not all have one width of 1, 2, 4 or 8 bits")
    return int(bits[0])


def _check_quantization(quantization: object) -> None:
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method != "compressed-tensors":
        raise _unsupported(f"it is already quantized with {str(method)[:40]!r}")


def _unsupported(problem: str) -> UserError:
    return UserError(
        "unsupported_quantization",
        f"The model cannot be read: {problem}.",
        param="model.id",
        hint="Start from the unquantized model, or from a compressed-tensors checkpoint with one scheme.",
    )


def _invalid(problem: str) -> UserError:
    return UserError(
        "invalid_config",
        f"The model's config does not fit its weights: {problem}.",
        param="model.id",
        hint="Take config.json and the weights from the same save_pretrained.",
    )


def _missing(name: str) -> UserError:
    return UserError(
        "weights_missing",
        f"The checkpoint lacks the tensor {name}.",
        param="model.id",
        hint="Write the whole model with save_pretrained; a loader would fill the gap with random numbers.",
    )
