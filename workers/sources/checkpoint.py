"""What a checkpoint must hold, wherever its files are: on disk, on the hub or in the storage of artifacts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from workers.errors import UserError
from workers.formats import load_compact, load_sparse
from workers.sources.safetensors_header import MAX_HEADER_BYTES, TensorInfo, read_header

MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_SHARDS = 2_000
_MAX_DEPTH = 64

CONFIG = "config.json"
SINGLE_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# What loaders look for, in this order; a sparse-bitmask archive is taken for the dense weights that it stands for.
_SPARSE_WEIGHTS = (load_sparse.WEIGHTS, load_sparse.WEIGHTS_INDEX)
_COMPACT_WEIGHTS = (load_compact.WEIGHTS, load_compact.WEIGHTS_INDEX)
_WEIGHTS = ((SINGLE_WEIGHTS, WEIGHTS_INDEX), _COMPACT_WEIGHTS, _SPARSE_WEIGHTS)

# Any one of these sets is a tokenizer.
TOKENIZERS = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
    {"spiece.model"},
    {"sentencepiece.bpe.model"},
)
# Nothing else is ever fetched or shown to a loader. Adapters are missing on purpose: loaders merge them unasked.
COMPANIONS = frozenset().union(*TOKENIZERS) | {
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
}

# Keys of config.json and tokenizer_config.json that name Python modules, kernels of the hub, or other files.
_CODE = frozenset(
    {
        "auto_map",
        "custom_pipelines",
        "transformers_weights",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
    }
)
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class FileSource(Protocol):
    """Files of one folder, flat, with their sizes; any range of any of them can be read."""

    @property
    def files(self) -> Mapping[str, int]:
        """Sizes in bytes by name."""
        ...

    def read(self, path: str, start: int, length: int) -> bytes:
        """At most ``length`` bytes of ``path`` from ``start``; fewer only at its end."""
        ...


@dataclass(frozen=True)
class ArtifactFacts:
    """An earlier job's artifact: its files' sizes, and how to read a range of one."""

    files: Mapping[str, int]
    read_file: Callable[[str, int, int], bytes]

    def read(self, path: str, start: int, length: int) -> bytes:
        """A range of an artifact's file."""
        return self.read_file(path, start, length)


@dataclass(frozen=True)
class Checkpoint:
    """A checked safetensors checkpoint: parsed config, tensors by name, and the files that make it up.

    Of a sparse-bitmask archive the tensors are the weights that it stands for, with the bytes that it stores them in.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[str, ...]
    files: tuple[tuple[str, int], ...]
    is_sparse: bool


def read_checkpoint(source: FileSource, *, num_threads: int = 1) -> Checkpoint:
    """Check config, tokenizer and every safetensors header of ``source``.

    Raises UserError: ``config_missing``, ``invalid_config``, ``tokenizer_missing``, ``weights_missing``,
    ``pickle_only_model``, ``invalid_safetensors``.
    """
    config = read_config(source)
    check_tokenizer(source.files)
    shards, index, weight_map = _find_shards(source)
    tensors = _read_headers(source, shards, weight_map, num_threads)
    is_sparse = (index or shards[0]) in _SPARSE_WEIGHTS
    if (load_compact.KEY in config) != ((index or shards[0]) in _COMPACT_WEIGHTS):
        raise _refusal(
            "invalid_config",
            f"config.json has an entry {load_compact.KEY!r} if, and only if, the weights are {load_compact.WEIGHTS}.",
            "Take config.json and the weights from the same artifact.",
        )
    names = sorted({*(COMPANIONS & source.files.keys()), *shards, *([] if index is None else [index])})
    files = tuple((name, source.files[name]) for name in names)
    return Checkpoint(config, _as_dense(tensors) if is_sparse else tensors, shards, files, is_sparse)


def read_config(source: FileSource) -> dict[str, Any]:
    """The parsed ``config.json``; raises UserError ``config_missing`` or ``invalid_config``."""
    if CONFIG not in source.files:
        raise _refusal("config_missing", "The model has no config.json.", "Add the config.json that its loader needs.")
    config = read_json(source, CONFIG, MAX_CONFIG_BYTES)
    if not isinstance(config.get("model_type"), str):
        raise _refusal("invalid_config", "config.json names no model_type.", "Write it with save_pretrained.")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise _refusal("invalid_config", "architectures in config.json is not a list of names.", "Correct it.")
    return without_code(config)


def without_code(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without what makes a loader run code, or open files, that the model's author chose."""
    return {key: _plain(value) for key, value in settings.items() if key not in _CODE and not key.endswith("_file")}


def _plain(value: object) -> object:
    return without_code(value) if isinstance(value, dict) else value


