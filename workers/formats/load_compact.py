"""Opens a model with linear layers of low rank, or with blocks that share parameters. Needs only transformers.

    model = load_model("ARTIFACT")              a model of transformers, in memory

config.json has an entry "attar". Its "low_rank" gives linear layers by name, each with its rank: such a layer is two,
one after the other, LAYER.in_factor (rank × in_features, no bias) and LAYER.out_factor (out_features × rank, with the
layer's bias). Its "shared" gives blocks by name, each with an earlier block whose parameters it has; those are stored
once. The weights lie in compact.safetensors, or in the files that compact.safetensors.index.json names: under their
usual names plain transformers would find them, and make up what it misses.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

# torch and transformers are imported where they are used: who only asks for names needs neither.

WEIGHTS = "compact.safetensors"
WEIGHTS_INDEX = "compact.safetensors.index.json"
KEY = "attar"


def load_model(folder: str | Path, dtype: Any = "auto", **options: Any) -> Any:
    """The model in ``folder`` as transformers' from_pretrained would give it, in ``dtype`` or that of its config.

    ``options`` are those of from_pretrained.

    Raises:
        ValueError: A file is damaged, or does not hold what config.json calls for.
    """
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    # Nothing here runs code that comes with a model.
    config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model_class = getattr(transformers, str((config.architectures or [""])[0]), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(f"config.json names no model class of transformers: {config.architectures}")  # noqa: TRY004
    weights: dict[str, Any] = {}
    for name in weight_files(folder):
        try:
            weights |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"{name} is damaged: {error}") from None
    for block, source in _entry(config, "shared", str).items():
        weights |= {
            block + name.removeprefix(source): weights[name] for name in list(weights) if name.startswith(f"{source}.")
        }
    settings = {}
    if (folder / "generation_config.json").exists():
        settings["generation_config"] = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    loader: Any = compact_class(model_class)
    model, found = loader.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, **settings, **options
    )
    wrong = {
        key: sorted(found[key])[:5] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[key]
    }
    if wrong:
        raise ValueError(f"the weights are not those that config.json calls for: {wrong}")
    share_parameters(model)
    return model.eval()


def weight_files(folder: Path) -> list[str]:
    """Names of the files of weights in ``folder``.

    Raises:
        ValueError: There are none, or the index does not name files of this folder.
    """
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    try:
        weight_map = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except FileNotFoundError:
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{WEIGHTS_INDEX} has no weight_map that names files") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{WEIGHTS_INDEX} names {name!r}, which is no file of this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
    return names


def compact_class(model_class: type) -> type:
    """``model_class``, a model of transformers, whose models have factors where their config says so."""

    def __init__(self: Any, config: Any, *arguments: Any, **named: Any) -> None:  # noqa: N807
        model_class.__init__(self, config, *arguments, **named)  # type: ignore[misc]
        factor_layers(self)

    # By the same name and place: what transformers knows of the model, it looks up by these.
    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


def factor_layers(model: Any) -> None:
    """Put two linear layers in the place of each that the model's config gives a rank."""
    import torch
    from torch import nn

    class LowRankLinear(nn.Sequential):
        """Two linear layers, one after the other."""

        @property
        def weight(self) -> Any:
            """Of the one that gives the output: GPT-2's code asks for it, and begins it anew unless it was loaded.

            Packed codes have none: something empty may be begun anew.
            """
            return getattr(self[-1], "weight", torch.empty(0))

    for name, rank in _entry(model.config, "low_rank", int).items():
        layer = _submodule(model, name)
        if hasattr(layer, "nf"):  # GPT-2's Conv1D
            columns, rows = layer.nx, layer.nf
        elif isinstance(layer, nn.Linear):
            columns, rows = layer.in_features, layer.out_features
        else:
            raise ValueError(f"config.json gives a rank to {name}, which is no linear layer")
        if not 1 <= rank <= max(columns, rows):
            raise ValueError(f"config.json gives {name} a rank of {rank}")
        factors: OrderedDict[str, nn.Module] = OrderedDict(
            in_factor=nn.Linear(columns, rank, bias=False),
            out_factor=nn.Linear(rank, rows, bias=layer.bias is not None),
        )
        parent, _, own_name = name.rpartition(".")
        setattr(_submodule(model, parent), own_name, LowRankLinear(factors))


def share_parameters(model: Any) -> None:
    """Give blocks that share the very parameters of their sources: one in memory, and one to train."""
    for block, source in _entry(model.config, "shared", str).items():
        for name, module in _submodule(model, block).named_modules():
            twin = _submodule(model, f"{source}.{name}" if name else source)
            module._parameters.update(twin._parameters)


def _entry(config: Any, name: str, kind: type) -> dict[str, Any]:
    """A part of the entry of config.json; ValueError where it is not one."""
    entry = getattr(config, KEY, {})
    part = entry.get(name, {}) if isinstance(entry, dict) else None
    if not isinstance(part, dict) or not all(type(value) is kind for value in part.values()):
        raise ValueError(f"config.json has no sound {name} in {KEY}")
    return part


def _submodule(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"config.json names {name}, which the model has not") from None
