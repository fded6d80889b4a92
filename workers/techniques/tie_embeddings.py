"""Tied embeddings: one matrix reads tokens and writes them (Press & Wolf 2017)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from workers.techniques.options import Kind
from workers.techniques.structure_options import StructureOptions

Matrix = Literal["mean", "embedding", "head"]


class TieEmbeddings(StructureOptions):
    """One matrix for the embedding and the head; arXiv:1608.05859."""

    kind: ClassVar[Kind] = "sharing"
    summary: ClassVar[str] = "Makes the token embedding and the output head one matrix; costs much without training."

    technique: Literal["tie_embeddings"] = "tie_embeddings"
    keep: Annotated[
        Matrix,
        Field(
            description="Which matrix stays: the `mean` of both, which are nearly at right angles, so that each is "
            "still in it; or the `embedding`, or the `head`, after which the other's work is done by a stranger."
        ),
    ] = "mean"
