"""SmoothQuant's two strengths: what makes the input decides which holds."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.workers.solvers.hessians import inputs_of
from workers.architectures import Producer
from workers.engine.layer import Layer
from workers.engine.statistics import InputStatistics
from workers.techniques.smoothquant import SmoothQuant

NORM = Producer("input_layernorm", "norm")
LINEAR = Producer("mlp.up_proj", "linear")
OUTLIER = 5


def layer_with_an_outlier() -> Layer:
    """Of equal weights; column 5 of its input is 2²⁰ times as large as the others."""
    inputs = inputs_of(0, 16).clamp(-1, 1)
    inputs[0] = 1.0
    inputs[:, OUTLIER] *= 2**20
    statistics = InputStatistics("down", 16, SmoothQuant().statistics, torch.device("cpu"))
    statistics.add(inputs)
    statistics.finish()
    return Layer("down", torch.ones(8, 16), torch.float32, statistics)


def spread(scale: Tensor) -> float:
    """How much further the outlier's column is divided than the others, in powers of two."""
    return float((scale[OUTLIER] / scale[0]).log2())


def test_a_norms_outliers_go_further_into_the_weights_than_a_linear_layers() -> None:
    layer = layer_with_an_outlier()
    assert spread(SmoothQuant().input_scale([layer], NORM)) == 16  # 0.8 × 20
    assert spread(SmoothQuant().input_scale([layer], LINEAR)) == 10  # 0.5 × 20


def test_each_strength_is_the_recipes() -> None:
    layer = layer_with_an_outlier()
    stage = SmoothQuant(smoothing_strength=0.2, linear_smoothing_strength=0.7)
    assert spread(stage.input_scale([layer], NORM)) == 4
    assert spread(stage.input_scale([layer], LINEAR)) == 14
