"""Which blocks a model does best without, and the checkpoint that lacks them.

Both ways of finding out pass over the original a block at a time: what is held of the text is its hidden states.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.checkpoint import Checkpoint
from workers.engine.device import keeping_freed_memory
from workers.engine.forward import ForwardPass, Gate, Skippable
from workers.engine.journal import Journal
from workers.engine.listening import listen, loaded
from workers.engine.shaping import Progress, Shaping
from workers.engine.skeleton import Skeleton
from workers.engine.text import batches, part_of
from workers.errors import UserError
from workers.shapes.depth import config_of_fewer_blocks
from workers.techniques import DepthPruning

# A mean over tokens is known well from so many.
NUM_INFLUENCE_TOKENS = 16_384
# Tokens whose losses are compared without each block. They pass through each block once for every candidate.
NUM_COMPARED_TOKENS = 2_048
# What waits of a token between two blocks: its hidden state, once more as the residual, and what is made of positions.
_STATES_A_TOKEN = 3
# Tokens of one pass to the logits, of which there are as many rows in memory.
TOKENS_OF_LOGITS = 512
# The same of a classifier, of whose texts each gives one distribution.
NUM_JUDGED_TOKENS = 16_384


@dataclass(frozen=True)
class Cut:
    """Blocks to leave out, in the order in which they were chosen, and what was measured of every block."""

    removed: list[int]
    scores: list[float | None]  # of each block; None where none was measured
    losses: list[float | None] = field(default_factory=list)  # by perplexity or divergence: after each block was gone

    def kept(self) -> list[int]:
        """The blocks that stay, in order."""
        return [index for index in range(len(self.scores)) if index not in self.removed]


def leave_out_blocks(shaping: Shaping, stage: DepthPruning) -> tuple[Checkpoint, dict[str, Any]]:
    """The model's checkpoint without the blocks that the stage chooses, and what the report says of the choice.

    Raises:
        UserError: as :func:`config_of_fewer_blocks` says, or ``non_finite_activations``.
    """
    before, journal = shaping.skeleton, shaping.journal
    config_of_fewer_blocks(stage, shaping.param, before.checkpoint.config)
    cut = Cut(**journal.once("cut", lambda: asdict(choose_blocks(shaping, stage, journal.inner("measuring")))))
    shutil.rmtree(journal.folder / "measuring", ignore_errors=True)
    metrics = {
        "num_blocks": before.num_blocks - len(cut.removed),
        "original_num_blocks": before.num_blocks,
        "removed_blocks": cut.removed,
        "scores": cut.scores,
        "losses": cut.losses,
    }
    return without_blocks(before.checkpoint, before, cut.kept()), metrics


def choose_blocks(shaping: Shaping, stage: DepthPruning, journal: Journal) -> Cut:
    """What the stage leaves out of the model; in ``journal`` it is kept how far we are."""
    skeleton, num_blocks, waiting_bytes = shaping.skeleton, shaping.skeleton.num_blocks, shaping.waiting_bytes
    scores: list[float | None] = [None] * num_blocks
    if stage.blocks is not None:
        return Cut(sorted(stage.blocks), scores)
    texts = shaping.texts
    by_task = stage.method == "divergence"
    calibration = texts.drawn_of_task(skeleton, NUM_JUDGED_TOKENS) if by_task else texts.calibration(skeleton)
    candidates, num_removed = stage.candidates(num_blocks), stage.num_removed(num_blocks)
    if stage.method == "block_influence":
        influences = block_influences(skeleton, calibration, journal, waiting_bytes, shaping.progress)
        scores = list(map(_or_none, influences))
        _check_some([scores[block] for block in candidates])
        return Cut(sorted(candidates, key=lambda block: (_or_worst(scores[block]), block))[:num_removed], scores)
    removed: list[int] = []
    losses: list[float | None] = []
    for number in range(num_removed):
        name, left = f"without-{number:04d}", [block for block in candidates if block not in removed]

        def said(step: str, block: int, blocks: int, fraction: float, number: int = number) -> None:
            shaping.progress(step, block, blocks, (number + fraction) / num_removed)

        def measured(name: str = name, left: list[int] = left, said: Progress = said) -> list[float | None]:
            steps = journal.inner(name)
            return losses_without(skeleton, calibration, removed, left, steps, waiting_bytes, said)

        found: list[float | None] = journal.once(name, measured)
        shutil.rmtree(journal.folder / name, ignore_errors=True)
        _check_some(found)
        for block, loss in zip(left, found, strict=True):
            scores[block] = loss
        removed.append(min((_or_worst(loss), block) for block, loss in zip(left, found, strict=True))[1])
        losses.append(scores[removed[-1]])
    return Cut(removed, scores, losses)


def block_influences(
    skeleton: Skeleton, calibration: Sequence[Tensor], journal: Journal, waiting_bytes: int, progress: Progress
) -> list[float]:
    """Of each block 1 − cos(its input, its output), mean over tokens: arXiv:2403.03853, equation 1."""
    samples = part_of(calibration, NUM_INFLUENCE_TOKENS)
    heard = listen(skeleton, samples, journal, waiting_bytes, progress, lambda block: _Likeness(skeleton.module(block)))
    return [float(entry["influence"]) for entry in heard]


class _Likeness:
    """Hears what goes into a block and what comes out: how alike they are, mean over tokens.

    Of the block itself: what comes after the last one may have only a part of its output.
    """

    def __init__(self, block: nn.Module) -> None:
        self._sum, self._num_tokens = 0.0, 0
        self._handle = block.register_forward_hook(self._hear)

    def _hear(self, _module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        cosines = nn.functional.cosine_similarity(arguments[0], output, dim=-1)
        self._sum += float(cosines.sum(dtype=torch.float64))
        self._num_tokens += cosines.numel()

    def finish(self) -> dict[str, Any]:
        """The block's influence: 1 less the cosine."""
        self._handle.remove()
        return {"influence": 1 - self._sum / self._num_tokens}


