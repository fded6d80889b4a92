"""Rows of the recurrent language models: a state of one size takes the place of attention, and positions of none.

Their scan is plain PyTorch where no kernels are installed (`mamba-ssm`, `causal-conv1d`): right, and slow.
"""

from __future__ import annotations

from dataclasses import replace

from workers.architectures.architecture import Architecture, Producer

# `dt_proj` of Mamba is no layer of the table: its weight is multiplied with by hand and the module never called, so
# that nothing could stop before it, and no format that stores codes would be heard.
_MAMBA = Architecture(
    "mamba",
    blocks="backbone.layers",
    embedding="backbone.embeddings",
    before_blocks=("backbone.embeddings",),
    after_blocks=("backbone.norm_f",),
    prefix="backbone.",
    renamed_ends={"backbone.embedding.weight": "backbone.embeddings.weight"},
    buffers=(),
    linear_groups=(("mixer.in_proj",), ("mixer.x_proj",), ("mixer.out_proj",)),
    is_recurrent=True,
    opens_packed=False,  # transformers 5.23 looks for the weight of `out_proj` even then
    producers={"mixer.in_proj": Producer("norm", "norm")},
    ties_by_default=True,
    default_sizes={"state_size": 16, "expand": 2},
)

RECURRENT: tuple[Architecture, ...] = (
    _MAMBA,
    replace(
        _MAMBA,
        model_type="mamba2",
        linear_groups=(("mixer.in_proj",), ("mixer.out_proj",)),
        ties_by_default=False,
        default_sizes={"state_size": 128, "expand": 2, "num_heads": 128, "n_groups": 8},
    ),
)
