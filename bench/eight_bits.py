"""Where 8-bit weights and activations lose: SmolLM2-135M, simulated, the layers of one kind at a time.

    .venv/bin/python -m bench.eight_bits

Divergence from the original (KL, thousandths of a nat a token) on 2,048 tokens of WikiText-2's test text, with scales
from its validation text. The most changed 2 % of the tokens are left out: single ones have whole nats each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.materials import smollm2, wikitext
from workers.evaluation.divergence import kl_divergence_of_logits
from workers.solvers.activations import round_tokens
from workers.solvers.quantization import Grid, quantize_to_nearest
from workers.solvers.scaling import smoothing_scale

KINDS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
KEPT_TOKENS = 0.98

Round = Callable[[Tensor], Tensor]


def main() -> None:
    """Print a line for each kind of layers and way of rounding."""
    bench = Simulation()
    for name, ends in KINDS.items():
        for strength in (None, 0.5, 0.8):
            here = f"{name}, strength {strength}"
            bench.show(f"W8, {here}", ends, weights=_int8_weight, strength=strength)
            for how, inputs in (("even", _int8_even), ("zero-points", _int8)):
                bench.show(f"A8 {how}, {here}", ends, inputs=inputs, strength=strength)
                bench.show(f"W8A8 {how}, {here}", ends, weights=_int8_weight, inputs=inputs, strength=strength)
    bench.show("FP8, all", ("_proj",), weights=_float8, inputs=_float8)
    bench.show("FP8 weights, all", ("_proj",), weights=_float8)
    bench.show("FP8 activations, all", ("_proj",), inputs=_float8)


class Simulation:
    """The model in float32, with rounding that can be put in and taken out."""

    def __init__(self) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(smollm2())
        self._model: Any = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
        layers = self._model.get_submodule("model.layers").named_modules(prefix="model.layers")
        self._layers = {name: module for name, module in layers if isinstance(module, nn.Linear)}
        self._weights = {name: layer.weight.data for name, layer in self._layers.items()}
        self._tokens = torch.tensor(tokenizer(wikitext("test")[:16_000])["input_ids"])[:2_048].view(4, 512)
        self._largest: dict[str, Tensor] = {}
        hooks = [layer.register_forward_pre_hook(partial(self._see, name)) for name, layer in self._layers.items()]
        calibration = torch.tensor(tokenizer(wikitext("valid")[:24_000])["input_ids"])[:4_096].view(8, 512)
        self._logits(calibration)
        for hook in hooks:
            hook.remove()
        self._original = self._logits(self._tokens).log_softmax(dim=-1)

    def show(
        self,
        what: str,
        ends: tuple[str, ...],
        *,
        strength: float | None = None,
        weights: Round | None = None,
        inputs: Round | None = None,
    ) -> None:
        """Print what rounding the weights, the inputs or both costs in the layers whose names end so."""
        hooks = []
        for block in range(self._model.config.num_hidden_layers):
            names = [name for name in self._layers if f".{block}." in name and name.endswith(ends)]
            scale = torch.ones(())
            if strength is not None:
                scale = smoothing_scale(self._largest[names[0]], [self._weights[name] for name in names], strength)
            for name in names:
                if weights is not None:
                    self._layers[name].weight.data = weights(self._weights[name] * scale) / scale
                if inputs is not None:
                    hooks.append(self._layers[name].register_forward_pre_hook(partial(_round_input, inputs, scale)))
        divergence = kl_divergence_of_logits(self._original, self._logits(self._tokens)).flatten().sort().values
        print(f"{what:48} {1000 * float(divergence[: int(KEPT_TOKENS * len(divergence))].mean()):8.2f}", flush=True)
        for hook in hooks:
            hook.remove()
        for name, weight in self._weights.items():
            self._layers[name].weight.data = weight

    @torch.inference_mode()
    def _logits(self, sequences: Tensor) -> Tensor:
        return torch.cat([self._model(input_ids=ids.unsqueeze(0), use_cache=False).logits for ids in sequences])

    def _see(self, name: str, _: nn.Module, arguments: tuple[Tensor]) -> None:
        largest = arguments[0].abs().flatten(0, -2).amax(dim=0)
        self._largest[name] = torch.maximum(largest, self._largest.get(name, largest))


def _round_input(quantize: Round, scale: Tensor, _: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (quantize(arguments[0] / scale) * scale,)


def _int8_weight(weight: Tensor) -> Tensor:
    grid = Grid(8, weight.shape[1], True, torch.bfloat16)
    return quantize_to_nearest(weight.contiguous(), grid, clip_search=False).dequantize()


def _int8(inputs: Tensor) -> Tensor:
    return round_tokens(inputs, None, symmetric=False)


def _int8_even(inputs: Tensor) -> Tensor:
    return round_tokens(inputs, None, symmetric=True)


def _float8(values: Tensor) -> Tensor:
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 448
    return (values / scale).to(torch.float8_e4m3fn).to(torch.float32).mul_(scale)


if __name__ == "__main__":
    main()
