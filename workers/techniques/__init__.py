"""The techniques. A new one is a file here and a line in ``Stage``; modules import torch inside functions only."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from workers.techniques.awq import AWQ
from workers.techniques.depth_pruning import DepthPruning
from workers.techniques.distillation_options import DistillationOptions
from workers.techniques.dynamic_int8 import DynamicInt8
from workers.techniques.fine_tuning import FineTuning
from workers.techniques.gptq import GPTQ
from workers.techniques.gradual_pruning import GradualPruning
from workers.techniques.iterate import Iterate, placed
from workers.techniques.logit_distillation import LogitDistillation
from workers.techniques.lora_recovery import LoraRecovery
from workers.techniques.low_rank import LowRank
from workers.techniques.magnitude import Magnitude
from workers.techniques.mixed_precision import MixedPrecision
from workers.techniques.options import ChosenLayers, LayerOptions, StageOptions
from workers.techniques.pruning_options import PruningOptions
from workers.techniques.quantization_aware_finetuning import QuantizationAwareFineTuning
from workers.techniques.quantization_options import QuantizationOptions
from workers.techniques.round_to_nearest import RoundToNearest
from workers.techniques.share_layers import ShareLayers
from workers.techniques.sliding_window import SlidingWindow
from workers.techniques.smoothquant import SmoothQuant
from workers.techniques.sparsegpt import SparseGPT
from workers.techniques.sparsity_options import SparsityOptions
from workers.techniques.structure_options import StructureOptions
from workers.techniques.tie_embeddings import TieEmbeddings
from workers.techniques.training_options import TrainingOptions
from workers.techniques.vocabulary_pruning import VocabularyPruning
from workers.techniques.wanda import Wanda
from workers.techniques.width_pruning import WidthPruning

Stage = Annotated[
    RoundToNearest
    | GPTQ
    | MixedPrecision
    | AWQ
    | SmoothQuant
    | DynamicInt8
    | Magnitude
    | Wanda
    | SparseGPT
    | DepthPruning
    | WidthPruning
    | VocabularyPruning
    | TieEmbeddings
    | ShareLayers
    | SlidingWindow
    | LowRank
    | LogitDistillation
    | LoraRecovery
    | GradualPruning
    | FineTuning
    | QuantizationAwareFineTuning
    | Iterate,
    Field(discriminator="technique"),
]

TECHNIQUES: dict[str, type[StageOptions]] = {
    technique.model_fields["technique"].default: technique for technique in get_args(get_args(Stage)[0])
}

__all__ = [
    "AWQ",
    "GPTQ",
    "TECHNIQUES",
    "ChosenLayers",
    "DepthPruning",
    "DistillationOptions",
    "DynamicInt8",
    "FineTuning",
    "GradualPruning",
    "Iterate",
    "LayerOptions",
    "LogitDistillation",
    "LoraRecovery",
    "LowRank",
    "Magnitude",
    "MixedPrecision",
    "PruningOptions",
    "QuantizationAwareFineTuning",
    "QuantizationOptions",
    "RoundToNearest",
    "ShareLayers",
    "SlidingWindow",
    "SmoothQuant",
    "SparseGPT",
    "SparsityOptions",
    "Stage",
    "StageOptions",
    "StructureOptions",
    "TieEmbeddings",
    "TrainingOptions",
    "VocabularyPruning",
    "Wanda",
    "WidthPruning",
    "placed",
]
