"""The lines of Python that open an artifact and use it, as its report and its model card show them."""

from __future__ import annotations

from collections.abc import Mapping

from workers.architectures import AUTO_CLASSES, Task
from workers.recipe_parts import Format

_PACKAGES: Mapping[Format, str] = {
    "safetensors": "torch transformers",
    "compressed-tensors": "torch transformers compressed-tensors",
    "bitsandbytes": "torch transformers accelerate bitsandbytes",
    "sparse-bitmask": "torch transformers",
}
_OPEN = """\
# pip install {packages}
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/to/artifact")
"""
_OPEN_SPARSE = """\
# pip install {packages}
# For plain transformers, write the dense form: python path/to/artifact/load_sparse.py path/to/artifact dense
import sys

from transformers import AutoTokenizer

sys.path.insert(0, "path/to/artifact")
from load_sparse import load_model

model = load_model("path/to/artifact")
"""
_USE: Mapping[Task, str] = {
    "causal": """\
tokenizer = AutoTokenizer.from_pretrained("path/to/artifact")
inputs = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
""",
    "masked": """\
tokenizer = AutoTokenizer.from_pretrained("path/to/artifact")
inputs = tokenizer(f"Hello {tokenizer.mask_token}", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model(**inputs).logits[0].argmax(dim=-1)))
""",
    "classification": """\
tokenizer = AutoTokenizer.from_pretrained("path/to/artifact")
inputs = tokenizer("Hello", return_tensors="pt", return_token_type_ids=False)
print(model.config.id2label[model(**inputs).logits[0].argmax().item()])
""",
}


def load_snippet(output_format: Format, task: Task) -> str:
    """Python that opens an artifact of this format, with what has to be installed for it, and does the model's task."""
    lines = _OPEN_SPARSE if output_format == "sparse-bitmask" else _OPEN
    return lines.format(packages=_PACKAGES[output_format], auto_class=AUTO_CLASSES[task]) + _USE[task]
