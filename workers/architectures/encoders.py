"""Rows of the encoders, one for each task that a checkpoint may have a head for.

Their norms stand after their layers and feed the residual stream too, so that none can take over a scale. What
attention passes on is a mean of its values: their layer can, from the one that reads it.
"""

from __future__ import annotations

from dataclasses import replace

from workers.architectures.architecture import Architecture, Producer

_BERT = Architecture(
    "bert",
    task="masked",
    blocks="bert.encoder.layer",
    embedding="bert.embeddings.word_embeddings",
    before_blocks=(
        "bert.embeddings.word_embeddings",
        "bert.embeddings.position_embeddings",
        "bert.embeddings.token_type_embeddings",
        "bert.embeddings.LayerNorm",
    ),
    after_blocks=("cls.predictions.transform",),
    head="cls.predictions.decoder",
    earlier_head="cls.predictions.decoder",
    tied_bias="cls.predictions.bias",
    prefix="bert.",
    buffers=(".position_ids", ".token_type_ids"),
    other_heads=("bert.pooler.", "cls.seq_relationship.", "classifier."),
    renamed_ends={".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"},
    linear_groups=(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ),
    producers={"attention.output.dense": Producer("attention.self.value", "linear")},
    ties_by_default=True,
)
_ROBERTA = replace(
    _BERT,
    model_type="roberta",
    blocks="roberta.encoder.layer",
    embedding="roberta.embeddings.word_embeddings",
    before_blocks=(
        "roberta.embeddings.word_embeddings",
        "roberta.embeddings.position_embeddings",
        "roberta.embeddings.token_type_embeddings",
        "roberta.embeddings.LayerNorm",
    ),
    after_blocks=("lm_head.dense", "lm_head.layer_norm"),
    head="lm_head.decoder",
    earlier_head="lm_head.decoder",
    tied_bias="lm_head.bias",
    prefix="roberta.",
    other_heads=("roberta.pooler.", "classifier."),
    positions_follow_padding=True,
)
_DISTILBERT = Architecture(
    "distilbert",
    task="masked",
    blocks="distilbert.transformer.layer",
    embedding="distilbert.embeddings.word_embeddings",
    before_blocks=(
        "distilbert.embeddings.word_embeddings",
        "distilbert.embeddings.position_embeddings",
        "distilbert.embeddings.LayerNorm",
    ),
    after_blocks=("vocab_transform", "vocab_layer_norm"),
    head="vocab_projector",
    earlier_head="vocab_projector",
    prefix="distilbert.",
    buffers=(".position_ids",),
    other_heads=("pre_classifier.", "classifier."),
    linear_groups=(
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        ("attention.out_lin",),
        ("ffn.lin1",),
        ("ffn.lin2",),
    ),
    producers={"attention.out_lin": Producer("attention.v_lin", "linear")},
    ties_by_default=True,
    renamed={
        "hidden_size": "dim",
        "embedding_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
    },
)

ENCODERS: tuple[Architecture, ...] = (
    _BERT,
    replace(
        _BERT,
        task="classification",
        after_blocks=("bert.pooler",),
        head="classifier",
        earlier_head="classifier",
        tied_bias=None,
        other_heads=("cls.",),
    ),
    _ROBERTA,
    replace(
        _ROBERTA,
        task="classification",
        after_blocks=("classifier.dense",),
        head="classifier.out_proj",
        earlier_head="classifier.out_proj",
        tied_bias=None,
        other_heads=("roberta.pooler.", "lm_head."),
    ),
    _DISTILBERT,
    replace(
        _DISTILBERT,
        task="classification",
        after_blocks=("pre_classifier",),
        head="classifier",
        earlier_head="classifier",
        other_heads=("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
    ),
)
