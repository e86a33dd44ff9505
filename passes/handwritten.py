"""LayerNorms written out by hand: mean, difference, mean of squares, root, quotient.

    m = x.mean(-1, keepdim=True);  d = x - m;  v = d.pow(2).mean(-1, keepdim=True);  y = d * rsqrt(v + ε)

Only the two lines with the mean matter to folding: where x is centered already, ``m = 0`` and ``d = x``, and what is
left *is* an RMSNorm. So a fold takes ``d`` out and leaves the author's other lines as they are, upcasts and all. The
whole chain is recognised all the same before it counts as a site: a difference from the mean alone is no LayerNorm.

What counts: any spelling of mean and biased variance (:mod:`.moments`), a root of it, and a quotient by the root. The
ε may stand inside the root, outside (``d / (σ + ε)``), or be missing: that is another function than LayerNorm's, but
the mean is still only subtracted, so taking it out leaves the author's function exactly, an RMSNorm with that ε.

What does not: a division by ``d - 1`` (``x.var()`` as it comes), an L2 norm, a mean that comes back (a scaler), a
difference alone; and normalisations of other kinds, whose statistics go over the batch (batch norm) or over the
positions of each channel (instance norm). The kind shows in γ and β where there are any, else in the axes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from lncompile.lowering import FOLDED_STATISTIC, emit, torch_private
from lncompile.passes.axes import Axes
from lncompile.passes.canonical import Operation, canonicalise, tensor_of
from lncompile.passes.decisions import Blocked
from lncompile.passes.moments import (
    Moment,
    Subject,
    behind_views,
    difference_of_moments,
    reduction,
    spread_of,
    squared,
    uses_of_mean,
    variance_of,
)
from lncompile.passes.operands import shape


@dataclass(frozen=True)
class Spread:
    """A node that holds the biased variance (or its root, the deviation) of ``x``, read off ``x`` itself."""

    node: fx.Node
    moment: Moment
    is_deviation: bool


@dataclass(frozen=True)
class HandwrittenNorm:
    """One chain.

    Attributes:
        input: ``x``.
        axes: what it normalises.
        mean: the reduction of ``x`` that its mean comes from.
        differences: the nodes ``x - m``; some authors write the difference twice, and the mean too.
        spreads: the variances and deviations that read ``x`` itself, if the author wrote them so.
    """

    input: fx.Node
    axes: Axes
    mean: fx.Node
    differences: tuple[fx.Node, ...]
    spreads: tuple[Spread, ...]


def find_handwritten_norms(graph: fx.Graph) -> Iterator[HandwrittenNorm]:
    """Yield every hand-written LayerNorm of a graph, in the order of their means."""
    found: list[HandwrittenNorm] = []
    helpers: dict[Subject, list[fx.Node]] = defaultdict(list)
    spreads: dict[Subject, list[Spread]] = defaultdict(list)
    for node in graph.nodes:
        spread = _spread(node)
        if spread is not None:
            spreads[spread.moment.subject].append(spread)
        moment, differences = _differences(node)
        if moment is None:
            continue
        quotients = [quotient for difference in differences for quotient in _quotients(difference, moment)]
        if any(_is_over_features(quotient, moment) for quotient in quotients):
            found.append(HandwrittenNorm(moment.source, moment.axes, node, tuple(differences), ()))
        elif not quotients:
            helpers[moment.subject] += differences
    for norm in found:
        # Two norms of one tensor may share a variance, and the differences it is made of; they are exchanged once.
        subject = (norm.input, norm.axes)
        own = (*norm.differences, *helpers.pop(subject, ()))
        yield replace(norm, differences=own, spreads=tuple(spreads.pop(subject, ())))


def _differences(node: fx.Node) -> tuple[Moment | None, list[fx.Node]]:
    """The differences ``x - m`` that a reduction serves if it serves nothing else, and what it is the mean of."""
    operation = canonicalise(node)
    if operation is None or operation.name not in ("mean", "sum", "var_mean", "std_mean"):
        return None, []
    moment, differences = reduction(operation), uses_of_mean(node)
    if moment is None or not differences:
        return None, []
    if any(dtype_of(difference) != dtype_of(moment.source) for difference in differences):
        return None, []  # the mean was taken in a wider dtype, and leaving it out would change the dtype of the rest
    return moment, differences


def _spread(node: fx.Node) -> Spread | None:
    """Read a node as a biased variance or deviation whose lines read ``x`` itself and not the difference."""
    operation = canonicalise(node)
    if operation is None or operation.name not in ("var", "std", "getitem", "sub"):
        return None
    if operation.name == "sub":
        moment = difference_of_moments(operation)
        return None if moment is None else Spread(node, moment, False)
    if behind_views(node) is not node:
        return None
    for name in ("var", "std"):
        moment = spread_of(node, name)
        if moment is not None:
            return Spread(node, moment, name == "std")
    return None


# --- the quotient ---


def _quotients(difference: fx.Node, moment: Moment) -> Iterator[fx.Node]:
    """The nodes in which a difference, or its product with a weight, is divided by the deviation."""
    for user in difference.users:
        operation = canonicalise(user)
        if operation is None or operation.name not in ("mul", "div"):
            continue
        if _divides_by_deviation(operation, difference, moment):
            yield user
        elif operation.name == "mul" and not operation.in_place:
            for second in user.users:
                product = canonicalise(second)
                if product is not None and _divides_by_deviation(product, user, moment):
                    yield second


def _divides_by_deviation(operation: Operation, value: fx.Node, moment: Moment) -> bool:
    if operation.name == "div" and operation["input"] is value:
        return operation["rounding_mode"] is None and _is_deviation(operation["other"], moment)
    if operation.name == "mul":
        other = operation["other"] if operation["input"] is value else operation["input"]
        return _is_inverse_deviation(other, moment)
    return False


def _is_deviation(node: object, moment: Moment) -> bool:
    """Whether a node is ``sqrt(v + ε)``, ``σ + ε`` or the like, in the shape that broadcasts against ``x``."""
    if not isinstance(node, fx.Node) or not moment.is_kept(node):
        return False
    return _root(behind_views(node), moment, inverse=False)


def _is_inverse_deviation(node: object, moment: Moment) -> bool:
    if not isinstance(node, fx.Node) or not moment.is_kept(node):
        return False
    return _root(behind_views(node), moment, inverse=True)


def _root(node: fx.Node, moment: Moment, *, inverse: bool) -> bool:
    operation = canonicalise(node)
    if operation is None:
        return False
    if inverse:
        if operation.name == "rsqrt" or (operation.name == "pow" and operation["exponent"] == -0.5):
            return _is_stabilised_variance(operation["input"], moment)
        if operation.name == "reciprocal" or (operation.name == "pow" and operation["exponent"] == -1):
            return _root_behind(operation["input"], moment)
        return operation.name == "div" and operation["input"] == 1 and _root_behind(operation["other"], moment)
    if operation.name == "sqrt" or (operation.name == "pow" and operation["exponent"] == 0.5):
        return _is_stabilised_variance(operation["input"], moment)
    if operation.name == "add":
        return any(_root_behind(value, moment) for value in _without_epsilon(operation))
    deviation = spread_of(node, "std")
    return deviation is not None and deviation.subject == moment.subject


def _root_behind(node: object, moment: Moment) -> bool:
    return isinstance(node, fx.Node) and _root(behind_views(node), moment, inverse=False)


def _is_stabilised_variance(node: object, moment: Moment) -> bool:
    """Whether a node is the variance, or the variance plus an ε."""
    if not isinstance(node, fx.Node):
        return False
    node = behind_views(node)
    operation = canonicalise(node)
    values = _without_epsilon(operation) if operation is not None and operation.name == "add" else [node]
    variances = [variance_of(value) for value in values]
    return any(variance is not None and variance.subject == moment.subject for variance in variances)


def _without_epsilon(addition: Operation) -> Iterator[fx.Node]:
    """The terms of a sum whose other term is a single number."""
    for term, other in (("input", "other"), ("other", "input")):
        try:
            single = all(size == 1 for size in shape(addition[other]))
        except Blocked:
            continue
        if single and isinstance(addition[term], fx.Node):
            yield addition[term]


# --- the kind of normalisation ---


def _is_over_features(quotient: fx.Node, moment: Moment) -> bool:
    """Whether γ and β vary along A, as a LayerNorm's do; without them, whether A can be features."""
    current: fx.Node | None = quotient
    while current is not None:
        following = None
        for user in current.users:
            operation = canonicalise(user)
            if operation is not None and operation.name in ("cast", "to", "type_as"):
                following = user if operation["input"] is current else following
                continue
            if operation is None or operation.name not in ("mul", "add"):
                continue
            other = operation["other"] if operation["input"] is current else operation["input"]
            if not _is_parameter(other):
                continue
            varying = _varying_dimensions(other, moment)
            if varying:
                return not varying.isdisjoint(moment.dimensions)
            following = user
        current = following
    rank = moment.axes.rank
    over_batch = 0 in moment.dimensions and rank > 1
    over_positions = rank >= 4 and set(moment.dimensions) == set(range(2, rank))
    return not over_batch and not over_positions


