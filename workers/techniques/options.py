"""What the options of every technique have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    from torch import Tensor

    from workers.architectures import Producer
    from workers.engine.layer import Layer

Kind = Literal["pruning", "quantization", "distillation", "factorization", "sharing", "training"]
WeightScheme = Literal["W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W7A16", "W8A16"]
# One flat list each, not unions: then an error names every value that there is.
IntegerScheme = Literal["W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W7A16", "W8A16", "W8A8"]
Scheme = Literal["W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W7A16", "W8A16", "W8A8", "FP8", "NF4", "FP16", "BF16"]
Allocation = Literal["uniform", "error"]
Statistic = Literal["hessian", "input_norms", "input_absmax", "drift"]
# Block sizes that bitsandbytes knows, but for 2048 and 4096: CPUs with AVX-512 compile for a minute before those.
NORMAL_FLOAT_GROUP_SIZES = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class SchemeFacts:
    """What the name of a scheme says."""

    num_bits: int  # of one weight
    is_float: bool = False  # FP8: e4m3
    is_normal: bool = False  # 4-bit NormalFloat
    group_sizes: tuple[int, ...] | None = None  # the only ones that there are
    # Each token of a layer's input is quantized like the weights, by a scale of its own, whenever the model runs.
    quantizes_activations: bool = False
    # A cast: every tensor of the model is stored in this type of torch's, and there are no codes.
    dtype: str | None = None


SCHEMES: Mapping[str, SchemeFacts] = {
    **{scheme: SchemeFacts(int(scheme[1])) for scheme in get_args(WeightScheme)},
    "W8A8": SchemeFacts(8, quantizes_activations=True),
    "FP8": SchemeFacts(8, is_float=True, quantizes_activations=True),
    "NF4": SchemeFacts(4, is_normal=True, group_sizes=NORMAL_FLOAT_GROUP_SIZES),
    "FP16": SchemeFacts(16, is_float=True, dtype="float16"),
    "BF16": SchemeFacts(16, is_float=True, dtype="bfloat16"),
}
# compressed-tensors lays out the other widths differently from release to release.
PACKED_BITS = frozenset({4, 8})


class OptionError(ValueError):
    """An option does not go with the others; ``requirement`` continues its name to a sentence."""

    def __init__(self, option: str, requirement: str) -> None:
        super().__init__(f"{option} {requirement}")
        self.option = option


# Smaller groups would store more scale than code, and packed words hold eight 4-bit codes.
SMALLEST_GROUP = 16
GROUP_MULTIPLE = 8
_N_OF_M = re.compile(r"([1-9][0-9]{0,2}):([1-9][0-9]{0,2})")


def group_size_fits(in_features: int, size: int) -> bool:
    """Whether a layer of ``in_features`` columns can be stored in groups of ``size``."""
    return size >= SMALLEST_GROUP and size % GROUP_MULTIPLE == 0 and in_features % size == 0


def usable_group_size(in_features: int, requested: int | None, allowed: Sequence[int] | None = None) -> int:
    """The group size that a layer of ``in_features`` columns gets.

    ``requested`` if it divides the layer, else the largest smaller divisor that the format allows (of ``allowed``, if
    that is given), else one group for the whole row; None asks for the latter.
    """
    if requested is None:
        return in_features
    sizes: Sequence[int] = range(min(requested, in_features), SMALLEST_GROUP - 1, -1)
    if allowed is not None:
        sizes = [size for size in sorted(allowed, reverse=True) if size <= requested]
    return next((size for size in sizes if group_size_fits(in_features, size)), in_features)


class StageOptions(BaseModel):
    """Options that every stage has. A technique adds its own, and says what it is and what it needs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: ClassVar[Kind]
    summary: ClassVar[str]
    statistics: ClassVar[frozenset[Statistic]] = frozenset()
    rescales_inputs: ClassVar[bool] = False

    ignore: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        Field(
            description="Names or shell-style patterns of linear layers to leave as they are, for example "
            "`model.layers.0.*` or `*.down_proj`.",
            max_length=1000,
            fail_fast=True,
        ),
    ] = []

    def ignores(self, layer: str) -> bool:
        """Whether the stage leaves the layer of this name as it is."""
        return any(fnmatchcase(layer, pattern) for pattern in self.ignore)

    @property
    def needs(self) -> frozenset[Statistic]:
        """What the stage needs from calibration with these options."""
        return self.statistics

    @property
    def plan_share(self) -> float:
        """What part of the job's time goes into measuring, before the first layer is compressed, how to treat each.

        Roughly, for the progress; 0 where all are treated alike.
        """
        return 0.0

    def at(self, choice: float) -> StageOptions:
        """The stage as it is for a layer that such a plan gives ``choice``."""
        raise NotImplementedError

    def input_scale(self, layers: Sequence[Layer], producer: Producer) -> Tensor:
        """By what to divide the input that all ``layers`` read, and to multiply their columns.

        Asked before they are compressed, only where ``producer``, which makes the input, can take the scale over, and
        only of a stage that says ``rescales_inputs``.
        """
        raise NotImplementedError

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Change ``layer`` in place and return what the report says of it."""
        raise NotImplementedError


class QuantizationOptions(StageOptions):
    """Options of a technique that stores linear layers as integers with scales."""

    kind: ClassVar[Kind] = "quantization"

    scheme: Annotated[
        Scheme,
        Field(
            description="Bits of weights and of activations. Widths other than 4 and 8 have no stable packed layout: "
            "their values are stored at the model's own width, and the report states the packed size. W8A8 and FP8 "
            "also quantize each token of a layer's input when the model runs. NF4 is 4-bit NormalFloat. FP16 and BF16 "
            "cast the whole model."
        ),
    ] = "W4A16"
    group_size: Annotated[
        int | None,
        Field(
            ge=1,
            le=1_048_576,
            description="Input columns that share a scale; null for one scale per output channel, as W8A8 and FP8 "
            "always have. NF4 takes powers of two from 32 to 1024, and 64 where nothing is said. A layer that it does "
            "not divide falls back to its largest usable divisor, and the report says so.",
        ),
    ] = 128
    symmetric: Annotated[bool, Field(description="No zero-points: code 0 is the value 0.")] = True
    embeddings: Annotated[
        bool,
        Field(
            description="Also round the token embedding and the output head, on the same grid; a matrix that both "
            "share is stored once. A fifth of a small model is its embedding."
        ),
    ] = False

    @model_validator(mode="before")
    @classmethod
    def _group_size_of_scheme(cls, data: Any) -> Any:
        if isinstance(data, dict) and "group_size" not in data:
            scheme = SCHEMES.get(str(data.get("scheme", cls.model_fields["scheme"].default)))
            if scheme is not None and (scheme.quantizes_activations or scheme.dtype):
                return {**data, "group_size": None}
            if scheme is not None and scheme.is_normal:
                return {**data, "group_size": 64}
        return data

    @model_validator(mode="after")
    def _fits_scheme(self) -> Self:
        if self.facts.quantizes_activations or self.facts.dtype:
            if self.group_size is not None:
                raise OptionError("group_size", f"must be null with {self.scheme}")
            if not self.symmetric:
                raise OptionError("symmetric", f"must be true with {self.scheme}")
            if self.embeddings:
                raise OptionError("embeddings", f"must be false with {self.scheme}, which does without")
        if self.facts.is_normal:
            if self.group_size not in NORMAL_FLOAT_GROUP_SIZES:
                sizes = ", ".join(map(str, NORMAL_FLOAT_GROUP_SIZES))
                raise OptionError("group_size", f"must be one of {sizes} with {self.scheme}")
            if not self.symmetric:
                raise OptionError("symmetric", f"must be true with {self.scheme}, whose blocks have no zero-points")
            if self.embeddings:
                raise OptionError(
                    "embeddings", f"must be false with {self.scheme}: transformers reads linear layers alone"
                )
        if self.facts.dtype and self.ignore:
            raise OptionError("ignore", f"must be empty with {self.scheme}, which casts the whole model")
        if self.embeddings and self.group_size is None and not self.symmetric:
            raise OptionError(
                "group_size",
                "must be a number where embeddings have zero-points, so that all matrices share one layout",
            )
        return self

    @property
    def facts(self) -> SchemeFacts:
        """What the scheme's name says."""
        return SCHEMES[self.scheme]

    @classmethod
    def facts_of(cls, stage: Mapping[str, Any]) -> SchemeFacts | None:
        """The same of a stage that is not yet validated; None where it names no scheme."""
        return SCHEMES.get(str(stage.get("scheme", cls.model_fields["scheme"].default)))

    def scale_bits(self, num_bits: int) -> float:
        """Bits that the scale of a group takes where codes of ``num_bits`` are packed, with its zero-point."""
        return 16 if self.symmetric else 16 + num_bits


