"""Sums over axes times a number, as authors write them; a mean is one whose number is one over the count.

    x.mean(-1)    x.sum(-1) / d    (x * (1 / d)).sum(-1)    x @ torch.full((d, 1), 1 / d)    einsum("...d->...", x) / d

What a node computes is read backwards from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import fx

from lncompile.passes.decisions import Blocked
from lncompile.passes.graph.canonical import Key, Operation, canonicalise, tensor_of
from lncompile.passes.graph.einsum_labels import einsum_labels
from lncompile.passes.graph.operands import result_shape, shape
from lncompile.passes.graph.sizes import Size, same_size
from lncompile.passes.graph.traits import Trait, has
from lncompile.passes.graph.uniform import Number, cancels, inverse, number, times, uniform_value
from lncompile.passes.norms.moments import (
    Moment,
    Subject,
    behind_views,
    exact_origin,
    over_dimensions,
    reduction,
    same_shape,
    settled,
)


@dataclass(frozen=True)
class Total:
    """``factor · Σ_A x``.

    Attributes:
        moment: what is summed over which axes.
        factor: a number, or a formula in dynamic sizes.
        key: where ``x`` stands in the operation that sums it.
        node: that operation.
        is_spread: whether it stands at every element that is summed, as after a product with a whole matrix.
        coarsest: the largest rounding step of the dtypes that it was in since.
    """

    moment: Moment
    factor: Number
    key: Key
    node: fx.Node
    is_spread: bool = False
    coarsest: float = 0.0

    @property
    def subject(self) -> Subject:
        """What is summed."""
        return self.moment.subject

    @property
    def is_mean(self) -> bool:
        """Whether it is the mean of what is summed."""
        return cancels(self.factor, self.moment.axes.count) and self.is_as_fine_as(self.moment.source)

    def is_as_fine_as(self, source: fx.Node) -> bool:
        """Whether it was in no coarser dtype than a tensor: a mean that was rounded more is another number."""
        tensor = tensor_of(source)
        return tensor is not None and tensor.is_floating_point() and self.coarsest <= torch.finfo(tensor.dtype).eps

    def broadcasts(self, node: fx.Node) -> bool:
        """Whether a node that holds it has a shape in which it broadcasts against ``x``."""
        if self.is_spread:
            return same_shape(shape(node), shape(self.moment.source))
        return self.moment.is_kept(node)

    def scaled(self, scale: Number) -> Total:
        """It times a number."""
        return replace(self, factor=times(self.factor, scale))

    def of(self, source: fx.Node) -> Total | None:
        """It as a total of ``source``, which may be scaled or widened before it is summed; None if it is not one."""
        total = self
        origin = exact_origin(source)
        while exact_origin(total.moment.source) is not origin:
            scaled = scaled_tensor(total.moment.source)
            if scaled is None or not same_shape(shape(scaled[0]), shape(total.moment.source)):
                return None
            total = replace(total, moment=replace(total.moment, source=scaled[0])).scaled(scaled[1])
        total = replace(total, moment=replace(total.moment, source=source))
        return total if total.is_as_fine_as(source) else None


def scaled_tensor(node: fx.Node) -> tuple[fx.Node, Number] | None:
    """Read a node as a tensor of its own dtype times a number."""
    operation = settled(node)
    if operation is None or operation.in_place:
        return None
    name, left = operation.name, operation.arguments.get("input")
    right = operation.arguments.get("other")
    scale: Number | None = None
    if name == "neg":
        scale = Fraction(-1)
    elif name == "mul" and isinstance(left, fx.Node) and (scale := number(right)) is not None:
        pass
    elif name == "mul" and isinstance(right, fx.Node) and (scale := number(left)) is not None:
        left = right
    elif name == "div" and operation["rounding_mode"] is None and (divisor := number(right)) is not None:
        scale = inverse(divisor)
    if scale is None or not isinstance(left, fx.Node):
        return None
    before, after = tensor_of(left), tensor_of(node)
    if before is None or after is None or before.dtype != after.dtype or not before.is_floating_point():
        return None
    return left, scale


def total_of(node: fx.Node) -> Total | None:
    """Read a node as ``factor · Σ_A x``, in whatever shape, before or after a number scales it or a cast."""
    factor: Number = Fraction(1)
    coarsest = 0.0
    while True:
        node = behind_views(node)
        operation, tensor = settled(node), tensor_of(node)
        if operation is None or operation.in_place:
            return None
        total = summed(operation)
        if tensor is None or not tensor.is_floating_point():
            return None
        coarsest = max(coarsest, torch.finfo(tensor.dtype).eps)
        if total is not None:
            return replace(total.scaled(factor), coarsest=coarsest)
        if has(operation, Trait.CASTS) and isinstance(operation["input"], fx.Node):
            node = operation["input"]
            continue
        scaled = scaled_tensor(node)
        if scaled is None:
            return None
        node, factor = scaled[0], times(factor, scaled[1])


def mean_in_any_shape(node: fx.Node) -> Moment | None:
    """Read a node as ``mean_A(x)``, in whatever shape."""
    total = total_of(node)
    return total.moment if total is not None and total.is_mean and not total.is_spread else None


# --- the operations that sum ---


def summed(operation: Operation) -> Total | None:
    """Read one operation as the sum or mean of an operand over axes, times a number."""
    if operation.name not in _SUMS:
        return None
    try:
        return _SUMS[operation.name](operation)
    except Blocked:
        return None


def _total(
    operation: Operation, moment: Moment | None, factor: Number | None = None, key: Key = ("input", None)
) -> Total | None:
    if moment is None:
        return None
    factor = inverse(number_of(moment)) if factor is None else factor
    return None if factor is None else Total(moment, factor, key, operation.node)


def number_of(moment: Moment) -> Number:
    """How many elements it sums."""
    count = moment.axes.count
    return Fraction(count) if isinstance(count, int) else count


def _mean(operation: Operation) -> Total | None:
    return _total(operation, reduction(operation))


def _sum(operation: Operation) -> Total | None:
    return _total(operation, reduction(operation), Fraction(1))


def _second_of_two(operation: Operation) -> Total | None:
    both = canonicalise(operation["input"]) if isinstance(operation["input"], fx.Node) else None
    if operation["index"] != 1 or both is None or both.name not in ("var_mean", "std_mean"):
        return None
    return _total(both, reduction(both))


def _product(operation: Operation) -> Total | None:
    """``x @ c1`` over the last axis of ``x``, and ``c1ᵀ @ x`` over the last but one."""
    left, right = operation["input"], operation["other"]
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    rows, columns = shape(left), shape(right)
    if (factor := uniform_value(right)) is not None and rows:
        repeated = columns[-1:] if len(columns) > 1 else ()
        same = same_shape(result_shape(operation), (*rows[:-1], *repeated))
        return _spread(_total(operation, over_dimensions(left, -1), factor), repeated) if same else None
    if (factor := uniform_value(left)) is not None and len(columns) > 1:
        kept = (*columns[:-2], rows[-2], columns[-1]) if len(rows) > 1 else (*columns[:-2], columns[-1])
        same = same_shape(result_shape(operation), kept)
        total = _total(operation, over_dimensions(right, -2), factor, ("other", None)) if same else None
        return _spread(total, rows[-2:-1])
    return None


def _spread(total: Total | None, repeated: tuple[Size, ...]) -> Total | None:
    """A total that a matrix repeats as often as it says."""
    return None if total is None else replace(total, is_spread=any(size != 1 for size in repeated))


def _linear(operation: Operation) -> Total | None:
    factor = uniform_value(operation["weight"])
    if factor is None or operation["bias"] is not None:
        return None
    total = _total(operation, over_dimensions(operation["input"], -1), factor)
    return _spread(total, shape(operation["weight"])[:-1])


def _einsum(operation: Operation) -> Total | None:
    """An Einstein sum of ``x`` alone, or of ``x`` and tensors of one number."""
    operands = operation["operands"]
    if not isinstance(operation["equation"], str) or not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    sizes = [shape(operand) for operand in operands]
    inputs, output = einsum_labels(operation["equation"], [len(s) for s in sizes], len(result_shape(operation)))
    values = [uniform_value(operand) for operand in operands]
    variable = [index for index, value in enumerate(values) if value is None]
    if len(variable) != 1:
        return None
    (index,) = variable
    labels, factor = inputs[index], Fraction(1)
    size_of_label = dict(zip(labels, sizes[index], strict=True))
    for other, value in enumerate(values):
        if value is None:
            continue
        factor = times(factor, value)
        for label, size in zip(inputs[other], sizes[other], strict=True):
            if size != 1 and not (label in size_of_label and same_size(size, size_of_label[label])):
                return None
    # What is left of the labels of x, in their order, is x's; any other is of size 1.
    if [label for label in output if label in size_of_label] != [label for label in labels if label in output]:
        return None
    reduced = [dimension for dimension, label in enumerate(labels) if label not in output]
    return _total(operation, over_dimensions(operands[index], reduced), factor, ("operands", index))


def _average_pool(operation: Operation) -> Total | None:
    """A pool of one window that is the whole last axis."""
    rest = tuple(operation["rest"])
    sizes = shape(operation["input"])
    name = getattr(operation.node.target, "__name__", "")
    if operation.arguments.keys() - {"input", "rest"} or len(rest) != 1 or not sizes:
        return None
    window = rest[0][0] if isinstance(rest[0], tuple | list) else rest[0]
    whole = window == 1 if name.startswith("adaptive") else isinstance(window, int) and window == sizes[-1]
    if not whole or not same_shape(result_shape(operation), (*sizes[:-1], 1)):
        return None
    return _total(operation, over_dimensions(operation["input"], -1))


_SUMS: dict[str, Callable[[Operation], Total | None]] = {
    "mean": _mean, "sum": _sum, "getitem": _second_of_two, "matmul": _product, "linear": _linear, "einsum": _einsum,
    "average_pool_1d": _average_pool,
}  # fmt: skip
