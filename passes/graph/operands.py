"""Reading an operation's operands: shapes and dimension numbers. What cannot be told raises Blocked."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation, canonicalise, function_name, tensor_of, value_of
from lncompile.passes.graph.sizes import Size, shape_of
from lncompile.passes.graph.traits import Trait, has


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
    # `x.var(False)` asks for another divisor, not for dimension 0.
    if not isinstance(index, int) or isinstance(index, bool):
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


# Set in the meta of nodes whose storage is written to (by `graph_facts`): what made them says nothing of their values.
WRITTEN = "lnfold_written"

# Set in the meta of nodes that center a parameter in its own dtype (by `rewrite`): along which axes.
CENTERED_ALONG = "lnfold_centered_along"

# Set in the meta of a parameter's placeholder that is to stay as it is, by whoever asks for an analysis: why, in words.
KEPT = "lnfold_kept"

# Set in the meta of a graph's output where what is the same for all features has to stay in it (``x + 1``): a rewrite
# of the graph takes it out with the mean, centered parameters alone do not.
CONSTANTS_STAY = "lnfold_constants_stay"

# What has no canonical form and is computed element by element too, by the names of torch's functions.
_COMPARISONS = frozenset(
    "eq ne lt le gt ge and_ or_ xor invert bitwise_and bitwise_or bitwise_not logical_and logical_or logical_not bool "
    "long int sigmoid exp".split()
)


def is_constant_along(node: fx.Node, axes: Axes) -> bool:
    """Whether a tensor's values are provably the same along ``A``, though its shape extends along it.

    A mask or an index that was expanded along the features is: ``mask.unsqueeze(-1).expand_as(x)``.
    """
    if node.meta.get(WRITTEN):
        return False
    operation = canonicalise(node)
    if operation is not None and has(operation, Trait.EXPANDS | Trait.TILES):
        source = operation["input"]
        if not isinstance(source, fx.Node):
            return False
        sizes = shape(source)
        if all(sizes[d - axes.rank] == 1 for d in axes.normalised_dimensions if d >= axes.rank - len(sizes)):
            return True
        return has(operation, Trait.EXPANDS) and len(sizes) == axes.rank and is_constant_along(source, axes)
    elementwise = has(operation, Trait.ADDS | Trait.SCALES | Trait.NEGATES | Trait.CASTS)
    if operation is not None and operation.in_place:
        return False
    if not elementwise and function_name(node) not in _COMPARISONS:
        return False
    return all(_operand_is_constant_along(source, axes) for source in node.all_input_nodes)


def _operand_is_constant_along(node: fx.Node, axes: Axes) -> bool:
    sizes = shape(node)
    if all(sizes[d - axes.rank] == 1 for d in axes.normalised_dimensions if d >= axes.rank - len(sizes)):
        return True
    return len(sizes) == axes.rank and is_constant_along(node, axes)
