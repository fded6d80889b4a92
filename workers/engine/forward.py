"""Forward passes that stop at chosen layers and go on later.

A linear layer can be compressed the moment its input is complete for the whole calibration text and before its
output is computed. So every batch runs the model's own forward up to that layer and waits there; when the layer has
been compressed, all of them go on with the new weight. One pass of each block both gathers and propagates, in true
sequential order, and the model's own code decides masks, positions and everything else. Each waiting pass is a
greenlet: a stack of its own, resumed where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import greenlet
from torch import Tensor, nn

from workers.engine.device import inexact_products
from workers.engine.holdings import Holdings, MemoryBudget
from workers.errors import is_out_of_memory, model_unusable

logger = logging.getLogger(__name__)


@dataclass
class Stop:
    """Where a pass waits, and the input that it brought there."""

    name: str
    inputs: Tensor


class ForwardPass:
    """One batch on its way through a model with gates."""

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        options: Mapping[str, Any] | None = None,
        *,
        heeds_transforms: bool = True,
        is_exact: bool = True,
        skips: Collection[str] = (),
        budget: MemoryBudget | None = None,
    ) -> None:
        """``skips`` are blocks that the pass goes through without change, if they are :class:`Skippable`."""
        self._products = nullcontext if is_exact else inexact_products
        self.input_shape = input_ids.shape  # batch × tokens
        self._holdings = None if budget is None else Holdings(budget, model)
        self._greenlet = greenlet.greenlet(lambda: model(input_ids=input_ids, **(options or {})).logits)
        self._greenlet.heeds_transforms = heeds_transforms
        self._greenlet.skips = skips

    def advance_to(self, name: str) -> Tensor:
        """Go on to the stop called ``name``, past any other, and return the input there."""
        while True:
            reached = self._go_on()
            assert isinstance(reached, Stop), f"the pass ended before {name}: is its place in the table right?"
            if reached.name == name:
                return reached.inputs

    def finish(self) -> Tensor:
        """Go on to the end, past any stop, and return the logits: batch × tokens × vocabulary, or batch × classes."""
        while True:
            reached = self._go_on()
            if isinstance(reached, Tensor):
                return reached

    def rest(self) -> None:
        """Wait without taking memory beyond the budget: what the pass brought to its stop may be read no more."""
        if self._holdings is not None:
            self._holdings.put_away()

    def _go_on(self) -> Stop | Tensor:
        """Run the model's own code to its next stop. What fails there fails in every loader: the model is at fault."""
        if self._holdings is not None:
            self._holdings.bring_back()
        try:
            with self._holdings or nullcontext(), self._products():
                reached: Stop | Tensor = self._greenlet.switch()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.exception("the model's forward pass failed")
            raise model_unusable(error) from error
        return reached

    def abandon(self) -> None:
        """End the pass where it waits and free what it holds."""
        if self._greenlet:
            self._greenlet.throw()
        if self._holdings is not None:
            self._holdings.forget()


class Gate:
    """Stands before a module. Passes stop there if they shall, and read from then on what ``transform`` makes of it.

    One hook does both: one that is set while a pass waits before the module would not be called any more.
    """

    def __init__(self, name: str, module: nn.Module, *, stops: bool) -> None:
        self.transform: Callable[[Tensor], Tensor] | None = None
        self._name = name
        self._stops = stops
        self._handle = module.register_forward_pre_hook(self._pass)

    def remove(self) -> None:
        """Let everything through as it is."""
        self._handle.remove()

    def _pass(self, _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        current = greenlet.getcurrent()
        hub = current.parent
        if self._stops and hub is not None:
            hub.switch(Stop(self._name, arguments[0]))
        if self.transform is None or not getattr(current, "heeds_transforms", True):
            return arguments
        return (self.transform(arguments[0]), *arguments[1:])


class Skippable:
    """Lets each pass go through a block, or leave it out if that is what the pass skips."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._module = module
        self._own = module.forward
        module.forward = self._forward

    def remove(self) -> None:
        """Let all passes through the block again."""
        del self._module.forward  # the class's own is there again

    def _forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        if self._name in getattr(greenlet.getcurrent(), "skips", ()):
            return hidden_states
        return self._own(hidden_states, *arguments, **named)


class SharedTransform:
    """What several modules read of one input, made once: they are called with it one after another."""

    def __init__(self, transform: Callable[[Tensor], Tensor], num_readers: int) -> None:
        self._transform = transform
        self._num_readers = num_readers
        self._made: tuple[Tensor, Tensor] | None = None
        self._num_read = 0

    def __call__(self, inputs: Tensor) -> Tensor:
        """The transform of ``inputs``, forgotten when the last module has read it."""
        if self._made is None or self._made[0] is not inputs:
            self._made, self._num_read = (inputs, self._transform(inputs)), 0
        made = self._made[1]
        self._num_read += 1
        if self._num_read == self._num_readers:
            self._made = None
        return made