def read_json(source: FileSource, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from an untrusted file; raises UserError ``invalid_config``."""
    hint = f"{name} must be a JSON object of at most {max_bytes} bytes."
    if source.files[name] > max_bytes:
        raise _refusal("invalid_config", f"{name} is too large.", hint)
    try:
        # As its loaders read it: UTF-8, without a byte order mark.
        data = json.loads(source.read(name, 0, source.files[name]).decode("utf-8"))
    except (ValueError, RecursionError):
        raise _refusal("invalid_config", f"{name} is not JSON in UTF-8.", hint) from None
    if not isinstance(data, dict):
        raise _refusal("invalid_config", f"{name} is not a JSON object.", hint)
    if not _is_shallow(data):
        raise _refusal("invalid_config", f"{name} is nested more than {_MAX_DEPTH} deep.", hint)
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _refusal("invalid_config", f"{name} holds half of a surrogate pair.", hint) from None
    return data


def _is_shallow(value: object) -> bool:
    """Whether what walks ``value`` by recursion, here or in a loader, stays far from the interpreter's limit."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for parent in level for child in _children(parent) if isinstance(child, dict | list)]
        if not level:
            return True
    return False


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def check_tokenizer(names: Iterable[str]) -> None:
    """Raise UserError ``tokenizer_missing`` unless the files hold some tokenizer."""
    present = set(names)
    if not any(files <= present for files in TOKENIZERS):
        raise _refusal(
            "tokenizer_missing",
            "The model has no tokenizer.",
            "Add tokenizer.json (or tokenizer.model, or vocab.json with merges.txt) beside config.json.",
        )


def _find_shards(source: FileSource) -> tuple[tuple[str, ...], str | None, dict[str, str]]:
    """The weight files, in the order of preference that loaders have, and the index if it decides: name, content."""
    for single, index in _WEIGHTS:
        if single in source.files:
            return (single,), None, {}
        if index not in source.files:
            continue
        weight_map = read_json(source, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _unsound("The index of the weights has no weight_map.")
        # The value comes from the file: a name such as ../other.safetensors must not reach any open().
        if not all(isinstance(shard, str) and _SHARD.fullmatch(shard) for shard in weight_map.values()):
            raise _unsound("The index of the weights names a file outside the model's folder.")
        shards = tuple(sorted(set(weight_map.values())))
        if len(shards) > MAX_SHARDS:
            raise _unsound(f"The index of the weights names more than {MAX_SHARDS} files.")
        missing = [shard for shard in shards if shard not in source.files]
        if missing:
            raise _refusal(
                "weights_missing",
                f"{len(missing)} of {len(shards)} weight files are missing, among them {missing[0]}.",
                f"Copy every file that {index} names.",
            )
        return shards, index, weight_map
    if any(name.endswith(_PICKLES) for name in source.files):
        raise _refusal(
            "pickle_only_model",
            "The model's weights are only there as Python pickles, which can run code when they are opened.",
            "Convert them with save_pretrained(safe_serialization=True) and send safetensors.",
        )
    raise _refusal(
        "weights_missing",
        "The model has no model.safetensors and no model.safetensors.index.json.",
        "Add the weights as safetensors; a GGUF file has to lie in a file: folder of its own.",
    )


def _read_headers(
    source: FileSource, shards: tuple[str, ...], weight_map: dict[str, str], num_threads: int
) -> dict[str, TensorInfo]:
    def header(shard: str) -> tuple[dict[str, TensorInfo], int]:
        def read(start: int, length: int) -> bytes:
            return source.read(shard, start, length)

        return read_header(read, source.files[shard], shard)

    tensors: dict[str, TensorInfo] = {}
    total_bytes = 0
    with ThreadPoolExecutor(num_threads) as pool:
        # A few shards at a time, so that the limit on all headers together stops a flood of large ones early.
        for first in range(0, len(shards), num_threads):
            batch = shards[first : first + num_threads]
            for shard, (found, header_bytes) in zip(batch, pool.map(header, batch), strict=True):
                total_bytes += header_bytes
                if total_bytes > MAX_HEADER_BYTES:
                    raise _unsound(f"The headers of the weight files exceed {MAX_HEADER_BYTES} bytes together.")
                if found.keys() & tensors.keys():
                    raise _unsound(f"{shard} holds a tensor that another weight file holds too.")
                if any(weight_map.get(name, shard) != shard for name in found):
                    raise _unsound(f"The index of the weights does not agree with what {shard} holds.")
                tensors.update(found)
    if not weight_map.keys() <= tensors.keys():
        raise _unsound("The index of the weights names tensors that no weight file holds.")
    if not tensors:
        raise _refusal("weights_missing", "The weight files hold no tensor.", "Write the model's weights again.")
    return tensors


def _as_dense(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The weights that the tensors of a sparse-bitmask archive stand for, with the bytes that they are stored in."""
    stored = {
        name: load_sparse.StoredTensor(Path(), tensor.dtype, tensor.shape, 0, tensor.num_bytes)
        for name, tensor in tensors.items()
    }
    try:
        dense = load_sparse.pair(stored)
    except ValueError as error:
        raise _unsound(f"The sparse archive is not sound: {error}.") from None
    return {
        each.name: TensorInfo(each.dtype, each.shape, sum(part.num_bytes for part in each.stored)) for each in dense
    }


def _unsound(message: str) -> UserError:
    return _refusal("invalid_safetensors", message, "Write the checkpoint again with save_pretrained.")


def _refusal(code: str, message: str, hint: str) -> UserError:
    return UserError(code, message, param="model.id", hint=hint)
