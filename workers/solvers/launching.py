"""Many small operations on an accelerator, launched as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]


class LaunchedAsOne:
    """A function of tensors that on CUDA is captured as a graph, once for every set of shapes and constants.

    A column loop launches thousands of kernels that take microseconds each; from Python, launching them takes many
    times longer than running them. The function has to do the same operations whatever its tensors hold.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._captured: dict[tuple[object, ...], _Captured] = {}

    def __call__(self, *arguments: Tensor | None, **constants: Hashable) -> tuple[Tensor, ...]:
        """What the function gives; the arguments are left as they are if it does so."""
        if not any(argument is not None and argument.is_cuda for argument in arguments):
            return self._function(*arguments, **constants)
        shapes = tuple(None if argument is None else (argument.shape, argument.dtype) for argument in arguments)
        key = (shapes, tuple(constants.items()))
        if key not in self._captured:
            self._captured[key] = self._capture(arguments, constants)
        captured = self._captured[key]
        for own, given in zip(captured.inputs, arguments, strict=True):
            if own is not None and given is not None:
                own.copy_(given)
        captured.graph.replay()
        return tuple(output.clone() for output in captured.outputs)

    def _capture(self, arguments: tuple[Tensor | None, ...], constants: dict[str, Hashable]) -> _Captured:
        inputs = tuple(None if argument is None else argument.clone() for argument in arguments)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._function(*inputs, **constants)  # libraries set themselves up at the first call, which no graph may
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._function(*inputs, **constants)
        return _Captured(graph, inputs, outputs)
