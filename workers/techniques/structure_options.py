"""What the options of techniques that change the shape of a model have in common."""

from __future__ import annotations

from workers.techniques.options import StageOptions


class StructureOptions(StageOptions):
    """Options of a technique after which the model has fewer parameters, and a config that says so."""
