"""Low rank: two thin factors in place of a weight, by its SVD on whitened inputs (Wang et al. 2024)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from workers.techniques.options import Kind, LayerOptions, OptionError, Statistic

if TYPE_CHECKING:
    from workers.engine.layer import Layer

_SIZES = ("rank", "ratio", "energy")


class LowRank(LayerOptions):
    """Activation-whitened singular value decomposition; arXiv:2403.07378."""

    kind: ClassVar[Kind] = "factorization"
    summary: ClassVar[str] = (
        "Makes each weight two thin ones that err least on the calibration text's inputs: fewer weights and products; "
        "opened by a loader that lies in the artifact."
    )
    statistics: ClassVar[frozenset[Statistic]] = frozenset({"hessian"})
    leaves_model: ClassVar[bool] = True

    technique: Literal["low_rank"] = "low_rank"
    rank: Annotated[
        int | None,
        Field(ge=1, le=2**24, description="Columns of the first factor of every layer; this, `ratio` or `energy`."),
    ] = None
    ratio: Annotated[
        float | None,
        Field(gt=0, lt=1, description="What fraction of a layer's weights its two factors have together."),
    ] = None
    energy: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="What fraction of the mean square of a layer's output, on the calibration text, is kept at "
            "least. Layers that carry much in few directions get a low rank, others a high one.",
        ),
    ] = None
    multiple_of: Annotated[
        int,
        Field(
            ge=1,
            le=65_536,
            description="What ranks are rounded to a multiple of: down for `ratio`, up for `energy`, never to zero. "
            "`rank` is taken as it is.",
        ),
    ] = 8
    damping: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Added to the Hessian's diagonal, as a fraction of its mean, so that directions that the "
            "calibration text does not show count for something.",
        ),
    ] = 0.01

    @model_validator(mode="after")
    def _says_how_small(self) -> Self:
        given = [name for name in _SIZES if getattr(self, name) is not None]
        if len(given) != 1:
            raise OptionError("rank" if not given else given[1], "must be given alone: one of rank, ratio and energy")
        if self.rank is not None and self.multiple_of != type(self).model_fields["multiple_of"].default:
            raise OptionError("multiple_of", "must be left out where rank is given, which is taken as it is")
        return self

    def compress(self, layer: Layer) -> dict[str, Any]:
        """Factor ``layer``, unless its factors would have no fewer weights."""
        from workers.solvers.hessian import energy_of
        from workers.solvers.low_rank import factors, spectrum

        hessian = layer.statistics.hessian
        rows, columns = layer.weight.shape
        rank = self.least_rank(rows, columns)
        if rank <= largest_rank(rows, columns):
            found = spectrum(layer.weight, layer.statistics.whitening(self.damping))
            if self.energy is not None:
                rank = -(-found.rank_of(self.energy) // self.multiple_of) * self.multiple_of
        if rank > largest_rank(rows, columns):
            layer.fall_back("not_smaller", f"left as it is: of rank {rank} it would have no fewer weights")
            return {"rank": None, "ratio": 1.0, "relative_error": 0.0}
        layer.factors = factors(layer.weight, found, rank)
        energy = energy_of(layer.weight, hessian)
        error = energy_of(layer.weight - layer.effective_weight(), hessian)
        return {
            "rank": rank,
            "ratio": rank * (rows + columns) / (rows * columns),
            "relative_error": error / energy if energy > 0 else 0.0,
        }

    def least_rank(self, rows: int, columns: int) -> int:
        """What a weight of rows × columns gets, or with ``energy`` gets at least."""
        if self.rank is not None:
            return self.rank
        if self.ratio is None:
            return self.multiple_of
        return max(1, int(rank_for(self.ratio, rows, columns) / self.multiple_of + 1e-9)) * self.multiple_of


def rank_for(ratio: float, rows: int, columns: int) -> float:
    """At what rank two factors have ``ratio`` times the weights of rows × columns."""
    return ratio * rows * columns / (rows + columns)


def largest_rank(rows: int, columns: int) -> int:
    """The largest rank at which two factors have fewer weights than rows × columns; 0 where there is none."""
    return math.ceil(rows * columns / (rows + columns)) - 1
