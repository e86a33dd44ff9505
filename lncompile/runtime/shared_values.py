"""The materialised tensors of the process: one for each expression and its parameters, however many graphs use it."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from lncompile.lowering import torch_private_dynamo
from lncompile.passes.graph.expressions import Expression
from lncompile.runtime.parameter_state import ParameterState
from lncompile.runtime.weight_samples import local

#: Held while values are computed and put together.
lock = threading.RLock()


class Entry:
    """One materialised tensor and the state of the parameters it was made from. Kept alive by its materializers."""

    def __init__(self, expression: Expression, leaves: tuple[Tensor, ...]) -> None:
        # The state is read before the value is computed: a write in between makes the entry outdated, not wrong.
        self.state = ParameterState(leaves)
        self.value = expression.evaluate(leaves)

    def is_current(self, leaves: tuple[Tensor, ...]) -> bool:
        """Whether it was made from these parameters as they are now."""
        return self.state.is_current(leaves) and self.state.has_storages_of(leaves)


class SharedValues:
    """Materialised tensors of the process: one per (expression, parameters), however many graphs use it."""

    def __init__(self) -> None:
        self._entries: weakref.WeakValueDictionary[tuple[Any, ...], Entry] = weakref.WeakValueDictionary()

    def get(self, expression: Expression, leaves: tuple[Tensor, ...]) -> tuple[Entry, bool]:
        """The value of an expression, and whether another graph's value of it turned out to be outdated unnoticed.

        It is always computed, and then shared with the graphs that have the same one: a graph that is new, or that was
        not called for a while, is not to inherit what others made before a write that torch did not count.
        """
        key = (expression.code, *(id(leaf) for leaf in leaves))
        with lock:
            fresh = Entry(expression, leaves)
            torch_private_dynamo.count("materialized")
            # An id() is used again after its owner is freed; the entry's state knows.
            known = self._entries.get(key)
            believed = known is not None and known.is_current(leaves)
            if known is not None and believed and _are_equal(known.value, fresh.value):
                return known, False
            self._entries[key] = fresh
            return fresh, believed

    def clear(self) -> None:
        """Share none of the present ones any more."""
        with lock:
            self._entries.clear()


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two values are the same, those that are not numbers included; of sharded ones what this process holds."""
    one, other = local(one), local(other)
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


shared_values = SharedValues()
