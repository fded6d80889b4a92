"""llm-compressor's GPTQ on a folder: run by speed.py with the Python of an environment of its own."""

import argparse
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("model")
arguments.add_argument("samples", help="safetensors file with input_ids, samples × tokens")
arguments.add_argument("output")
arguments.add_argument("--group-size", type=int, required=True)
arguments.add_argument("--observer", default="minmax")
arguments.add_argument("--num-threads", type=int, required=True)
options = arguments.parse_args()

torch.set_num_threads(options.num_threads)
begin = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
samples = load_file(options.samples)["input_ids"]
weights = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": options.group_size,
    "observer": options.observer,
}
oneshot(
    model=model,
    tokenizer=AutoTokenizer.from_pretrained(options.model),
    dataset=Dataset.from_dict({"input_ids": samples.tolist(), "attention_mask": torch.ones_like(samples).tolist()}),
    recipe=GPTQModifier(ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}),
    max_seq_length=samples.shape[1],
    num_calibration_samples=samples.shape[0],
    output_dir=options.output,
)
print(f"inside the process: {time.perf_counter() - begin:.1f} s")
