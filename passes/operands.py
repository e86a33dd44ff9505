"""Reading an operation's operands: shapes and dimension numbers. What cannot be told raises Blocked."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lncompile.passes.axes import Size, shape_of
from lncompile.passes.canonical import Key, Operation, tensor_of, value_of
from lncompile.passes.decisions import Blocked, Reason


def shape(operand: object) -> tuple[Size, ...]:
    """Shape of an operand: a node's tensor, or () for a number. Raises Blocked where there is no single tensor."""
    if not isinstance(operand, fx.Node):
        return ()
    value = value_of(operand)
    if isinstance(value, Tensor):
        return shape_of(value)
    if isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
        return ()
    raise Blocked(Reason.UNKNOWN_OPERATION, f"the shape of {operand.name} is not known")


def result_shape(operation: Operation) -> tuple[Size, ...]:
    """Shape of the operation's result."""
    tensor = tensor_of(operation.node)
    if tensor is None:
        raise Blocked(Reason.UNKNOWN_OPERATION, f"the shape of {operation.node.name} is not known")
    return shape_of(tensor)


def dimension_of(index: object, rank: int) -> int:
    """Return a non-negative dimension number. Raises Blocked for one that is not a plain number."""
    if not isinstance(index, int):
        raise Blocked(Reason.UNKNOWN_OPERATION, "a dimension is not a plain number")
    return index % rank if rank else 0


def dimensions_of(indices: object, rank: int) -> tuple[int, ...]:
    """Return non-negative dimension numbers of an int or a list of them."""
    if isinstance(indices, list | tuple):
        return tuple(dimension_of(index, rank) for index in indices)
    return (dimension_of(indices, rank),)


def other_operands(operation: Operation, *names: str) -> frozenset[Key]:
    """Keys of all operands except those of the named parameters."""
    return frozenset(key for key, _ in operation.operands() if key[0] not in names)
