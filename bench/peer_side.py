"""One technique of llm-compressor on a folder: run by speed.py with the Python of an environment of its own."""

import argparse
import json
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import SmoothQuantModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("model")
arguments.add_argument("samples", help="safetensors file with input_ids, samples × tokens")
arguments.add_argument("output")
arguments.add_argument("--stage", type=json.loads, required=True, help="JSON, as in a recipe of Attar")
arguments.add_argument("--observer", default="minmax")
arguments.add_argument("--num-threads", type=int, required=True)
options = arguments.parse_args()

torch.set_num_threads(options.num_threads)
begin = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
samples = load_file(options.samples)["input_ids"]
stage = options.stage
int8 = QuantizationModifier(ignore=["lm_head"], targets=["Linear"], scheme="W8A8")
recipe = None
if stage["technique"] == "smoothquant":
    recipe = [SmoothQuantModifier(smoothing_strength=0.5), int8]
elif stage["technique"] == "dynamic_int8":
    recipe = int8
elif stage.get("scheme") == "FP8":
    recipe = QuantizationModifier(ignore=["lm_head"], targets=["Linear"], scheme="FP8_DYNAMIC")
elif stage["technique"] in ("gptq", "round_to_nearest"):
    weights = {
        "num_bits": int(stage["scheme"][1]),
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": stage["group_size"],
        "observer": options.observer,
    }
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights}}
    modifier = GPTQModifier if stage["technique"] == "gptq" else QuantizationModifier
    recipe = modifier(ignore=["lm_head"], config_groups=scheme)
else:
    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[stage["technique"]]
    structure = stage.get("mask_structure", "0:0")
    recipe = modifier(
        ignore=["re:.*lm_head"], targets=["Linear"], sparsity=stage.get("sparsity", 0.5), mask_structure=structure
    )
oneshot(
    model=model,
    tokenizer=AutoTokenizer.from_pretrained(options.model),
    dataset=Dataset.from_dict({"input_ids": samples.tolist(), "attention_mask": torch.ones_like(samples).tolist()}),
    recipe=recipe,
    max_seq_length=samples.shape[1],
    num_calibration_samples=samples.shape[0],
    output_dir=options.output,
)
print(f"inside the process: {time.perf_counter() - begin:.1f} s")
