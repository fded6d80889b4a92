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
_OPEN_BY_LOADER = """\
# pip install {packages}
# {note}
import sys

from transformers import AutoTokenizer

sys.path.insert(0, "path/to/artifact")
from {loader} import load_model

model = load_model("path/to/artifact")
"""
_NOTES = {
    "load_sparse": "For plain transformers, write the dense form: "
    "python path/to/artifact/load_sparse.py path/to/artifact dense",
    "load_compact": "Plain transformers does not open this model: the load_compact.py that lies in it does.",
}
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


def load_snippet(output_format: Format, task: Task, loader: str | None = None) -> str:
    """Python that opens an artifact of this format, with what has to be installed for it, and does the model's task.

    ``loader`` is the module in the artifact that opens it; None where plain transformers does.
    """
    packages = _PACKAGES[output_format]
    if loader is not None:
        return _OPEN_BY_LOADER.format(packages=packages, note=_NOTES[loader], loader=loader) + _USE[task]
    return _OPEN.format(packages=packages, auto_class=AUTO_CLASSES[task]) + _USE[task]