def losses_without(
    skeleton: Skeleton,
    calibration: Sequence[Tensor],
    removed: Sequence[int],
    candidates: Sequence[int],
    journal: Journal,
    waiting_bytes: int,
    progress: Progress,
) -> list[float | None]:
    """The loss without the ``removed`` blocks and each one of the ``candidates``: arXiv:2402.02834.

    Nats a token; of a classifier, nats a text by which it diverges from the whole model. None where it is not finite.
    So many candidates are tried at a time that what waits of them stays within ``waiting_bytes``, on the disk and in
    memory.
    """
    windows = _windows(skeleton, calibration)
    num_tokens = sum(ids.numel() for ids in windows)
    num_bytes = _STATES_A_TOKEN * num_tokens * skeleton.hidden_size * torch.float32.itemsize
    size = max(1, waiting_bytes // num_bytes - _has_judge(skeleton))
    groups = [candidates[first : first + size] for first in range(0, len(candidates), size)]
    losses: list[float | None] = []
    for number, group in enumerate(groups):
        # How many go together hangs on the memory that is free: a group is called by who is in it.
        name = f"group-{group[0]:05d}-{group[-1]:05d}"

        def said(step: str, block: int, blocks: int, fraction: float, number: int = number) -> None:
            progress(step, block, blocks, (number + fraction) / len(groups))

        def measured(name: str = name, group: Sequence[int] = group, said: Progress = said) -> list[float | None]:
            return _losses_of_group(skeleton, windows, removed, group, journal.inner(name), said)

        losses += journal.once(name, measured)
        shutil.rmtree(journal.folder / name, ignore_errors=True)
    return losses


def _has_judge(skeleton: Skeleton) -> bool:
    """Whether what is left of the model is held against what it says whole."""
    return skeleton.architecture.task == "classification"


def _windows(skeleton: Skeleton, calibration: Sequence[Tensor]) -> list[Tensor]:
    """Samples × tokens of one pass each."""
    if _has_judge(skeleton):
        return [ids for samples in calibration for ids in batches(samples)]
    (samples,) = part_of([max(calibration, key=torch.numel)[:, :TOKENS_OF_LOGITS]], NUM_COMPARED_TOKENS)
    return list(torch.split(samples, 1))


@torch.inference_mode()
def _losses_of_group(
    skeleton: Skeleton,
    windows: Sequence[Tensor],
    removed: Sequence[int],
    candidates: Sequence[int],
    journal: Journal,
    progress: Progress,
) -> list[float | None]:
    blocks = [skeleton.block_name(index) for index in range(skeleton.num_blocks)]
    has_judge = _has_judge(skeleton)
    skipped: list[set[int]] = [set()] if has_judge else []
    skipped += [{*removed, candidate} for candidate in candidates]
    shapes = [torch.Size([*ids.shape, skeleton.hidden_size]) for _ in skipped for ids in windows]
    journal.begin_again_unless_whole(shapes)
    first = journal.num_blocks
    gates = [Gate(name, skeleton.module(name), stops=True) for name in (*blocks, skeleton.end)]
    skippable = [Skippable(name, skeleton.module(name)) for name in blocks]
    passes: list[list[ForwardPass]] = []
    for without in skipped:
        skips = {blocks[index] for index in (*range(first), *without)}
        passes.append([skeleton.forward_pass(ids, skips=skips) for ids in windows])
    everyone = [each for those in passes for each in those]
    with loaded(skeleton, skeleton.present(skeleton.architecture.before_blocks)):
        for number, each in enumerate(everyone):
            hidden = each.advance_to(blocks[first])
            if first:
                journal.activations.restore(first, number, hidden)
    for index in range(first, len(blocks)):
        following = blocks[index + 1] if index + 1 < len(blocks) else skeleton.end
        progress(f"plan.{blocks[index]}", index, len(blocks), index / len(blocks))
        is_used = has_judge or index not in removed
        with loaded(skeleton, [blocks[index]] if is_used else []), keeping_freed_memory():
            for number, each in enumerate(everyone):
                hidden = each.advance_to(following)
                if index + 1 < len(blocks):
                    journal.activations.keep(index + 1, number, hidden)
        if index + 1 < len(blocks):
            journal.finish_block(index, {}, shapes)
    losses: list[float | None] = []
    with loaded(skeleton, skeleton.present(skeleton.architecture.after_blocks), has_head=True):
        if has_judge:
            judged = [each.finish() for each in passes.pop(0)]
            for those in passes:
                lost = [_divergence(each.finish(), said) for each, said in zip(those, judged, strict=True)]
                losses.append(_or_none(sum(lost) / sum(len(ids) for ids in windows)))
        else:
            num_targets = sum(ids.numel() - len(ids) for ids in windows)
            for those in passes:
                lost = [_loss(each.finish(), ids) for each, ids in zip(those, windows, strict=True)]
                losses.append(_or_none(sum(lost) / num_targets))
    for gate in gates:
        gate.remove()
    for block_of_choice in skippable:
        block_of_choice.remove()
    return losses


def without_blocks(checkpoint: Checkpoint, skeleton: Skeleton, kept: Sequence[int]) -> Checkpoint:
    """The checkpoint, whose model is ``skeleton``, with the blocks that are ``kept`` alone."""
    config: dict[str, Any] = dict(checkpoint.config)
    own_name = skeleton.architecture.size("num_hidden_layers")
    config |= {name: len(kept) for name in (own_name, "num_hidden_layers") if name == own_name or name in config}
    # Which blocks have a window is often said by a rule, which would now name other blocks.
    kinds = getattr(skeleton.model.config.get_text_config(), "layer_types", None)
    if kinds and ("layer_types" in config or len(set(kinds)) > 1):
        config["layer_types"] = [kinds[index] for index in kept]
    return checkpoint.with_blocks(kept, config)


def _check_some(values: Sequence[float | None]) -> None:
    """Raise UserError ``non_finite_activations`` where no block can be told from another."""
    if all(value is None for value in values):
        raise UserError(
            "non_finite_activations",
            "The model's hidden states are not finite on the calibration text: its blocks cannot be compared.",
            param="model.id",
            hint="The checkpoint gives NaN or infinity; check it, and its dtype, on the same text.",
        )


def _or_none(value: float) -> float | None:
    """What JSON has for a number that is none."""
    return value if math.isfinite(value) else None


def _or_worst(value: float | None) -> float:
    """The same for a choice: a block is kept where nothing can be said of the model without it."""
    return math.inf if value is None else value


def _loss(logits: Tensor, ids: Tensor) -> float:
    """The sum over tokens, nats."""
    targets = ids[:, 1:].flatten().to(logits.device)
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum"))


def _divergence(logits: Tensor, judged: Tensor) -> float:
    """KL(judged ‖ logits), both texts × classes: the sum over texts, nats."""
    own, theirs = (each.double().log_softmax(dim=-1) for each in (logits, judged))
    return float(nn.functional.kl_div(own, theirs, reduction="sum", log_target=True))
