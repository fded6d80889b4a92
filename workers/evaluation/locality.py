"""How far back the blocks of a model see: what its config says, and what its attention does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workers.errors import CrashError, UserError
from workers.formats.opening import Readable

# That are looked at beyond a window, where the model has the positions for them.
_NUM_TOKENS_BEYOND = 8


def block_windows(config: Any) -> list[int | None]:
    """How many tokens, itself among them, a token sees in each block by a config of transformers; None for all."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def prove_windows(original: Readable, artifact: Readable, windows: Sequence[int | None], window: int) -> None:
    """Hold the reopened artifact against the ``windows`` that its blocks were to have: ``window`` tokens, or None.

    Raises:
        CrashError: ``window_missing`` where its config says otherwise, or ``not_local`` where a block sees further.
        UserError: ``nothing_changed`` where no block of the original saw further either.
    """
    with artifact.running() as model:
        found = block_windows(model.config.get_text_config())
    if found != list(windows):
        raise CrashError("window_missing", f"The artifact's blocks see {_said(found)} tokens, not {_said(windows)}.")
    local = {block for block, seen in enumerate(windows) if seen is not None}
    if not local:
        raise _nothing_changed("every block with a window was left out by a later stage")
    if beyond := sorted(local.intersection(blocks_seeing(artifact, window))):
        raise CrashError(
            "not_local", f"In {len(beyond)} blocks, the first {beyond[0]}, tokens see more than {window} tokens."
        )
    if not blocks_seeing(original, window):
        raise _nothing_changed(f"no block of the original sees more than {window} tokens")


@torch.inference_mode()
def blocks_seeing(model: Readable, distance: int) -> list[int]:
    """The blocks in which a token's output hangs, to the bit, on the token ``distance`` before it or an earlier one.

    Each is asked by itself, with what it reads and with the first token of that changed: how far blocks see together
    makes no difference, and a text little longer than ``distance`` will do.
    """
    length = min(distance + _NUM_TOKENS_BEYOND, model.max_positions or distance + _NUM_TOKENS_BEYOND)
    with model.running() as running:
        ids = torch.arange(length, device=running.device).remainder(running.config.get_text_config().vocab_size)
        probes = [_Probe(block, distance) for block in running.get_submodule(model.architecture.blocks)]
        try:
            running.base_model(input_ids=ids.unsqueeze(0), use_cache=False)
        finally:
            for probe in probes:
                probe.remove()
    return [block for block, probe in enumerate(probes) if probe.sees]


class _Probe:
    """Has a block read everything twice, the second time with another first token."""

    def __init__(self, block: nn.Module, distance: int) -> None:
        self.sees = False
        self._block = block
        self._distance = distance
        self._own = block.forward
        block.forward = self._forward

    def remove(self) -> None:
        """Have the block read once again."""
        del self._block.forward  # the class's own is there again

    def _forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        changed = hidden_states.clone()
        changed[:, 0] = -hidden_states[:, 1:].mean(dim=1)  # a padding token's own state may be zero
        other = _hidden(self._own(changed, *arguments, **named))[:, self._distance :]
        output = self._own(hidden_states, *arguments, **named)
        self.sees = not torch.equal(other, _hidden(output)[:, self._distance :])
        return output


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _nothing_changed(why: str) -> UserError:
    return UserError(
        "nothing_changed",
        f"The result sees as far as the original: {why}.",
        param="recipe.stages",
        hint="Choose a smaller window, or leave the stage out.",
    )


def _said(windows: Sequence[int | None]) -> str:
    return ", ".join("all" if window is None else str(window) for window in windows)
