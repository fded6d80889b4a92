"""Weights that a checkpoint stores as codes, as its config.json says: compressed-tensors, and NF4 of bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.errors import UserError

_PACKED_SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


class CodedWeights(Protocol):
    """How the codes of a checkpoint are read."""

    mark: str  # of the tensors of a module whose weight is stored as codes, the one that no other module has

    def parameter_of(self, stored: str, /) -> str:
        """The parameter that a stored tensor belongs to."""

    def dtype_of(self, mark: Tensor) -> torch.dtype:
        """The floating-point type that a weight stands for, from the tensor called :attr:`mark`."""

    def spares(self, module: str, /) -> bool | None:
        """Whether config.json says that a linear layer has no codes; None where transformers finds it out unread."""

    def decode(self, module: str, stored: dict[str, Tensor], /) -> Tensor:
        """The float32 weight of ``module`` as the model has it, from its tensors by their names within it."""

    def input_quantizer(self, module: str, /) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """What loaders do to the input of ``module``, and a text that modules with the same share; None for nothing."""


def coded_weights_of(
    description: Mapping[str, Any] | None, *, is_transposed: Callable[[str], bool]
) -> CodedWeights | None:
    """How weights are stored whose config.json has this ``quantization_config``; None where all are plain.

    ``is_transposed`` says of a linear layer whether it has its weight as in_features × out_features.

    Raises UserError ``unsupported_quantization``.
    """
    if description is None:
        return None
    method = description.get("quant_method")
    if method == "compressed-tensors":
        return _CompressedTensors(description)
    if method == "bitsandbytes" and description.get("bnb_4bit_quant_type") == "nf4":
        return _NormalFloats(description, is_transposed=is_transposed)
    raise UserError(
        "unsupported_quantization",
        f"The model is already quantized by {method!r}.",
        param="model.id",
        hint="Give the original checkpoint, or an earlier compressed-tensors result.",
    )


class _CompressedTensors:
    """The schemes that config.json describes, read by the library itself."""

    mark = "weight_scale"

    def __init__(self, description: Mapping[str, Any]) -> None:
        from compressed_tensors.quantization import QuantizationConfig

        self._config = QuantizationConfig.model_validate(
            {key: value for key, value in description.items() if key not in {"sparsity_config", "dequantize"}}
        )
        self._unpacks_on_load = bool(description.get("dequantize"))

    def parameter_of(self, stored: str, /) -> str:
        module, _, last = stored.rpartition(".")
        return f"{module}.weight" if last in _PACKED_SUFFIXES else stored

    def dtype_of(self, mark: Tensor) -> torch.dtype:
        return mark.dtype

    def spares(self, _module: str, /) -> None:
        return None

    def decode(self, module: str, stored: dict[str, Tensor], /) -> Tensor:
        from compressed_tensors.compressors import BaseCompressor

        scheme = self._scheme(module)
        dtype = stored["weight_scale"].dtype
        stored["weight_scale"] = stored["weight_scale"].to(torch.float32)
        compressor = BaseCompressor.get_value_from_registry(scheme.format or self._config.format)
        weight: Tensor = compressor.decompress(stored, scheme)["weight"]
        # Loaders that unpack while they read round to the checkpoint's type.
        return weight.to(dtype).to(torch.float32) if self._unpacks_on_load else weight

    def input_quantizer(self, module: str, /) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        from workers.formats.compressed_tensors import quantizer_of

        arguments = self._scheme(module).input_activations
        if arguments is None or self._unpacks_on_load:
            return None
        return arguments.model_dump_json(), quantizer_of(arguments)

    def _scheme(self, module: str) -> Any:
        from compressed_tensors.utils import match_name

        for scheme in self._config.config_groups.values():
            if any(target == "Linear" or match_name(module, target) for target in scheme.targets):
                return scheme
        raise UserError(
            "unsupported_quantization",
            f"config.json does not say how {module} is quantized.",
            param="model.id",
            hint="Give the original checkpoint.",
        )


class _NormalFloats:
    """bitsandbytes' 4-bit form of one of our artifacts, decoded by it: fetch refuses that of others."""

    mark = "weight.quant_state.bitsandbytes__nf4"

    def __init__(self, description: Mapping[str, Any], *, is_transposed: Callable[[str], bool]) -> None:
        self._is_transposed = is_transposed
        self._spared = frozenset(description.get("llm_int8_skip_modules") or ())

    def spares(self, module: str, /) -> bool:
        return module in self._spared

    def parameter_of(self, stored: str, /) -> str:
        module, found, _ = stored.partition(".weight.")
        return f"{module}.weight" if found else stored

    def dtype_of(self, mark: Tensor) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, json.loads(bytes(mark.tolist()))["dtype"])
        return dtype

    def decode(self, module: str, stored: dict[str, Tensor], /) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        codes = stored.pop("weight")
        state = QuantState.from_dict(stored, codes.device)
        state.dtype = torch.float32
        weight: Tensor = dequantize_4bit(codes, state)
        # Codes are always of out_features × in_features.
        return weight.T.contiguous() if self._is_transposed(module) else weight

    def input_quantizer(self, _module: str, /) -> None:
        return None
