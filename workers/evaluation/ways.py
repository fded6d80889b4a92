"""The two ways of opening the models of a job: whole where there is memory for it, else by block."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from workers.architectures import architecture_of
from workers.engine.by_block import ByBlock
from workers.errors import CrashError, UserError, is_out_of_memory, model_unusable
from workers.evaluation.context import longest_context
from workers.evaluation.size import weights_bytes
from workers.formats import opening
from workers.formats.opening import Opened, check_loads, expand_archive, open_checkpoint
from workers.formats.shipped_loader import name_of_loader
from workers.memory import free_bytes, waiting_bytes
from workers.recipe import Recipe

Way = Literal["whole", "by_block"]

_EXPANDED = "expanded"
_FLOAT32_BYTES = 4
_WHOLE = 1.05  # of the bytes of its tensors, what a model takes that is opened whole
# Of logits there are those of both models, and what a model makes of its own before it gives them.
_COPIES_OF_LOGITS = 3
# What a pass has in memory of each token inside a block, in hidden sizes: the states between layers and the wider ones.
_STATES_A_TOKEN = 24
_MASK_BYTES = 5  # of each pair of tokens, where attention is local: what may be seen, and the same as float32
_TOKENS_OF_SEQUENCES = 4096  # of an encoder's texts, which are read some at a time
# Of what is free as certification begins: model code still to be imported, tokenizers, pieces of logits that are
# compared, what allocators keep.
_SPARE_BYTES = 192 << 20


@dataclass(frozen=True)
class Ways:
    """How the models of a job are opened, and why."""

    original: Way
    artifact: Way
    needed_bytes: int  # by both, opened whole
    free_bytes: int
    waiting_bytes: int  # of a text that is read by block, between two blocks

    def to_report(self) -> dict[str, Way]:
        """The ``opened`` part of a report."""
        return {"original": self.original, "artifact": self.artifact}

    def warning(self) -> dict[str, Any] | None:
        """What is not as usual; None where both are opened whole."""
        if self.original == "whole":
            return None
        one = self.artifact == "whole"
        which = "The original was" if one else "Original and artifact were"
        message = (
            f"{which} read block by block: opened whole, both would take about {self.needed_bytes:,} bytes of memory, "
            f"and there were {self.free_bytes:,}. Quality, size and zeros are measured all the same; not measured are "
            f"{'its' if one else 'their'} speed and what {'it generates' if one else 'they generate'}"
        )
        if not one:
            message += ", and transformers placed the artifact's tensors without reading them"
        return {"event": "warning", "code": "certified_by_block", "message": f"{message}.", "param": None}


def choose_ways(work: Path, recipe: Recipe, device: torch.device, limit_bytes: int | None) -> Ways:
    """Both whole if there is memory for both; else the artifact alone, if there is for that; else both by block.

    ``limit_bytes`` is the memory limit of the job; without one, what the machine has left decides.
    """
    source = json.loads((work / "source" / "model.json").read_text(encoding="utf-8"))
    original_bytes = _FLOAT32_BYTES * int(source["num_parameters"])
    artifact_bytes = _whole_artifact_bytes(work / "artifact", recipe, original_bytes)
    window_bytes, part_bytes = _reading_bytes(work / "source" / "model", recipe, original_bytes)
    host_bytes = max(0, free_bytes(limit_bytes) - _SPARE_BYTES)
    free, fits_host = host_bytes, True
    if device.type != "cpu":
        # A model is opened on the host and goes to the accelerator from there.
        free = max(0, torch.cuda.mem_get_info(device)[0] - _SPARE_BYTES)
        fits_host = _WHOLE * max(original_bytes, artifact_bytes) <= host_bytes
    both = int(_WHOLE * (original_bytes + artifact_bytes)) + window_bytes
    if both <= free and fits_host:
        return Ways("whole", "whole", both, free, 0)
    alone = int(_WHOLE * artifact_bytes) + window_bytes + part_bytes
    if alone <= free and _WHOLE * artifact_bytes <= host_bytes:
        return Ways("by_block", "whole", both, free, waiting_bytes(free - alone))
    return Ways("by_block", "by_block", both, free, waiting_bytes(free - window_bytes - part_bytes))


def open_original(work: Path, ways: Ways, device: torch.device) -> Opened | ByBlock:
    """The original of a job.

    Raises:
        UserError: ``model_unusable`` or another, as the original is the user's.
    """
    folder = work / "source" / "model"
    if ways.original == "by_block":
        return ByBlock(folder, device, ways.waiting_bytes)
    try:
        return open_checkpoint(folder, device)
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise model_unusable(error) from error


def open_artifact(work: Path, ways: Ways, recipe: Recipe, device: torch.device) -> Opened | ByBlock:
    """The artifact of a job. By block, one of bitmasks is expanded on the disk: see :func:`remove_expanded`.

    Raises:
        CrashError: ``artifact_incomplete``.
    """
    folder = work / "artifact"
    if ways.artifact == "whole":
        return opening.open_artifact(folder, device)
    if recipe.stores_bitmasks:
        remove_expanded(work)
        expand_archive(folder, work / _EXPANDED)
        folder = work / _EXPANDED
    check_loads(folder)
    try:
        return ByBlock(folder, device, ways.waiting_bytes)
    except UserError as error:  # the artifact is ours
        raise CrashError("artifact_incomplete", error.message) from error


def remove_expanded(work: Path) -> None:
    """Remove the dense form of an archive from the work folder, if :func:`open_artifact` put it there."""
    shutil.rmtree(work / _EXPANDED, ignore_errors=True)


def _whole_artifact_bytes(folder: Path, recipe: Recipe, original_bytes: int) -> int:
    stored = weights_bytes(folder)
    if recipe.output.format == "bitsandbytes":
        return 2 * stored  # codes stay codes; all else is stored in 16 bits
    # Codes are there until they are decoded; a loader that lies in the artifact has read all before it makes the model.
    return original_bytes + (stored if recipe.stores_codes or name_of_loader(folder) else 0)


def _reading_bytes(folder: Path, recipe: Recipe, original_bytes: int) -> tuple[int, int]:
    """What reading one window takes, and what a model opened by block takes beside it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = architecture_of(config)
    hidden_size, num_blocks = (int(config[architecture.size(name)]) for name in ("hidden_size", "num_hidden_layers"))
    num_tokens = min(recipe.evaluation.max_seq_length, architecture.max_positions(config) or 1 << 30)
    vocabulary_size = int(config["vocab_size"])
    num_logits, mask_bytes = num_tokens * vocabulary_size, 0
    if recipe.window is not None:
        positions = architecture.max_positions(config)
        longest = max(recipe.window, longest_context(recipe.window, positions, recipe.evaluation.num_tokens))
        num_tokens, mask_bytes = max(num_tokens, longest), _MASK_BYTES * longest**2
    if architecture.task == "classification":
        num_tokens, num_logits = max(num_tokens, _TOKENS_OF_SEQUENCES), 0
    window = mask_bytes + _FLOAT32_BYTES * (_COPIES_OF_LOGITS * num_logits + _STATES_A_TOKEN * num_tokens * hidden_size)
    return window, max(original_bytes // num_blocks, _FLOAT32_BYTES * vocabulary_size * hidden_size)
