"""Composed sources: a product with parameters, then scales and shifts of its channels that are parameters too.

``s ⊙ (Wh + b) + t`` is not a stream by itself, since ``s`` varies along the features. But it is the product with the
weight ``diag(s)W`` and the bias ``s ⊙ b + t``, which can be centered::

    C(s ⊙ (Wh + b) + t) = (C diag(s) W)h + C(s ⊙ b + t)

LayerScale is this with ``t = 0``, a batch norm in evaluation with ``s = γ / sqrt(var + ε)``, ``t = β - s ⊙ mean``, and
one may follow the other. They disappear from the graph. Legal when each is the only use of what it scales.

Before (the stem of LeViT)::

    x = conv2d(pixels, W, None)
    y = batch_norm(x, mean, var, γ, β, False, 0.1, ε)
    z = layer_norm(y.flatten(2).transpose(1, 2), ...)

After::

    x = conv2d(pixels, W_composed_centered, bias = b_composed_centered)
    z = layer_norm(x.flatten(2).transpose(1, 2), ...)          # and y is gone
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lncompile.passes.decisions import Blocked
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation, canonicalise, tensor_of
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.graph.operands import WRITTEN, shape
from lncompile.passes.graph.product_operands import PRODUCTS, ProductOperands
from lncompile.passes.graph.sharding import is_sharded
from lncompile.passes.graph.sizes import same_size
from lncompile.passes.graph.traits import Trait, has
from lncompile.passes.rules.base import RULES, AxisMap

# Between the product and what scales it there may be these: they only say where the channels go.
_TRANSPARENT = Trait.PASSES | Trait.DROPS | Trait.CASTS | Trait.RESHAPES | Trait.PERMUTES


@dataclass(frozen=True)
class ChannelScaling:
    """``result = s ⊙ value`` (LayerScale) or ``value / s``.

    Attributes:
        operation: the product or quotient.
        value: what is scaled.
        scale: the parameter expression ``s``, one number for each channel.
        divides: whether it is a quotient.
    """

    operation: Operation
    value: fx.Node
    scale: fx.Node
    divides: bool = False

    def parameters(self) -> Iterator[fx.Node]:
        """The parameter expressions it reads."""
        yield self.scale


@dataclass(frozen=True)
class BatchNorm:
    """``result = γ (value - mean) / sqrt(var + ε) + β`` for each channel: a batch norm in evaluation.

    Attributes:
        operation: the batch norm.
        value: what is normed.
        running_mean: the mean of each channel.
        running_var: the variance of each channel.
        weight: γ, or None.
        bias: β, or None.
        eps: ε.
    """

    operation: Operation
    value: fx.Node
    running_mean: fx.Node
    running_var: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float

    def parameters(self) -> Iterator[fx.Node]:
        """The parameter expressions it reads."""
        yield from (p for p in (self.running_mean, self.running_var, self.weight, self.bias) if p is not None)


Stage = ChannelScaling | BatchNorm


@dataclass(frozen=True)
class ComposedSource:
    """``result = stage_n(... stage_1(product(h, weight, bias)))``, with every parameter a parameter expression.

    Attributes:
        product: the operation whose parameters absorb the stages and the centering.
        weight: where its weight stands.
        weight_axes: the axes to center on the weight.
        dimension: the weight's dimension of channels.
        groups: number of groups into which the channels are cut *beside* ``dimension`` (transposed convolutions keep
            the channels of one group there, and the groups with the input channels); 1 for all others.
        bias: where its bias stands, whether it has one or not; None where it cannot have one.
        bias_axes: the axes to center on the bias, a row of channels.
        stages: what is composed into it, innermost first.
    """

    product: Operation
    weight: Key
    weight_axes: Axes
    dimension: int
    groups: int
    bias: Key | None
    bias_axes: Axes
    stages: tuple[Stage, ...]

    def parameters(self) -> Iterator[fx.Node]:
        """The parameter expressions that absorb the centering."""
        names = [self.weight[0], *([] if self.bias is None else [self.bias[0]])]
        yield from (self.product[name] for name in names if self.product[name] is not None)
        for stage in self.stages:
            yield from stage.parameters()


def find_composed_source(operation: Operation, axes: Axes, facts: GraphFacts) -> ComposedSource | None:
    """Recognise a composed source at its outermost stage, or return None.

    Args:
        operation: an operation that its rule could not pass.
        axes: the axes along which its result would be centered.
        facts: the facts of the graph.
    """
    if axes.partial:
        return None  # a part of the channels, whose scales are a part of the scale
    if facts.switches_gradients:
        return None  # what is recorded of a scale may not be recorded of the layer that it would go into
    for outermost in _stages_at(operation, facts):
        try:
            source = _compose(outermost, axes, facts)
        except Blocked:
            source = None  # a view in between, or the product's own rule: the reason at the outermost stage stands
        # A row of channels has other placements than the sharded weight it would go into.
        if source is not None and not any(is_sharded(tensor_of(parameter)) for parameter in source.parameters()):
            return source
    return None


def _stages_at(operation: Operation, facts: GraphFacts) -> Iterator[Stage]:
    """The ways to read an operation as a scale or shift of channels by parameters."""
    if operation.in_place or operation.node.meta.get(WRITTEN):
        return
    if operation.name == "mul":
        for scale, value in ((operation["other"], operation["input"]), (operation["input"], operation["other"])):
            if isinstance(value, fx.Node) and isinstance(scale, fx.Node) and scale in facts.parametric:
                yield ChannelScaling(operation, value, scale)
    elif operation.name == "div" and operation["rounding_mode"] is None:
        scale, value = operation["other"], operation["input"]
        if isinstance(value, fx.Node) and isinstance(scale, fx.Node) and scale in facts.parametric:
            yield ChannelScaling(operation, value, scale, divides=True)
    elif operation.name == "batch_norm" and operation["training"] is False:
        mean, var, weight, bias = (operation[name] for name in ("running_mean", "running_var", "weight", "bias"))
        known = all(p is None or p in facts.parametric for p in (mean, var, weight, bias))
        if known and mean is not None and var is not None and isinstance(operation["eps"], float | int):
            yield BatchNorm(operation, operation["input"], mean, var, weight, bias, float(operation["eps"]))


def _compose(outermost: Stage, axes: Axes, facts: GraphFacts) -> ComposedSource | None:
    """Follow the only uses down to a product, then take the channels up again and look where each stage scales them."""
    stages: list[Stage] = [outermost]
    between: list[Operation] = []  # from the outermost stage down
    node = outermost.value
    while True:
        operation = canonicalise(node)
        if operation is None or len(node.users) != 1 or node.meta.get(WRITTEN) or operation.in_place:
            return None
        if operation.name in PRODUCTS or operation.name == "any_convolution":
            break
        inner = next(_stages_at(operation, facts), None)
        if inner is not None:
            stages.append(inner)
            between.append(operation)
            node = inner.value
            continue
        source = operation.arguments.get("input")
        if not has(operation, _TRANSPARENT) or not isinstance(source, fx.Node):
            return None
        between.append(operation)
        node = source
    product = operation
    stages.reverse()
    if not _alike(product, [outermost.operation, *between], stages, facts):
        return None

    operands = PRODUCTS[_kind(product)]
    channel = _channel_of(product, operands)
    channels = Axes.of(shape(product.node), [channel])
    if not channels.normalised_dimensions:
        return None  # a single channel: its mean is itself
    stage_at = {stage.operation.node: stage for stage in stages}
    # The channels from below up and A from above down, both through the rules of the views in between.
    for step in (*reversed(between), outermost.operation):
        if step.node not in stage_at:
            above = _map_of(step).forward(channels)
            if above is None or not _one_dimension(above):
                return None  # in several dimensions they may change their order, which Axes does not tell
            channels = above
        elif not _scales(stage_at[step.node], channels):
            return None
    for step in between:
        if step.node not in stage_at:
            below = _map_of(step).backward(axes)
            if below is None:
                return None
            axes = below
    return _absorb(product, operands, channel, axes, tuple(stages))


def _one_dimension(axes: Axes) -> bool:
    return axes.whole and len(axes.normalised_dimensions) == 1


def _map_of(view: Operation) -> AxisMap:
    (reading,) = RULES[view.name](view)
    return reading.carriers[("input", None)]


def _kind(product: Operation) -> str:
    if product.name == "any_convolution":
        return "transposed_convolution" if product["transposed"] else "convolution"
    return product.name


def _channel_of(product: Operation, operands: ProductOperands) -> int:
    rank = len(shape(product.node))
    if "convolution" in _kind(product):
        return rank - (len(shape(product[operands.weight])) - 2) - 1
    return rank - 1


def _scales(stage: Stage, channels: Axes) -> bool:
    """Whether a stage has one number for each channel, in the channels' order."""
    (dimension,) = channels.normalised_dimensions
    if isinstance(stage, BatchNorm):
        return dimension == 1
    result, value, sizes = shape(stage.operation.node), shape(stage.value), shape(stage.scale)
    if len(value) != len(result) or not all(same_size(one, other) for one, other in zip(value, result, strict=True)):
        return False  # the scale broadcasts the value
    aligned = dimension - (len(result) - len(sizes))
    return aligned >= 0 and all(
        same_size(size, channels.count) if index == aligned else size == 1 for index, size in enumerate(sizes)
    )