def _is_parameter(node: object) -> bool:
    """Whether a node is a view of a parameter or buffer."""
    if not isinstance(node, fx.Node):
        return False
    source = behind_views(node)
    return source.op == "placeholder" and torch_private.is_static_input(source)


def _varying_dimensions(parameter: fx.Node, moment: Moment) -> set[int]:
    """The dimensions of ``x`` along which a parameter varies that broadcasts against it."""
    sizes = shape(parameter)
    first = moment.axes.rank - len(sizes)
    return {first + index for index, size in enumerate(sizes) if size != 1}


# --- the fold ---


def variance_of_centered(
    value: Tensor,
    dimensions: Sequence[int],
    keepdim: bool,
    root: bool,
    input_dtype: torch.dtype,
    output_dtype: torch.dtype,
) -> Tensor:
    """Biased variance of an ``x`` without mean: the mean of its squares.

    .. math:: var(x) = mean(x²)  where  mean(x) = 0

    Args:
        value: ``x``, of any floating dtype; its mean over ``dimensions`` is zero.
        dimensions: what the mean is taken over.
        keepdim: whether they stay, with size 1.
        root: whether the deviation is wanted, the root of the variance.
        input_dtype: dtype of ``value``. The arithmetic is in float32, or in float64 if that is float64.
        output_dtype: dtype of the result.
    """
    wide = value.to(torch.float64 if input_dtype == torch.float64 else torch.float32)
    variance = torch.mean(torch.mul(wide, wide), list(dimensions), keepdim)
    return (torch.sqrt(variance) if root else variance).to(output_dtype)


