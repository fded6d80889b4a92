"""What the options of techniques that change the shape of a model have in common."""

from __future__ import annotations

from workers.techniques.options import StageOptions


class StructureOptions(StageOptions):
    """Options of a technique that changes what the config says of the model: its sizes, or what its attention sees."""