class PruningOptions(StageOptions):
    """Options of a technique that sets single weights of linear layers to zero."""

    kind: ClassVar[Kind] = "pruning"

    sparsity: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="Fraction of weights that become zero. Left out: what an N:M mask gives, else 0.5.",
        ),
    ] = None
    mask_structure: Annotated[
        str,
        Field(
            description="`unstructured`, or `N:M`: at most N of every M consecutive input columns are not zero, "
            "for example `2:4`."
        ),
    ] = "unstructured"

    allocation: Annotated[
        Allocation,
        Field(
            description="`uniform`: every layer has the same sparsity. `error`: layers that lose more get less, and "
            "others more, at the same number of zeros in every block. What a layer loses is measured beforehand, in a "
            "pass of the uncompressed model over a part of the calibration text."
        ),
    ] = "uniform"

    @field_validator("mask_structure")
    @classmethod
    def _known_structure(cls, value: str) -> str:
        match = _N_OF_M.fullmatch(value)
        if value != "unstructured" and (match is None or int(match[1]) >= int(match[2])):
            raise ValueError("must be `unstructured` or `N:M` with N below M, for example `2:4`")
        return value

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_mask(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sparsity") is None:
            match = _N_OF_M.fullmatch(str(data.get("mask_structure", "unstructured")))
            fraction = 1 - int(match[1]) / int(match[2]) if match and int(match[1]) < int(match[2]) else 0.5
            return {**data, "sparsity": fraction}
        return data

    @model_validator(mode="after")
    def _sparsity_agrees(self) -> Self:
        if self.pattern is not None and self.sparsity is not None:
            n, m = self.pattern
            if abs(self.sparsity - (1 - n / m)) > 1e-6:
                raise OptionError(
                    "sparsity", f"must be {1 - n / m:g} with mask_structure {self.mask_structure}; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _mask_leaves_a_choice(self) -> Self:
        if self.pattern is not None and self.allocation != "uniform":
            raise OptionError(
                "allocation",
                f"must be uniform with mask_structure {self.mask_structure}, which gives all layers one sparsity",
            )
        return self

    @property
    def plan_share(self) -> float:
        """A short pass, where layers have sparsities of their own."""
        return 0.1 if self.allocation == "error" else 0.0

    def sparsity_of(self, layer: Layer) -> float:
        """What ``layer`` gets: less than is asked for where an N:M mask does not cover all of its columns."""
        assert self.sparsity is not None
        if self.pattern is None:
            return self.sparsity
        columns, (n, m) = layer.weight.shape[1], self.pattern
        rest = columns % m
        if rest:
            layer.fall_back("mask_structure", f"{rest} of its {columns} columns stay as they are: {m} does not divide")
        return (columns - rest) / columns * (1 - n / m)

    def at(self, choice: float) -> Self:
        """The stage with the sparsity of one layer."""
        return self.model_copy(update={"sparsity": choice})

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(N, M): N weights kept in every M, as in Zhou et al. 2021 (arXiv:2102.04010); None when unstructured."""
        match = _N_OF_M.fullmatch(self.mask_structure)
        return (int(match[1]), int(match[2])) if match else None
