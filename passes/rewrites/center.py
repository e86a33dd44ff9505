"""Carrying a placement out: centered weights and activations go into the graph, every site's input is exchanged.

Before (GPT-2's last block, in short)::

    x      = addmm(b, h, W)
    stream = stream_before + x
    y      = layer_norm(stream, (768,), γ, β, ε)

After::

    W_centered = sub(W, mean(W, [1]))          # in float64; materialised once, see materialize.py
    b_centered = sub(b, mean(b, [0]))
    x      = addmm(b_centered, h, W_centered)
    stream = stream_before + x                 # now its mean is zero
    y      = layer_norm(stream, (768,), γ, β, ε)   # still right, and ready to be lowered to an RMSNorm
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lncompile.lowering import emit
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation, tensor_of, value_of
from lncompile.passes.graph.expressions import after_definition, closure
from lncompile.passes.graph.operands import CENTERED_ALONG
from lncompile.passes.graph.spellings import aten
from lncompile.passes.placement.copies import Supplies, Supply, Way, supplies_of
from lncompile.passes.placement.cut import Placement
from lncompile.passes.placement.variables import Variable, VariableKey
from lncompile.passes.rewrites.arithmetic import (
    EXACT,
    batch_norm_scale,
    batch_norm_shift,
    center_activation,
    center_composed_bias,
    center_scaled_weight,
    center_weight,
    channel_scale,
    compose_scales,
    compose_shifts,
    training_dtype,
)
from lncompile.passes.rules.composed_sources import BatchNorm, ComposedSource


@dataclass
class Rewrite:
    """What a rewrite put into the graph.

    Attributes:
        weights: nodes that compute a centered parameter expression, once for each set of parameters.
        trained: those that compute one at every call, because its gradient is wanted.
        made: the node of each centered operand that was made.
        taken_over: of products that disappeared into their weights, the node that has their value now.
        dead: these products.
        wants_gradient: parameter expressions whose gradient is wanted.
        in_training: whether the graph computes gradients.
    """

    weights: list[fx.Node] = field(default_factory=list)
    trained: list[fx.Node] = field(default_factory=list)
    made: dict[Supply, fx.Node] = field(default_factory=dict)
    taken_over: dict[fx.Node, fx.Node] = field(default_factory=dict)
    dead: list[fx.Node] = field(default_factory=list)
    wants_gradient: Collection[fx.Node] = frozenset()
    in_training: bool = False

    def of(self, supply: Supply) -> fx.Node:
        """The node that carries what a reader gets for an operand."""
        if supply.way is not Way.ITSELF:
            return self.made[supply]
        return self.taken_over.get(supply.operand, supply.operand)


def rewrite(
    graph: fx.Graph,
    placement: Placement,
    variables: Mapping[VariableKey, Variable],
    trained: Collection[fx.Node] = frozenset(),
    in_training: bool = False,
) -> Rewrite:
    """Rewrite the graph so that every stream of the placement is computed centered.

    Args:
        graph: changed in place.
        placement: what to do.
        variables: the streams the placement was made from.
        trained: parameter expressions whose gradient is wanted.
        in_training: whether the graph computes gradients.

    Returns:
        What was put in.
    """
    done = Rewrite(wants_gradient=trained, in_training=in_training)
    order = {node: index for index, node in enumerate(graph.nodes)}
    supplies = supplies_of(placement, variables)
    for supply in sorted(supplies.made(), key=lambda supply: (order[supply.operand], repr(supply.axes[0]))):
        _make(graph, supply, variables, done)
    streams: dict[fx.Node, list[Variable]] = defaultdict(list)
    for key in sorted(placement.streams, key=lambda key: (order[key[0]], repr(key[1]))):
        streams[key[0]].append(variables[key])
    for group in streams.values():
        _exchange_operands(graph, group, supplies, done)
    for site, supply in zip(placement.centered_for, supplies.sites, strict=True):
        source = done.of(supply)
        if source is not site.input:
            for operation, place in site.places:
                operation.replace({place: source})
    for node in done.dead:
        graph.erase_node(node)
    return done


def _make(graph: fx.Graph, supply: Supply, variables: Mapping[VariableKey, Variable], done: Rewrite) -> None:
    """Put what a reader gets for an operand into the graph, once for all readers that get it."""
    if supply in done.made or supply.way is Way.ITSELF:
        return
    operand, tensor = supply.operand, tensor_of(supply.operand)
    for source in supply.sources:
        _make(graph, source, variables, done)
    if supply.way is Way.REDONE:
        done.made[supply] = _redone(graph, operand, {source.operand: done.of(source) for source in supply.sources})
        return
    assert tensor is not None  # variables without a single tensor have no centering cost, so are never chosen
    with graph.inserting_before(after_definition(operand)):
        if supply.way is Way.COPY:
            parameter = variables[(operand, supply.axes[0])].parameter
            assert parameter is not None  # what is copied is a parameter expression
            done.made[supply] = _center_weight(graph, parameter, supply.axes, tensor, done)
        else:
            arguments = (operand, supply.axes[0], tensor.dtype)
            done.made[supply] = emit(graph, f"{operand.name}_centered", center_activation, *arguments)


def _center_weight(graph: fx.Graph, parameter: fx.Node, axes: Sequence[Axes], value: Tensor, done: Rewrite) -> fx.Node:
    """A parameter centered along sets of axes that do not meet, in the dtype of ``value``."""
    name = f"{parameter.name}_centered"
    kept = tensor_of(parameter)
    assert kept is not None  # a parameter is one tensor
    if parameter in done.wants_gradient:
        compute_dtype = training_dtype(kept.dtype)
        centered = emit(graph, name, center_weight, parameter, tuple(axes), value.dtype, compute_dtype)
        done.trained.append(centered)
    else:
        centered = emit(graph, name, center_weight, parameter, tuple(axes), value.dtype, value=value)
        done.weights.append(centered)
    if parameter.op == "placeholder" and kept.dtype == value.dtype:
        centered.meta[CENTERED_ALONG] = tuple(axes)
    return centered


def _redone(graph: fx.Graph, node: fx.Node, sources: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Do a view of a parameter once more, on the centered parameter."""
    with graph.inserting_before(after_definition(node)):
        again = graph.node_copy(node)
        again.meta = dict(node.meta)
    for source, centered in sources.items():
        again.replace_input_with(source, centered)
    return again


