"""Rows of the causal language models."""

from __future__ import annotations

from workers.architectures.architecture import Architecture, Producer

DECODERS: tuple[Architecture, ...] = (
    Architecture("llama", has_head_dim=True, hidden_is_multiple_of_heads=True),
    Architecture("mistral", has_head_dim=True, default_sizes={"num_key_value_heads": 8}),
    Architecture("qwen2", has_head_dim=True, default_sizes={"num_key_value_heads": 32}),
    Architecture("qwen3", has_head_dim=True, default_sizes={"num_key_value_heads": 32, "head_dim": 128}),
    Architecture(
        "gemma3_text",
        has_head_dim=True,
        hidden_is_multiple_of_heads=True,
        default_sizes={"num_key_value_heads": 4, "head_dim": 256},
        producers={
            "self_attn.q_proj": Producer("input_layernorm", "norm_plus_one"),
            "mlp.gate_proj": Producer("pre_feedforward_layernorm", "norm_plus_one"),
            "mlp.down_proj": Producer("mlp.up_proj", "linear"),
        },
        ties_by_default=True,
    ),
    Architecture(
        "phi3",
        linear_groups=(
            ("self_attn.qkv_proj",),
            ("self_attn.o_proj",),
            ("mlp.gate_up_proj",),
            ("mlp.down_proj",),
        ),
        attention_rows="stacked",
        gates_are_stacked=True,
        has_head_dim=True,
        factors_bind_heads=True,
        producers={
            "self_attn.qkv_proj": Producer("input_layernorm", "norm"),
            "mlp.gate_up_proj": Producer("post_attention_layernorm", "norm"),
        },
    ),
    Architecture(
        "opt",
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        before_blocks=(
            "model.decoder.embed_tokens",
            "model.decoder.embed_positions",
            "model.decoder.project_in",
        ),
        after_blocks=("model.decoder.final_layer_norm", "model.decoder.project_out"),
        linear_groups=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
        # A norm after its layers, as OPT-350m has it, feeds the residual stream too.
        producers={
            "self_attn.q_proj": Producer("self_attn_layer_norm", "norm", (("do_layer_norm_before", True),)),
            "fc1": Producer("final_layer_norm", "norm", (("do_layer_norm_before", True),)),
            "fc2": Producer("fc1", "linear", (("activation_function", "relu"),)),
        },
        ties_by_default=True,
        renamed={"intermediate_size": "ffn_dim", "embedding_size": "word_embed_proj_dim"},
    ),
    Architecture(
        "gpt2",
        blocks="transformer.h",
        embedding="transformer.wte",
        before_blocks=("transformer.wte", "transformer.wpe"),
        after_blocks=("transformer.ln_f",),
        prefix="transformer.",
        buffers=(".attn.bias", ".attn.masked_bias"),
        is_transposed=True,
        linear_groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        attention_rows="stacked",
        producers={"attn.c_attn": Producer("ln_1", "norm"), "mlp.c_fc": Producer("ln_2", "norm")},
        ties_by_default=True,
        renamed={
            "hidden_size": "n_embd",
            "embedding_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
    ),
    Architecture(
        "gpt_neox",
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        before_blocks=("gpt_neox.embed_in",),
        after_blocks=("gpt_neox.final_layer_norm",),
        earlier_head="embed_out",
        buffers=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
        linear_groups=(
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        attention_rows="interleaved",
        producers={
            "attention.query_key_value": Producer("input_layernorm", "norm"),
            "mlp.dense_h_to_4h": Producer("post_attention_layernorm", "norm"),
        },
    ),
)
