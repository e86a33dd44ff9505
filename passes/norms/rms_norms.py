"""RMSNorms that a model has in the first place: counted, so that a report can say what a model without LayerNorms is.

They have no mean to take out. Recognised are calls of ``rms_norm``, and the reciprocal root of a mean of squares, as
models write it by hand::

    variance = x.pow(2).mean(-1, keepdim=True)
    x * torch.rsqrt(variance + eps)
"""

from __future__ import annotations

from torch import fx

from lncompile.passes.graph.canonical import canonicalise


def count_rms_norms(graph: fx.Graph) -> int:
    """Return how many RMSNorms a graph without LayerNorms has."""
    return sum(_is_rms_norm(node) for node in graph.nodes)


def _is_rms_norm(node: fx.Node) -> bool:
    operation = canonicalise(node)
    if operation is None or operation.name not in ("rms_norm", "rsqrt", "sqrt"):
        return False
    if operation.name == "rms_norm":
        return True
    source = operation["input"]
    added = canonicalise(source) if isinstance(source, fx.Node) else None
    if added is not None and added.name == "add":
        terms = [term for term in (added["input"], added["other"]) if isinstance(term, fx.Node)]
        source = next((term for term in terms if _is_mean_of_squares(term)), None)
    return isinstance(source, fx.Node) and _is_mean_of_squares(source)


def _is_mean_of_squares(node: fx.Node) -> bool:
    mean = canonicalise(node)
    if mean is None or mean.name != "mean" or not isinstance(mean["input"], fx.Node):
        return False
    squared = canonicalise(mean["input"])
    if squared is None:
        return False
    if squared.name == "pow":
        return bool(squared["exponent"] == 2)
    return squared.name == "square" or (squared.name == "mul" and squared["input"] is squared["other"])
