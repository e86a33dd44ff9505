"""How a model's result is made of what a captured graph returns.

Dynamo returns a tensor once that stands in several places, and nothing for arguments, parameters and None. It also
returns what the model keeps for itself. Its bytecode puts the result together, out of the very objects that the graph
returned. So one call with an example shows where each of them goes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lncompile.lowering import torch_private

# The key under which a mark finds the values to be put in, in the memo of a copy.
_VALUES = "values"


class Size(int):
    """A number that a graph returned. It is an object of its own, so that it can be found in the result."""


class _Mark:
    """Stands for a value in a result. In a copy with values at hand the value takes its place."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        values = memo.get(_VALUES)
        return _Mark(self.index) if values is None else values[self.index]


class _Asked:
    """Values that remember which of them were asked for."""

    def __init__(self) -> None:
        self.indices: set[int] = set()

    def __getitem__(self, index: int) -> None:
        self.indices.add(index)


class Returned:
    """The form of a model's result, with marks where values go.

    Containers that torch knows are taken apart. Other objects that hold values, such as caches, are copied at each
    call, with the new values in them.

    Args:
        result: what the model returned.
        outputs: what the graph returned in this call; the same objects stand in the result.
        arguments: the tensors that the model was called with.

    Attributes:
        outputs: positions of those outputs of the graph that stand in the result.
        constants: tensors of the result that the graph neither returned nor was called with.

    Raises:
        TypeError: for an array of NumPy in the result. It is made of a tensor, and is not that tensor.
    """

    def __init__(self, result: Any, outputs: Sequence[Any], arguments: Sequence[Tensor]) -> None:
        leaves, self._form = torch_private.tree_flatten(result)
        values: list[Any] = [*outputs, *arguments]
        marks = {id(value): _Mark(i) for i, value in reversed([*enumerate(values)]) if isinstance(value, Tensor | Size)}
        self.constants: list[Tensor] = []
        for leaf in leaves:
            if type(leaf).__module__.partition(".")[0] == "numpy":
                raise TypeError(f"the model returns a {type(leaf).__name__} of NumPy, and no graph returns that")
            if isinstance(leaf, Tensor) and id(leaf) not in marks:
                marks[id(leaf)] = _Mark(len(values) + len(self.constants))
                self.constants.append(leaf)
        asked: set[int] = set()
        self._leaves = [_with_marks(leaf, marks, asked) for leaf in leaves]
        self.outputs = tuple(sorted(asked.intersection(range(len(outputs)))))
        # At a call the graph returns these outputs and the constants, and the arguments are there.
        constants = range(len(values), len(values) + len(self.constants))
        self._indices = (*self.outputs, *constants, *range(len(outputs), len(values)))

    def result(self, outputs: Sequence[Any], arguments: Sequence[Tensor]) -> Any:
        """What the model returns.

        Args:
            outputs: what the graph returns: the outputs that were asked for, and the constants.
            arguments: the tensors that the model is called with.
        """
        values = dict(zip(self._indices, (*outputs, *arguments), strict=True))
        leaves = [
            values[leaf.index]
            if isinstance(leaf, _Mark)
            else _filled(leaf.template, values)
            if isinstance(leaf, _Filled)
            else leaf
            for leaf in self._leaves
        ]
        return torch_private.tree_unflatten(leaves, self._form)


class _Filled:
    """An object of the model's own that holds values: a copy of it, with marks in their place."""

    def __init__(self, template: Any) -> None:
        self.template = template


def _filled(template: Any, values: Any) -> Any:
    """A copy of an object, with values in the place of marks."""
    memo: dict[Any, Any] = {_VALUES: values}
    return copy.deepcopy(template, memo)


def _with_marks(leaf: Any, marks: dict[int, _Mark], asked: set[int]) -> Any:
    """A leaf of the result: a mark, an object with marks in it, or what it is at every call."""
    mark = marks.get(id(leaf))
    if mark is not None:
        asked.add(mark.index)
        return mark
    # What the memo of a copy holds is not copied again, so a mark takes the place of each value.
    template = copy.deepcopy(leaf, dict(marks))
    held = _Asked()
    _filled(template, held)
    asked |= held.indices
    return _Filled(template) if held.indices else leaf
