"""LayerNorms written out by hand: mean, difference, mean of squares, root, quotient.

    m = x.mean(-1, keepdim=True);  d = x - m;  v = d.pow(2).mean(-1, keepdim=True);  y = d * rsqrt(v + ε)

Only the two lines with the mean matter to folding: where x is centered already, ``m = 0`` and ``d = x``, and what is
left *is* an RMSNorm. So a fold takes ``d`` out and leaves the author's other lines as they are, upcasts and all. The
whole chain is recognised all the same before it counts as a site: a difference from the mean alone is no LayerNorm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lncompile.lowering import emit
from lncompile.passes.axes import Axes
from lncompile.passes.canonical import Operation, canonicalise, tensor_of
from lncompile.passes.decisions import Blocked
from lncompile.passes.operands import WRITTEN, dimensions_of, shape


@dataclass(frozen=True)
class HandwrittenNorm:
    """One chain.

    Attributes:
        input: ``x``.
        axes: what it normalises.
        mean: the node ``m``.
        differences: the nodes ``x - m``; some authors write the difference twice.
        variances: nodes ``x.var(...)`` with correction 0, if the author wrote the variance so.
    """

    input: fx.Node
    axes: Axes
    mean: fx.Node
    differences: tuple[fx.Node, ...]
    variances: tuple[fx.Node, ...]


def mean_of(node: fx.Node) -> tuple[fx.Node, Axes] | None:
    """Return ``(x, A)`` if the node is ``x.mean(A, keepdim=True)``, else None."""
    return _reduction(node, "mean")


def _reduction(node: fx.Node, name: str) -> tuple[fx.Node, Axes] | None:
    operation = canonicalise(node)
    if operation is None or operation.name != name or operation["dim"] is None or not operation["keepdim"]:
        return None
    source = operation["input"]
    if not isinstance(source, fx.Node):
        return None
    try:
        sizes = shape(source)
        return source, Axes.of(sizes, dimensions_of(operation["dim"], len(sizes)))
    except Blocked:
        return None


def difference_from_mean(operation: Operation) -> tuple[fx.Node, Axes] | None:
    """Return ``(x, A)`` if the operation is ``x - x.mean(A, keepdim=True)``, else None."""
    if operation.name != "sub" or operation["alpha"] != 1 or not isinstance(operation["other"], fx.Node):
        return None
    taken = mean_of(operation["other"])
    return taken if taken is not None and taken[0] is operation["input"] else None


def is_biased_variance(operation: Operation) -> bool:
    """Whether a ``var`` divides by the number of elements, as LayerNorm does."""
    if operation["correction"] is not None:
        return bool(operation["correction"] == 0)
    return operation["unbiased"] is False


def find_handwritten_norms(graph: fx.Graph) -> Iterator[HandwrittenNorm]:
    """Yield every hand-written LayerNorm of a graph, in the order of their means."""
    claimed: set[fx.Node] = set()
    for node in graph.nodes:
        taken = mean_of(node)
        if taken is None or taken[0].meta.get(WRITTEN):
            continue  # between the mean and the difference its values may have changed
        source, axes = taken
        differences = []
        for user in node.users:
            operation = canonicalise(user)
            if operation is None or operation.in_place or difference_from_mean(operation) != taken:
                break
            if dtype_of(user) != dtype_of(source):
                break  # the mean was taken in a wider dtype, and leaving it out would change the dtype of the rest
            differences.append(user)
        else:
            variances = tuple(user for user in source.users if _is_variance(user, source, axes))
            if differences and _is_normalised(differences, variances, axes):
                # Two norms of one tensor may share a variance, which is exchanged once.
                own = tuple(variance for variance in variances if variance not in claimed)
                claimed.update(own)
                yield HandwrittenNorm(source, axes, node, tuple(differences), own)


def _is_variance(node: fx.Node, source: fx.Node, axes: Axes) -> bool:
    operation = canonicalise(node)
    return (
        operation is not None
        and operation.name == "var"
        and is_biased_variance(operation)
        and _reduction(node, "var") == (source, axes)
    )


def _is_normalised(differences: Sequence[fx.Node], variances: Sequence[fx.Node], axes: Axes) -> bool:
    """Whether some difference is divided by the root of the differences' mean square (plus ε)."""
    squares = [user for node in differences for user in node.users if _is_square(user, node)]
    means = [user for node in squares for user in node.users if _reduction(user, "mean") == (node, axes)]
    roots = [root for node in (*means, *variances) for root in _roots(node)]
    for difference in differences:
        for user in difference.users:
            operation = canonicalise(user)
            if operation is None or operation.name not in ("mul", "div"):
                continue
            other = operation["other"] if operation["input"] is difference else operation["input"]
            wanted = "rsqrt" if operation.name == "mul" else "sqrt"
            if (other, wanted) in roots and (operation.name == "mul" or operation["input"] is difference):
                return True
    return False


def _is_square(node: fx.Node, of: fx.Node) -> bool:
    operation = canonicalise(node)
    if operation is None:
        return False
    if operation.name == "mul":
        return operation["input"] is of and operation["other"] is of
    if operation.name == "pow":
        return operation["input"] is of and operation["exponent"] == 2
    return operation.name == "square"


def _roots(variance: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """The roots taken of a variance, after an ε is added (inside the root) or not."""
    for node in (variance, *variance.users):
        operation = canonicalise(node)
        if node is not variance and (operation is None or operation.name != "add"):
            continue
        for user in node.users:
            root = canonicalise(user)
            if root is None:
                continue
            if root.name in ("sqrt", "rsqrt"):
                yield user, root.name
            elif root.name == "pow" and root["exponent"] in (0.5, -0.5):
                yield user, "sqrt" if root["exponent"] == 0.5 else "rsqrt"


def variance_of_centered(value: Tensor, dimensions: Any, input_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """``var(x)`` with correction 0 of an ``x`` without mean: the mean of its squares, in float32 or float64."""
    wide = value.to(torch.float64 if input_dtype == torch.float64 else torch.float32)
    return torch.mean(torch.mul(wide, wide), dimensions, True).to(dtype)


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
    for node in norm.differences:
        # A copy, which Inductor takes out: authors go on with `d *= ...`, and that must not write into the stream.
        with graph.inserting_before(node):
            copy = graph.create_node("call_function", torch.clone, (centered,), name=f"{node.name}_copy")
        node.replace_all_uses_with(copy)
        graph.erase_node(node)
    for node in norm.variances:
        operation = canonicalise(node)
        assert operation is not None  # it was one when the chain was found
        with graph.inserting_before(node):
            variance = emit(
                graph, node.name, variance_of_centered, centered, operation["dim"], dtype_of(norm.input), dtype_of(node)
            )
        node.replace_all_uses_with(variance)
        graph.erase_node(node)
    graph.erase_node(norm.mean)
