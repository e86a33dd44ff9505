"""LayerScale: a linear layer times a parameter that varies along A.

``s ⊙ (Wh + b)`` is no stream by itself, since ``s`` varies along the features. But it is a linear layer with the
weight ``diag(s)W``, which can be centered: ``C(s ⊙ (Wh + b)) = (C diag(s) W)h + C(s ⊙ b)``. The product disappears.
Legal when the product is the only use of the linear layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lncompile.passes.axes import Axes
from lncompile.passes.canonical import Key, Operation, canonicalise, tensor_of
from lncompile.passes.graph_facts import GraphFacts
from lncompile.passes.operands import shape

# Between the linear layer and the product there may be these: they do nothing to a scale along the features.
_TRANSPARENT = frozenset({"dropout", "cast", "to", "identity", "view", "reshape"})


@dataclass(frozen=True)
class ScaledSource:
    """``product = scale * chain(linear(h, weight, bias))``, with every parameter a parameter expression.

    Attributes:
        linear: the linear layer whose parameters absorb the scale and the centering.
        parameters: where each parameter stands in ``linear``, its axes to center, and its dimension to scale.
        scale: the node of the scale.
        value: the operand of the product that stays: the (new) linear layer's output.
    """

    linear: Operation
    parameters: dict[Key, tuple[Axes, int]]
    scale: fx.Node
    value: fx.Node


def find_scaled_source(product: Operation, axes: Axes, facts: GraphFacts) -> ScaledSource | None:
    """Recognise LayerScale at a product, or return None.

    Args:
        product: an operation that its rule could not pass.
        axes: the axes along which its result would be centered.
        facts: the facts of the graph.
    """
    last = axes.rank - 1
    if product.name != "mul" or product.in_place or axes.partial or axes.normalised_dimensions != (last,):
        return None
    for scale, value in ((product["other"], product["input"]), (product["input"], product["other"])):
        if not (isinstance(scale, fx.Node) and isinstance(value, fx.Node) and scale in facts.parametric):
            continue
        features = shape(value)[-1] if shape(value) else None
        if not isinstance(features, int) or not _is_row(scale, features) or len(shape(value)) != axes.rank:
            continue
        linear = _linear_behind(value, features, facts)
        if linear is None:
            continue
        parameters = _parameters(linear, Axes((axes.dimensions[last],)), facts)
        if parameters is None or not _same_dtype(linear, parameters, scale, product.node):
            continue
        return ScaledSource(linear, parameters, scale, value)
    return None


def _is_row(scale: fx.Node, features: int) -> bool:
    """Whether the scale varies along the features only: ``[d]``, ``[1, d]``, ..."""
    sizes = shape(scale)
    return bool(sizes) and sizes[-1] == features and all(size == 1 for size in sizes[:-1])


def _linear_behind(value: fx.Node, features: int, facts: GraphFacts) -> Operation | None:
    node = value
    while True:
        operation = canonicalise(node)
        if operation is None or len(node.users) != 1 or node in facts.written or operation.in_place:
            return None
        tensor = tensor_of(node)
        if tensor is None or not tensor.is_floating_point():
            return None  # a cast to integers on the way is not one that a scale may pass
        if operation.name in ("linear", "addmm"):
            return operation
        source = operation.arguments.get("input")
        if operation.name not in _TRANSPARENT or not isinstance(source, fx.Node):
            return None
        if operation.name == "dropout" and operation["training"] is not False and operation["probability"] != 0:
            return None
        if not shape(source) or shape(source)[-1] != features:
            return None
        node = source


def _parameters(linear: Operation, features: Axes, facts: GraphFacts) -> dict[Key, tuple[Axes, int]] | None:
    """Axes to center on each parameter, and the dimension that the scale multiplies; None if one is no parameter."""
    weight_name, bias_name, row = ("weight", "bias", 0) if linear.name == "linear" else ("mat2", "input", 1)
    if linear.name == "addmm" and (linear["alpha"] != 1 or linear["beta"] != 1):
        return None
    parameters: dict[Key, tuple[Axes, int]] = {}
    for name in (weight_name, bias_name):
        node = linear[name]
        if node is None:
            continue
        if node not in facts.parametric:
            return None
        sizes = shape(node)
        dimension = row if name == weight_name else len(sizes) - 1
        if name == bias_name and len(sizes) != 1:
            return None
        dimensions = list(Axes.of(sizes, ()).dimensions)
        dimensions[dimension] = features.dimensions[0]
        parameters[(name, None)] = (Axes(tuple(dimensions)), dimension)
    return parameters


def _same_dtype(linear: Operation, parameters: dict[Key, tuple[Axes, int]], scale: fx.Node, product: fx.Node) -> bool:
    """Whether everything has one dtype, so that leaving the product out changes no dtype downstream."""
    dtypes: set[torch.dtype] = set()
    for node in (scale, product, linear.node, *(linear[name] for name, _ in parameters)):
        tensor: Tensor | None = tensor_of(node)
        if tensor is None:
            return False
        dtypes.add(tensor.dtype)
    return len(dtypes) == 1
