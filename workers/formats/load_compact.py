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
    for block, source in _shared(config).items():
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
    from torch import nn

    class LowRankLinear(nn.Sequential):
        """Two linear layers, one after the other."""

        @property
        def weight(self) -> Any:
            """Of the one that gives the output: GPT-2's code asks for it, and begins it anew unless it was loaded."""
            return self[-1].weight

    for name, rank in (getattr(model.config, KEY, None) or {}).get("low_rank", {}).items():
        layer = model.get_submodule(name)
        # A linear layer, or GPT-2's Conv1D.
        columns, rows = (layer.nx, layer.nf) if hasattr(layer, "nf") else (layer.in_features, layer.out_features)
        factors: OrderedDict[str, nn.Module] = OrderedDict(
            in_factor=nn.Linear(columns, rank, bias=False),
            out_factor=nn.Linear(rank, rows, bias=layer.bias is not None),
        )
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, LowRankLinear(factors))


def share_parameters(model: Any) -> None:
    """Give blocks that share the very parameters of their sources: one in memory, and one to train."""
    for block, source in _shared(model.config).items():
        for name, module in model.get_submodule(block).named_modules():
            twin = model.get_submodule(f"{source}.{name}" if name else source)
            module._parameters.update(twin._parameters)


def _shared(config: Any) -> dict[str, str]:
    """Blocks, each with the one whose parameters it has."""
    shared: dict[str, str] = (getattr(config, KEY, None) or {}).get("shared", {})
    return shared
