"""Means, sums and variances over axes, and views of them: what a single reduction computes.

How authors put means together from sums is read in :mod:`.totals`, what becomes of them in :mod:`.differences`. A mean
is of interest here only as something to subtract, so it counts as one where it has the shape that ``keepdim=True``
gives, which broadcasts against ``x``; views on the way there (``unsqueeze``, ``[..., None]``) are looked through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lncompile.passes.decisions import Blocked
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Operation, canonicalise, tensor_of
from lncompile.passes.graph.operands import WRITTEN, dimensions_of, shape
from lncompile.passes.graph.sizes import Size, same_size
from lncompile.passes.graph.traits import Trait, has

Subject = tuple[fx.Node, Axes]


@dataclass(frozen=True)
class Moment:
    """A mean or a variance of ``source`` over ``axes``, which the author listed as ``dimensions``."""

    source: fx.Node
    axes: Axes
    dimensions: tuple[int, ...]

    @property
    def subject(self) -> Subject:
        """What it is a moment of, however it is spelled."""
        return self.source, self.axes

    @property
    def kept_shape(self) -> tuple[Size, ...]:
        """Its shape under ``keepdim=True``."""
        return tuple(1 if i in self.dimensions else size for i, size in enumerate(shape(self.source)))

    def is_kept(self, node: fx.Node) -> bool:
        """Whether a node that holds it has the shape of ``keepdim=True``, so that it broadcasts against the source."""
        return same_shape(shape(node), self.kept_shape)


def same_shape(left: tuple[Size, ...], right: tuple[Size, ...]) -> bool:
    """Whether two shapes are provably equal."""
    return len(left) == len(right) and all(same_size(a, b) for a, b in zip(left, right, strict=True))


def behind_views(node: fx.Node) -> fx.Node:
    """Return what a node is a view of: the same elements in the same order and dtype, under other dimensions."""
    while (source := viewed(node)) is not None:
        node = source
    return node


def viewed(node: fx.Node) -> fx.Node | None:
    """What a node is a view of, one step; None for anything else."""
    operation = canonicalise(node)
    if operation is None or operation.in_place:
        return None
    source = operation.arguments.get("input")
    if not isinstance(source, fx.Node):
        return None
    before, after = tensor_of(source), tensor_of(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    if has(operation, Trait.CASTS | Trait.RESHAPES):
        return source
    if operation.name != "getitem":
        return None
    index = operation["index"] if isinstance(operation["index"], tuple | list) else (operation["index"],)
    whole = all(item is None or item is Ellipsis or item == slice(None) for item in index if not _is_node(item))
    return source if whole and not any(_is_node(item) for item in index) else None


def _is_node(item: object) -> bool:
    return isinstance(item, fx.Node)


def exact_origin(node: fx.Node) -> fx.Node:
    """The tensor whose values a node has, element by element: what casts to dtypes as fine or finer were made of."""
    while (operation := settled(node)) is not None and has(operation, Trait.CASTS):
        source = operation["input"]
        if operation.in_place or not isinstance(source, fx.Node) or source.meta.get(WRITTEN):
            break
        before, after = tensor_of(source), tensor_of(node)
        if before is None or after is None or not (before.is_floating_point() and after.is_floating_point()):
            break
        narrow, wide = torch.finfo(before.dtype), torch.finfo(after.dtype)
        if wide.eps > narrow.eps or wide.max < narrow.max:
            break
        node = source
    return node


def passes_gradients(node: fx.Node, source: fx.Node) -> bool:
    """Whether gradients pass from a value to the tensor that it is computed from by a chain of operations.

    They do not where the chain is cut by ``detach`` or ``torch.no_grad()``. A mean that is cut off is a constant to the
    gradient, and ``x`` without it has another gradient than ``x - mean(x)``.
    """
    if not torch.is_grad_enabled():
        return True  # the graph computes none
    value, origin = tensor_of(node), tensor_of(source)
    return value is not None and origin is not None and value.requires_grad == origin.requires_grad


def settled(node: fx.Node) -> Operation | None:
    """The operation of a node whose value stays what the operation made it."""
    return None if node.meta.get(WRITTEN) else canonicalise(node)


def reduction(operation: Operation) -> Moment | None:
    """What a reduction over listed dimensions reduces."""
    source = operation["input"]
    return None if operation["dim"] is None else over_dimensions(source, operation["dim"])


def over_dimensions(source: object, listed: object) -> Moment | None:
    """The moment of a tensor over listed dimensions; None where they cannot be told."""
    if not isinstance(source, fx.Node):
        return None
    try:
        sizes = shape(source)
        dimensions = dimensions_of(listed, len(sizes))
    except Blocked:
        return None
    # No dimensions listed means all of them, to torch.
    return Moment(source, Axes.of(sizes, dimensions), dimensions) if dimensions else None


def spread_of(node: fx.Node) -> tuple[Operation, Moment] | None:
    """Read a node as the variance or deviation of ``x`` as torch computes it, biased or not, in any shape."""
    operation = settled(behind_views(node))
    if operation is not None and operation.name == "getitem" and operation["index"] == 0:
        both = operation["input"]
        operation = canonicalise(both) if isinstance(both, fx.Node) else None
        names: tuple[str, ...] = ("var_mean", "std_mean")
    else:
        names = ("var", "std")
    if operation is None or operation.name not in names:
        return None
    moment = reduction(operation)
    return None if moment is None else (operation, moment)


def correction_of(operation: Operation) -> float | None:
    """What a variance or deviation takes off the number of elements it divides by: 0 for the biased one.

    None where that is not a plain number.
    """
    if operation["correction"] is not None:
        given = operation["correction"]
        return given if isinstance(given, int | float) else None
    if operation["unbiased"] is None or isinstance(operation["unbiased"], bool):
        return 0 if operation["unbiased"] is False else 1
    return None


def squared(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Read a node as ``a · a`` (one node twice) or ``a · b``: its two factors."""
    operation = settled(node)
    if operation is None or operation.in_place or not isinstance(operation.arguments.get("input"), fx.Node):
        return None
    factor = operation["input"]
    if operation.name == "square" or (operation.name == "pow" and operation["exponent"] == 2):
        return factor, factor
    if operation.name == "mul" and isinstance(operation["other"], fx.Node):
        return factor, operation["other"]
    return None