def _exchange_operands(graph: fx.Graph, group: Sequence[Variable], supplies: Supplies, done: Rewrite) -> None:
    """Let a node compute its streams: one, or several that center different parts of its result."""
    first = group[0]
    if first.composed_source is not None:
        _compose(graph, first.composed_source, done)
        return
    operation = first.operation
    assert operation is not None  # streams come out of operations with rules
    operands = {operand for variable in group for operand in variable.operands}
    _exchange(graph, operation, {o: supplies.streams[(first.node, o)] for o in operands}, first.zeros, done)
    for write in first.writes:
        values = {value: supplies.streams[(first.node, value)] for value in write.needs}
        _exchange(graph, write.operation, values, write.zeros, done)
    if operation.in_place:
        # ``x += y`` becomes ``x' = x + y``: the centered x may be a materialised weight, which the next call needs too.
        operation.node.target = _OUT_OF_PLACE.get(operation.node.target, operation.node.target)


def _exchange(
    graph: fx.Graph, operation: Operation, given: Mapping[fx.Node, Supply], zeros: Sequence[Key], done: Rewrite
) -> None:
    replacements: dict[Key, object] = {}
    for key, operand in operation.operands():
        if operand in given and key not in zeros:
            centered = done.of(given[operand])
            if centered is not operand:
                replacements[key] = centered
    for name, index in zeros:
        argument = operation[name] if index is None else operation[name][index]
        if isinstance(argument, fx.Node) and tensor_of(argument) is not None:
            with graph.inserting_before(operation.node):
                zero = _connected_zeros if done.in_training else torch.zeros_like
                replacements[(name, index)] = emit(graph, f"{argument.name}_centered", zero, argument)
        else:
            # A number, or the node of a dynamic one: zero of the same kind, so that no dtype changes.
            number = value_of(argument) if isinstance(argument, fx.Node) else argument
            replacements[(name, index)] = 0 if isinstance(number, int | torch.SymInt) else 0.0
    operation.replace(replacements)


# The in-place operations that facts read as plain updates, each with the one that leaves its operand alone.
_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div",
    aten.add_.Tensor: aten.add.Tensor, aten.add_.Scalar: aten.add.Scalar, aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor, aten.div_.Tensor: aten.div.Tensor,
}  # fmt: skip