def _alike(product: Operation, steps: list[Operation], stages: list[Stage], facts: GraphFacts) -> bool:
    """Whether everything is a parameter where it must be, the parameters are of one dtype, all on one device.

    The product may be of another: autocast computes it in half precision of weights in single precision, and the scale
    then promotes it to theirs. Where a stage is left out its dtype is kept by a cast.
    """
    if _kind(product) in ("addmm", "baddbmm") and (product["alpha"] != 1 or product["beta"] != 1):
        return False
    operands = PRODUCTS[_kind(product)]
    parameters = [product[operands.weight], *([] if operands.bias is None else [product[operands.bias]])]
    parameters = [parameter for parameter in parameters if parameter is not None]
    if not all(isinstance(parameter, fx.Node) and parameter in facts.parametric for parameter in parameters):
        return False
    if operands.bias is not None and product[operands.bias] is not None and len(shape(product[operands.bias])) != 1:
        return False
    if operands.bias is None and any(isinstance(stage, BatchNorm) for stage in stages):
        return False  # nowhere to put the shift
    for stage in stages:
        parameters += stage.parameters()
    scaled = {stage.operation.node for stage in stages}
    kept = {_kind_of_values(parameter) for parameter in parameters}
    computed = {_kind_of_values(node) for node in (product.node, *(s.node for s in steps)) if node not in scaled}
    results = {_kind_of_values(node) for node in scaled}
    return len(kept) == len(computed) == len(results) == 1 and None not in kept and results == kept


def _kind_of_values(node: fx.Node) -> tuple[torch.dtype, torch.device] | None:
    tensor = tensor_of(node)
    return None if tensor is None else (tensor.dtype, tensor.device)


def _absorb(
    product: Operation, operands: ProductOperands, channel: int, axes: Axes, stages: tuple[Stage, ...]
) -> ComposedSource | None:
    weight = (operands.weight, None)
    for reading in RULES[product.name](product):
        if weight not in reading.carriers:
            continue
        weight_axes = reading.carriers[weight].backward(axes)
        if weight_axes is None:
            return None
        groups = product["groups"] if _kind(product) == "transposed_convolution" else 1
        return ComposedSource(
            product,
            weight,
            weight_axes,
            operands.outgoing % weight_axes.rank,
            groups,
            None if operands.bias is None else (operands.bias, None),
            Axes((axes.dimensions[channel],)),
            stages,
        )
    return None
