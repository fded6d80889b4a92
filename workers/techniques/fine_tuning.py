"""Fine-tuning: the model learns the user's task from the text itself."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from workers.techniques.training_options import TrainingOptions


class FineTuning(TrainingOptions):
    """Hard targets alone: the next token of the text, or the label of a text."""

    summary: ClassVar[str] = "Trains the model on text of yours, or as a classifier on labelled text: makes teachers."

    technique: Literal["fine_tuning"] = "fine_tuning"
    task: Annotated[
        Literal["causal", "classification"] | None,
        Field(
            description="What the model is to do. `classification` gives an encoder without such a head one, with a "
            "class for each label of the training text. Null for what the model does."
        ),
    ] = None
