"""Einstein sums and bilinear layers: products that name the axes they run over."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation
from lncompile.passes.graph.einsum_labels import Label, einsum_labels
from lncompile.passes.graph.factors import Dimension
from lncompile.passes.graph.operands import result_shape, shape
from lncompile.passes.graph.sizes import Size, same_size
from lncompile.passes.rules.base import AxisMap, Linear, aligned, linear_rule, require_uncontracted
from lncompile.passes.rules.products import one_dimension


@linear_rule("einsum")
def einsum(operation: Operation) -> Sequence[Linear]:
    """``C Σ_k P_bk Q_kd = Σ_k P_bk (CQ)_kd``: linear in each operand, A followed through its labels.

    The labels of A must stand in that operand alone: a label that is contracted would see that the mean is gone, and
    one that another operand has too makes that operand a scale that varies along A.
    """
    operands = operation["operands"]
    nodes = all(isinstance(operand, fx.Node) for operand in operands)
    if not isinstance(operation["equation"], str) or not nodes:
        raise Blocked(Reason.UNKNOWN_OPERATION, "an einsum whose labels are not written as one equation")
    sizes = [shape(operand) for operand in operands]
    result = result_shape(operation)
    inputs, output = einsum_labels(operation["equation"], [len(operand) for operand in sizes], len(result))
    # The operand that the result's last axis comes from is read first: where all readings fail, its reason is told.
    order = sorted(range(len(sizes)), key=lambda index: output[-1:] != [] and output[-1] not in inputs[index])
    return [Linear({("operands", index): _operand_map(index, inputs, output, sizes, result)}) for index in order]


def _operand_map(
    index: int,
    inputs: Sequence[Sequence[Label]],
    output: Sequence[Label],
    sizes: Sequence[Sequence[Size]],
    result: Sequence[Size],
) -> AxisMap:
    labels, operand = inputs[index], sizes[index]
    # Where an operand has size 1 along a label it is repeated, hence constant there.
    shared = {
        label
        for other, terms in enumerate(inputs)
        if other != index
        for dimension, label in enumerate(terms)
        if sizes[other][dimension] != 1
    }

    def check(label: Label) -> None:
        if label in shared:
            raise Blocked(Reason.VARYING_SCALE, "an einsum whose other operand varies along the normalised axes")

    def forward(axes: Axes) -> Axes:
        dimensions: list[Dimension] = list(Axes.of(result, ()).dimensions)
        for dimension, label in enumerate(labels):
            if axes.is_free(dimension):
                continue
            if label not in output:
                require_uncontracted(axes, dimension, "einsum")
            check(label)
            dimensions[output.index(label)] = axes.dimensions[dimension]
        return Axes(tuple(dimensions))

    def backward(axes: Axes) -> Axes:
        dimensions: list[Dimension] = list(Axes.of(operand, ()).dimensions)
        for dimension, label in enumerate(output):
            if axes.is_free(dimension):
                continue
            if label not in labels or not same_size(operand[labels.index(label)], result[dimension]):
                raise Blocked(Reason.DIFFERENT_AXES, f"einsum: the normalised axes {axes} come from another operand")
            check(label)
            dimensions[labels.index(label)] = axes.dimensions[dimension]
        return Axes(tuple(dimensions))

    return AxisMap(forward, backward)


@linear_rule("bilinear")
def bilinear(operation: Operation) -> Sequence[Linear]:
    """``C(xᵀ W_o z + b) = xᵀ(CW)_o z + Cb`` over output features, weight axis 0."""
    result = result_shape(operation)
    weight, bias, last = operation["weight"], operation["bias"], len(result) - 1
    carriers: dict[Key, AxisMap] = {("weight", None): one_dimension(shape(weight), 0, result, last, "bilinear")}
    if bias is not None:
        carriers["bias", None] = aligned(shape(bias), result)
    return [Linear(carriers)]
