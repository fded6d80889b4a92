"""What the options of techniques that change the shape of a model have in common."""

from __future__ import annotations

from typing import Literal

from workers.techniques.options import StageOptions

# By what heads, neurons and channels are told apart.
Importance = Literal["activations", "magnitude"]


class StructureOptions(StageOptions):
    """Options of a technique that changes what the config says of the model: its sizes, or what its attention sees."""

    @property
    def reshapes(self) -> bool:
        """That is what it is for."""
        return True
