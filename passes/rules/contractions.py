"""Einstein sums and bilinear layers: products that name the axes they run over."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from lncompile.passes.axes import Axes, Dimension, Size, same_size
from lncompile.passes.canonical import Key, Operation
from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.operands import result_shape, shape
from lncompile.passes.rules.base import AxisMap, Linear, aligned, linear_rule, require_uncontracted
from lncompile.passes.rules.products import one_dimension

# A label of one dimension: a letter, or the number of a dimension of the ellipsis, counted from the right.
Label = str | int
_ELLIPSIS = "..."


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
    inputs, output = _labels(operation["equation"], [len(operand) for operand in sizes], len(result))
    # The operand that the result's last axis comes from is read first: where all readings fail, its reason is told.
    order = sorted(range(len(sizes)), key=lambda index: output[-1:] != [] and output[-1] not in inputs[index])
    return [Linear({("operands", index): _operand_map(index, inputs, output, sizes, result)}) for index in order]


def _labels(equation: str, ranks: Sequence[int], result_rank: int) -> tuple[list[list[Label]], list[Label]]:
    """Labels of each dimension of each operand and of the result. Raises Blocked for what is not understood."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise Blocked(Reason.UNKNOWN_OPERATION, f"the equation '{equation}' of an einsum")
    inputs = [_term(term, rank) for term, rank in zip(terms, ranks, strict=True)]
    if any(len(set(term)) != len(term) for term in inputs):
        raise Blocked(Reason.UNKNOWN_OPERATION, f"the diagonal that the einsum '{equation}' takes")
    if not arrow:
        # Without an arrow: the ellipsis, then the letters that stand once, in alphabetical order.
        letters = sorted(label for label in left if label.isalpha() and left.count(label) == 1)
        right = (_ELLIPSIS if _ELLIPSIS in left else "") + "".join(letters)
    return inputs, _term(right, result_rank)


def _term(term: str, rank: int) -> list[Label]:
    before, ellipsis, after = term.partition(_ELLIPSIS)
    hidden = rank - len(before) - len(after)
    if hidden < 0 or (hidden and not ellipsis) or (not (before + after).isalpha() and before + after):
        raise Blocked(Reason.UNKNOWN_OPERATION, f"the labels '{term}' of an einsum")
    return [*before, *range(hidden - 1, -1, -1), *after]


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
