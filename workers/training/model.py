"""A model whose weights are all in memory, to be trained, and the checkpoint that it becomes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workers.disk import flush, write_json
from workers.engine.checkpoint import CODES, Checkpoint
from workers.engine.journal import part_name
from workers.engine.outer import PART
from workers.engine.skeleton import Skeleton
from workers.export import copy_companions, plain_config
from workers.formats.parts import Parts

CHECKPOINT = "checkpoint"  # what the folder of a model is called that a stage leaves in its journal


@dataclass
class Whole:
    """A model of transformers with all its weights, in float32, and what a training needs to know of it."""

    model: Any
    skeleton: Skeleton
    states: dict[int, Tensor] = field(default_factory=dict)  # by block: what it gave in the last pass, if asked for

    @property
    def head(self) -> nn.Module:
        """What gives the logits."""
        return self.skeleton.module(self.skeleton.architecture.head)

    @property
    def logit_cap(self) -> float | None:
        """Where the model bends its logits; None where it does not."""
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return None if cap is None else float(cap)

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head of a language model reads: sequences × tokens × hidden size."""
        hidden: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def class_logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of a classifier: sequences × classes, float32."""
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits.float()

    def keep_states(self, blocks: Sequence[int]) -> None:
        """From now on, have ``states`` hold what these blocks gave in the last pass."""
        for index in blocks:
            block = self.skeleton.module(self.skeleton.block_name(index))
            block.register_forward_hook(self._keeper(index))

    def _keeper(self, index: int) -> Any:
        def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
            self.states[index] = output if isinstance(output, Tensor) else output[0]

        return keep

    def masks(self) -> dict[str, Tensor]:
        """By name, where weights of the blocks' linear layers are not zero (bool); nothing of layers without zeros."""
        named = self.parameters()
        rounded = ".parametrizations.weight.original"
        names = [f"{layer}{end}" for layer in self.skeleton.block_layers for end in (".weight", rounded)]
        return {name: named[name] != 0 for name in names if name in named and not bool(named[name].all())}

    def begin_anew(self, seed: int) -> None:
        """Give all weights the values that a new model begins with."""
        torch.manual_seed(seed)
        fresh: Any = type(self.model)(self.model.config)
        values = dict(fresh.named_parameters())
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(values[name])

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name, tied ones once."""
        return dict(self.model.named_parameters())


def open_whole(skeleton: Skeleton, *, trains: bool) -> Whole:
    """Load every weight of the model of ``skeleton``, which is taken up by it from now on.

    Raises:
        UserError: ``checkpoint_mismatch`` or ``non_finite_weights``.
    """
    architecture = skeleton.architecture
    own = [index for index in range(skeleton.num_blocks) if skeleton.source_block(index) == index]
    blocks = map(skeleton.block_name, own)
    for name in (*skeleton.present(architecture.before_blocks), *blocks, *skeleton.present(architecture.after_blocks)):
        skeleton.load(name)
    skeleton.load_head()
    for tied, source in skeleton.tied_parameters.items():
        module, _, name = tied.rpartition(".")
        setattr(skeleton.module(module), name, skeleton.model.get_parameter(source))
    model = skeleton.model
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not missing, f"the table names no part that holds {missing[0]}"
    for module in model.modules():
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.0  # a block that is left out by chance has no gradient, and no state to go on from
    model.requires_grad_(trains)
    model.train(trains)
    return Whole(model, skeleton)


def write_checkpoint(
    whole: Whole, values: Mapping[str, Tensor], folder: Path, codes: Mapping[str, Tensor] | None = None
) -> None:
    """Write a checkpoint of these parameters, each in the type that it was stored in; complete or absent.

    ``codes`` lie beside it: what :class:`workers.engine.checkpoint.Checkpoint` gives for layers trained as codes.
    """
    skeleton, checkpoint = whole.skeleton, whole.skeleton.checkpoint
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    parts = Parts(temporary / "parts")
    tied = skeleton.architecture.tied_parameters(checkpoint.config)
    names = [name for name in checkpoint.parameters() if name not in tied]
    prefixes = {part_name(index): skeleton.block_name(index) + "." for index in range(skeleton.num_blocks)}
    of_blocks = {part: [name for name in names if name.startswith(prefix)] for part, prefix in prefixes.items()}
    inside = {name for of_block in of_blocks.values() for name in of_block}
    for part, chosen in {PART: [name for name in names if name not in inside], **of_blocks}.items():
        parts.write(part, {name: values[name].to(checkpoint.stored_dtype(name)) for name in chosen})
    parts.assemble(temporary)
    shutil.rmtree(parts.folder)
    write_json(temporary / "config.json", plain_config(checkpoint))
    copy_companions(checkpoint, temporary)
    if codes:
        save_file({name: tensor.cpu() for name, tensor in codes.items()}, temporary / CODES)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    flush(folder.parent)


def opened_again(folder: Path, before: Skeleton) -> Skeleton:
    """The model of a checkpoint that :func:`write_checkpoint` wrote in place of ``before``."""
    checkpoint = Checkpoint(folder, cast=before.checkpoint.cast)
    return Skeleton(checkpoint, before.architecture, before.device)
