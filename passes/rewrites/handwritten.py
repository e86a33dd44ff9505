"""Taking the mean out of a hand-written LayerNorm whose input is centered: the difference is the input itself.

The author's other lines stay. Only variances and deviations that torch computes change, because torch would subtract a
mean again: of a tensor without mean they are sums of squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lncompile.lowering import FOLDED_STATISTIC, emit
from lncompile.passes.graph.canonical import canonicalise, function_name, tensor_of
from lncompile.passes.graph.operands import shape
from lncompile.passes.norms.handwritten import HandwrittenNorm, Spread, dtype_of
from lncompile.passes.norms.moments import exact_origin, squared


def variance_of_centered(
    value: Tensor,
    dimensions: Sequence[int],
    keepdim: bool,
    root: bool,
    input_dtype: torch.dtype,
    output_dtype: torch.dtype,
    divisor: float | None = None,
) -> Tensor:
    """Variance of an ``x`` without mean: the sum of its squares, divided.

    .. math:: var(x) = \\frac{1}{n - c} \\sum x²  where  mean(x) = 0

    Args:
        value: ``x``, of any floating dtype; its mean over ``dimensions`` is zero.
        dimensions: what the mean is taken over.
        keepdim: whether they stay, with size 1.
        root: whether the deviation is wanted, the root of the variance.
        input_dtype: dtype of ``value``. The arithmetic is in float32, or in float64 if that is float64.
        output_dtype: dtype of the result.
        divisor: n - c, not below zero, as torch takes it; None for n, the biased variance. Zero gives what torch gives.

    Example:
        >>> x = torch.tensor([[-1.0, 0.0, 1.0]])
        >>> variance_of_centered(x, [-1], True, False, x.dtype, x.dtype, divisor=2)
        tensor([[1.]])
    """
    wide = value.to(torch.float64 if input_dtype == torch.float64 else torch.float32)
    squares = torch.mul(wide, wide)
    if divisor is None:
        variance = torch.mean(squares, list(dimensions), keepdim)
    else:
        variance = torch.div(torch.sum(squares, list(dimensions), keepdim), divisor)
    return (torch.sqrt(variance) if root else variance).to(output_dtype)


def fold_handwritten_norm(graph: fx.Graph, norm: HandwrittenNorm, centered: fx.Node) -> None:
    """Take the mean out of a chain whose input is centered.

    Before::

        m = x.mean(-1, True); d = x - m; v = d.pow(2).mean(-1, True); y = d * rsqrt(v + ε)

    After::

        v = x.pow(2).mean(-1, True); y = x * rsqrt(v + ε)

    Args:
        graph: changed in place.
        norm: the chain.
        centered: the node that carries its centered input.
    """
    chain: set[fx.Node] = set()
    sources = {difference.moment.source for difference in norm.differences}
    for node in (*(d.node for d in norm.differences), *(spread.node for spread in norm.spreads)):
        chain |= _lines_behind(node, {exact_origin(norm.input), norm.input, centered, *sources})
    taken: dict[fx.Node, fx.Node] = {}
    for difference in norm.differences:
        node = difference.node
        _annotate_statistics(node)
        # A copy, which Inductor takes out: authors go on with `d *= ...`, and that must not write into the stream.
        target = torch.neg if difference.is_negated else torch.clone
        with graph.inserting_before(node):
            copy = graph.create_node("call_function", target, (centered,), name=f"{node.name}_copy")
        copy.meta["example_value"] = tensor_of(node)
        taken[node] = copy
    of_differences = {exact_origin(node): copy for node, copy in taken.items()}
    for spread in norm.spreads:
        source = of_differences.get(exact_origin(spread.moment.source), centered)
        spread.node.replace_all_uses_with(_variance(graph, spread, source))
    for node, copy in taken.items():
        node.replace_all_uses_with(copy)
    for node in reversed([node for node in graph.nodes if node in chain]):
        if not node.users:
            graph.erase_node(node)


def _variance(graph: fx.Graph, spread: Spread, source: fx.Node) -> fx.Node:
    """Write the variance of a centered tensor in front of the one it takes the place of."""
    node, moment, correction = spread.node, spread.moment, spread.correction
    assert correction is not None  # of what can be exchanged
    with graph.inserting_before(node):
        return emit(
            graph,
            node.name,
            variance_of_centered,
            source,
            list(moment.dimensions),
            len(shape(node)) == moment.axes.rank,
            spread.is_deviation,
            dtype_of(moment.source),
            dtype_of(node),
            None if correction == 0 else max(0.0, moment.axes.count - correction),
            annotation={**node.meta.get("custom", {}), **FOLDED_STATISTIC},
        )


# What takes a sum of squares by itself.
_NORMS = frozenset("norm linalg_vector_norm vector_norm normalize rms_norm".split())


def _annotate_statistics(difference: fx.Node) -> None:
    """Note on the sum of its squares, which the author wrote, that it is the statistic of a folded norm now."""
    for user in difference.users:
        if squared(user) == (difference, difference):
            for mean in user.users:
                operation = canonicalise(mean)
                if operation is not None and operation.name in ("mean", "sum"):
                    _annotate(mean)
        elif function_name(user) in _NORMS:
            _annotate(user)


def _annotate(node: fx.Node) -> None:
    node.meta["custom"] = {**node.meta.get("custom", {}), **FOLDED_STATISTIC}


def _lines_behind(node: fx.Node, ends: set[fx.Node]) -> set[fx.Node]:
    """A node and everything that it is computed from, as far as the input of the norm."""
    lines: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in ends or current in lines or current.op == "placeholder":
            continue
        lines.add(current)
        waiting += current.all_input_nodes
    return lines