def _compose(graph: fx.Graph, source: ComposedSource, done: Rewrite) -> None:
    """Compose scales and shifts into the parameters of a product, center these, and take the stages out."""
    product = source.product
    weight = product[source.weight[0]]
    bias = None if source.bias is None else product[source.bias[0]]
    weight_tensor = tensor_of(weight)
    assert weight_tensor is not None  # its shape was read when the source was found
    replacements: dict[tuple[str, int | None], object] = {}
    is_trained = any(parameter in done.wants_gradient for parameter in source.parameters())
    compute_dtype = training_dtype(weight_tensor.dtype) if is_trained else EXACT
    _bring_forward(graph, source.parameters(), product.node)
    with graph.inserting_before(product.node):
        scale, shift = _composed_stages(graph, source, compute_dtype)
        replacements[source.weight] = emit(
            graph, f"{weight.name}_composed_centered", center_scaled_weight, weight, scale, source.dimension,
            source.weight_axes, weight_tensor.dtype, source.groups, compute_dtype,
        )  # fmt: skip
        if source.bias is not None and (bias is not None or shift is not None):
            name = f"{product.node.name if bias is None else bias.name}_composed_centered"
            replacements[source.bias] = emit(
                graph,
                name,
                center_composed_bias,
                bias,
                scale,
                shift,
                source.bias_axes,
                weight_tensor.dtype,
                compute_dtype,
            )
    (done.trained if is_trained else done.weights).extend(
        node for node in replacements.values() if isinstance(node, fx.Node)
    )
    product.replace(replacements)
    carriers: dict[fx.Node, fx.Node] = {}
    for stage in source.stages:
        node = stage.operation.node
        value = _in_dtype_of(graph, carriers.get(stage.value, stage.value), node)
        carriers[node] = value
        node.replace_all_uses_with(value)
        done.taken_over[node] = value
        done.dead.append(node)


def _bring_forward(graph: fx.Graph, expressions: Iterable[fx.Node], node: fx.Node) -> None:
    """Have expressions of parameters computed before a node: a product reads now what a scale behind it read."""
    order = {other: index for index, other in enumerate(graph.nodes)}
    for expression in expressions:
        for step in closure(expression):
            if order[step] > order[node]:
                node.prepend(step)
                order[step] = order[node]


def _connected_zeros(value: Tensor) -> Tensor:
    """Zeros that autograd knows to come from ``value``: its gradient is zero, as in the original, and not missing.

    Optimizers pass over a parameter without a gradient, weight decay included.
    """
    return torch.sub(value, value)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype)


def _in_dtype_of(graph: fx.Graph, value: fx.Node, node: fx.Node) -> fx.Node:
    """``value`` in the dtype of the node whose place it takes: a scale may promote what autocast computed."""
    has, wanted = tensor_of(value), tensor_of(node)
    assert has is not None  # both were read when the source was found
    assert wanted is not None
    if has.dtype == wanted.dtype:
        return value
    with graph.inserting_before(node):
        return emit(graph, node.name, _cast, value, wanted.dtype)


def _composed_stages(
    graph: fx.Graph, source: ComposedSource, compute_dtype: torch.dtype
) -> tuple[fx.Node, fx.Node | None]:
    """One scale and one shift of the channels for all stages of a source."""
    total_scale: fx.Node | None = None
    total_shift: fx.Node | None = None
    for stage in source.stages:
        name = f"{stage.operation.node.name}_composed"
        shift = None
        if isinstance(stage, BatchNorm):
            parameters = (stage.running_var, stage.weight, stage.eps, compute_dtype)
            scale = emit(graph, f"{name}_scale", batch_norm_scale, *parameters)
            shift = emit(graph, f"{name}_shift", batch_norm_shift, stage.running_mean, stage.bias, scale, compute_dtype)
        else:
            scale = emit(graph, f"{name}_scale", channel_scale, stage.scale, stage.divides, compute_dtype)
        if total_shift is not None:
            shift = emit(graph, f"{name}_shift", compose_shifts, scale, total_shift, shift)
        total_shift = shift
        total_scale = scale if total_scale is None else emit(graph, f"{name}_scale", compose_scales, scale, total_scale)
    assert total_scale is not None  # a composed source has a stage
    return total_scale, total_shift