def dtype_of(node: fx.Node) -> torch.dtype:
    """Dtype of a node's tensor."""
    tensor = tensor_of(node)
    assert tensor is not None  # asked of results of arithmetic only
    return tensor.dtype


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
    for node in (*norm.differences, *(spread.node for spread in norm.spreads)):
        chain |= _lines_behind(node, {norm.input, centered})
    for spread in norm.spreads:
        node = spread.node
        with graph.inserting_before(node):
            value = emit(
                graph,
                node.name,
                variance_of_centered,
                centered,
                list(spread.moment.dimensions),
                len(shape(node)) == norm.axes.rank,
                spread.is_deviation,
                dtype_of(norm.input),
                dtype_of(node),
                annotation={**node.meta.get("custom", {}), **FOLDED_STATISTIC},
            )
        node.replace_all_uses_with(value)
    for node in norm.differences:
        _annotate_mean_square(node)
        # A copy, which Inductor takes out: authors go on with `d *= ...`, and that must not write into the stream.
        with graph.inserting_before(node):
            copy = graph.create_node("call_function", torch.clone, (centered,), name=f"{node.name}_copy")
        copy.meta["example_value"] = tensor_of(node)
        node.replace_all_uses_with(copy)
    for node in reversed([node for node in graph.nodes if node in chain]):
        if not node.users:
            graph.erase_node(node)


def _annotate_mean_square(difference: fx.Node) -> None:
    """Note on the mean of its squares, which the author wrote, that it is the statistic of a folded norm now."""
    for square in difference.users:
        for mean in square.users if squared(square) == (difference, difference) else ():
            operation = canonicalise(mean)
            if operation is not None and operation.name in ("mean", "sum"):
                mean.meta["custom"] = {**mean.meta.get("custom", {}), **FOLDED_STATISTIC}


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
