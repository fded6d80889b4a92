"""Whether factors of low rank can have fewer weights than the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.errors import UserError
from workers.shapes.matrices import layers_of_block
from workers.techniques import LowRank
from workers.techniques.low_rank import largest_rank


def check_ranks(stage: LowRank, param: str, config: Mapping[str, Any]) -> None:
    """Refuse a stage, at ``param``, that would leave every layer as it is; one that fits some leaves the others.

    Raises UserError ``nothing_changed``.
    """
    layers = layers_of_block(config)
    if any(stage.least_rank(*shape) <= largest_rank(*shape) for shape in layers):
        return
    most = max(largest_rank(*shape) for shape in layers)
    if stage.rank is not None:
        option, hint = "rank", f"Ask for a rank of {most} or less."
    else:
        option, hint = "multiple_of", f"Choose {most} or less, to which ranks are rounded."
    raise UserError(
        "nothing_changed",
        f"Of a rank above {most} no layer of this model would have fewer weights as two factors.",
        param=f"{param}.{option}",
        hint=hint,
    )
