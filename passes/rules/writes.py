"""Assignments into a tensor after it was made, read as a part of how it was made.

    states = zeros(2, 5, 768)
    states[:, 0] = linear(h, W, b)        # setitem
    states.index_add_(1, rows, experts)   # an in-place operation whose result is not used

Such a tensor is a stream if it is made centered and everything that is written into it is centered: then its content is
centered at all times, whatever reads it, at any time and through any view. (An explicit centering would be of one
moment, so there is none.) Which tensors qualify is a fact of the graph, see ``passes/graph/effects.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation, canonicalise, tensor_of, value_of
from lncompile.passes.graph.operands import shape
from lncompile.passes.graph.sizes import Size, shape_of
from lncompile.passes.rules import RULES, blockers
from lncompile.passes.rules.base import aligned
from lncompile.passes.rules.indexing import read_index
from lncompile.passes.rules.readings import follow_readings, resolve_reading


@dataclass(frozen=True)
class Write:
    """One assignment into a stream.

    Attributes:
        operation: the writer.
        needs: values it writes that must be available centered.
        zeros: values that ``C`` takes to zero, by their place in the writer.
    """

    operation: Operation
    needs: Mapping[fx.Node, Axes]
    zeros: tuple[Key, ...]


def can_be_read(writer: fx.Node, target: fx.Node) -> bool:
    """Whether a node that writes into ``target`` is of a kind that this module reads."""
    operation = canonicalise(writer)
    if operation is None or not operation.in_place or operation["input"] is not target or writer.users:
        return False
    return operation.name == "setitem" or operation.name in RULES


def read_write(writer: fx.Node, target: fx.Node, axes: Axes) -> Write:
    """Return what one writer needs so that a tensor centered along ``axes`` stays so.

    Raises:
        Blocked: if it would not.
    """
    operation = _operation(writer)
    if axes.partial:
        raise Blocked(Reason.MUTATION, "a tensor of which a part is centered is written to")
    if operation.name == "setitem":
        value = operation["value"]
        _forbid_other_reads(operation, value, target)
        if not isinstance(value, fx.Node):
            _taken_axes(operation, axes)
            return Write(operation, {}, (("value", None),))
        taken = _taken_axes(operation, axes)
        value_axes = aligned(shape(value), _taken_shape(operation)).backward(taken)
        return (
            Write(operation, {}, (("value", None),))
            if value_axes is None
            else Write(operation, {value: value_axes}, ())
        )
    for reading in RULES[operation.name](operation):
        resolved = resolve_reading(operation, reading, axes)
        if resolved.needs.get(target) == axes:
            needs = {node: needed for node, needed in resolved.needs.items() if node is not target}
            return Write(operation, needs, resolved.zeros)
    raise Blocked(Reason.MUTATION, f"'{operation.name}' writes into it")


def follow_write(writer: fx.Node, target: fx.Node, node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """Return what is shifted if ``node``, an operand of the writer, is; None if nothing else is.

    Raises:
        Blocked: if the writer would notice.
    """
    operation = _operation(writer)
    keys = [key for key, operand in operation.operands() if operand is node]
    if operation.name == "setitem":
        if keys == [("input", None)]:
            _taken_axes(operation, axes)  # a part of a group must not keep its shift while the rest loses it
            return None
        if keys != [("value", None)]:
            raise Blocked(*blockers.explain_consumer(writer))
        taken = aligned(shape(node), _taken_shape(operation))
        index = read_index(operation["index"], shape(target), _taken_shape(operation)).map
        between = taken.forward(axes)
        assert between is not None  # alignment loses nothing
        result = index.backward(between)
        assert result is not None  # nor does an index
        return (target, result)
    readings = (reading for reading in RULES[operation.name](operation) if all(key in reading.carriers for key in keys))
    for result in follow_readings(operation, readings, keys, axes):
        if node is not target:
            return None if result is None else (target, result)
        if result == axes:
            return None
        break
    raise Blocked(*blockers.explain_consumer(writer))


def _operation(writer: fx.Node) -> Operation:
    operation = canonicalise(writer)
    assert operation is not None  # what `can_be_read` requires
    return operation


def _forbid_other_reads(operation: Operation, value: object, target: fx.Node) -> None:
    others = [operand for key, operand in operation.operands() if key != ("input", None)]
    if target in others or (isinstance(value, fx.Node) and others.count(value) > 1):
        raise Blocked(Reason.MUTATION, "an assignment reads what it writes to, or one tensor twice")


def _taken_axes(operation: Operation, axes: Axes) -> Axes:
    """``A`` on the part of the tensor that is assigned to."""
    taken = read_index(operation["index"], shape(operation["input"]), _taken_shape(operation)).map.forward(axes)
    assert taken is not None  # this map reads all of the source
    return taken


def _taken_shape(operation: Operation) -> tuple[Size, ...]:
    """Shape of ``x[index]``, which an assignment does not compute."""
    source = tensor_of(operation["input"])
    if source is None or not all(isinstance(size, int) for size in source.shape):
        raise Blocked(Reason.MUTATION, "an assignment into a tensor of dynamic shape")

    def meta(item: Any) -> Any:
        value = value_of(item) if isinstance(item, fx.Node) else item
        if isinstance(value, torch.Tensor) and not all(isinstance(size, int) for size in value.shape):
            raise Blocked(Reason.MUTATION, "an assignment at an index of dynamic shape")
        return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, torch.Tensor) else value

    index = operation["index"]
    items = tuple(meta(item) for item in index) if isinstance(index, tuple | list) else meta(index)
    if any(isinstance(item, torch.SymInt) for item in (items if isinstance(items, tuple) else (items,))):
        raise Blocked(Reason.MUTATION, "an assignment at an index that is not known")
    try:
        return shape_of(torch.empty(tuple(source.shape), device="meta")[items])
    except (RuntimeError, NotImplementedError, IndexError) as error:
        raise Blocked(Reason.MUTATION, f"an assignment at an index of unknown shape ({error})") from error
