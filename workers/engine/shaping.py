"""What a stage that changes a model's shape has to work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workers.engine.journal import Journal
from workers.engine.skeleton import Skeleton

if TYPE_CHECKING:
    from workers.texts import Texts

Progress = Callable[[str, int, int, float], None]  # step, block, num_blocks, fraction


@dataclass(frozen=True)
class Shaping:
    """The model as the stage finds it, the job's texts, and where to keep what was found out."""

    skeleton: Skeleton
    param: str  # where the stage is in the recipe, for errors
    texts: Texts
    journal: Journal  # the stage's own: what is decided goes through its `once`
    waiting_bytes: int  # of hidden states may be in memory
    progress: Progress

    @property
    def folder(self) -> Path:
        """For files that belong to the new shape, such as a tokenizer: there until the artifact is written."""
        return self.journal.folder / "files"
