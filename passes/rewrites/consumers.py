"""What the graph reads of a norm, through views and casts, until products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph import provenance
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Operation, canonicalise, tensor_of
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.graph.operands import WRITTEN, shape
from lncompile.passes.graph.sharding import is_sharded
from lncompile.passes.norms.calls import LAYER_NORMS, WITH_STATISTICS
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.rules.base import RULES

# What only moves elements, or rounds them: it commutes with a scale and a shift of the features.
_MOVES = frozenset(
    "view reshape view_as flatten unflatten squeeze unsqueeze permute transpose t mT movedim expand expand_as cast to "
    "type_as identity dropout getitem narrow slice select index_select roll flip".split()
)


_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16})


@dataclass(frozen=True)
class Layout:
    """Where an operation has its operands: activation, weight and bias by name, and the weight's features-in."""

    input: str
    weight: str
    dimension: int
    bias: str | None


LAYOUTS = {
    "linear": Layout("input", "weight", 1, "bias"),
    "addmm": Layout("mat1", "mat2", 0, "input"),
    "matmul": Layout("input", "other", 0, None),
    "convolution": Layout("input", "weight", 1, "bias"),
}


@dataclass(frozen=True)
class Consumer:
    """A product that reads a norm's output, and can take γ and β into its parameters.

    Attributes:
        operation: the product.
        layout: where its operands stand.
        path: what stands between the norm and the product, the norm first.
    """

    operation: Operation
    layout: Layout
    path: tuple[fx.Node, ...]

    @property
    def weight(self) -> fx.Node:
        """Its weight, as the graph was when the consumer was found."""
        weight: fx.Node = self.operation[self.layout.weight]
        return weight

    @property
    def bias(self) -> fx.Node | None:
        """Its bias, or None."""
        return None if self.layout.bias is None else self.operation[self.layout.bias]


def find_consumers(site: NormSite, facts: GraphFacts) -> tuple[Consumer, ...]:
    """Return the products that read a norm's output, if they are all that reads it and can absorb its affine.

    Args:
        site: a folded LayerNorm.
        facts: the facts of the graph.

    Raises:
        Blocked: something else reads it, or a parameter cannot be rewritten; the sentence says what.
    """
    _require_plain_call(site, facts)
    consumers: list[Consumer] = []
    pending: list[tuple[fx.Node, Axes, tuple[fx.Node, ...]]] = [(site.node, site.axes, ())]
    while pending:
        node, axes, before = pending.pop()
        path = (*before, node)
        if node.meta.get(WRITTEN):
            raise Blocked(Reason.MUTATION, f"{provenance.describe(node)} is written to")
        for user in node.users:
            operation = canonicalise(user)
            if operation is None or operation.in_place:
                raise Blocked(Reason.VISIBLE, _reads(user))
            if operation.name == "metadata":
                continue
            places = {key for key, operand in operation.operands() if operand is node}
            if operation.name in LAYOUTS:
                consumers.append(_consumer(operation, places, axes, path, site, facts))
            elif operation.name in _MOVES:
                moved = move_features(operation, node, axes)
                tensor = tensor_of(user)
                if moved is not None and (tensor is None or tensor.dtype not in _DTYPES):
                    raise Blocked(Reason.VISIBLE, _reads(user))
                if moved is not None:
                    pending.append((user, moved, path))
            else:
                raise Blocked(Reason.VISIBLE, _reads(user))
    if not consumers:
        raise Blocked(Reason.VISIBLE, "nothing multiplies its output")
    return tuple(consumers)


def _reads(user: fx.Node) -> str:
    return "its output is returned" if user.op == "output" else f"its output is read by {provenance.describe(user)}"


def _require_plain_call(site: NormSite, facts: GraphFacts) -> None:
    name = site.operation.name
    if site.handwritten is not None or name not in LAYER_NORMS or name in WITH_STATISTICS:
        raise Blocked(Reason.UNKNOWN_OPERATION, "it is not a plain layer_norm")
    if len(site.normalized_shape) != 1:
        raise Blocked(Reason.DIFFERENT_AXES, "it normalises several axes")
    for parameter in (site.weight, site.bias):
        if parameter is not None and (
            parameter not in facts.parametric or is_sharded(tensor_of(parameter)) or facts.trained
        ):
            raise Blocked(Reason.UNSUPPORTED_WEIGHT, "its γ or β is not a plain frozen parameter")


def move_features(operation: Operation, given: fx.Node, axes: Axes) -> Axes | None:
    """Follow the features of a norm's output through an operation that only moves elements.

    Args:
        operation: that reads it.
        given: the norm's output, or what it was moved to.
        axes: the features in there.

    Returns:
        The features in the result; None if the operation asks for the shape alone.

    Raises:
        Blocked: the operation does something else, or the features are no dimension of the result.
    """
    problem = Blocked(Reason.VISIBLE, _reads(operation.node))
    places = {key for key, operand in operation.operands() if operand is given}
    for reading in RULES[operation.name](operation):
        if places <= reading.metadata:
            return None
        if places != {("input", None)} or ("input", None) not in reading.carriers or reading.selective:
            continue
        moved = reading.carriers["input", None].forward(axes)
        # In several dimensions the features may have changed their order, which Axes does not tell.
        if moved is None or features_of(moved) is None:
            raise problem
        return moved
    raise problem


def features_of(axes: Axes) -> int | None:
    """The one dimension that is exactly the features, or None."""
    if not axes.whole or len(axes.normalised_dimensions) != 1:
        return None
    return axes.normalised_dimensions[0]


def _consumer(
    operation: Operation, places: set[Any], axes: Axes, path: tuple[fx.Node, ...], site: NormSite, facts: GraphFacts
) -> Consumer:
    layout = LAYOUTS[operation.name]
    consumer = Consumer(operation, layout, path)
    where = provenance.describe(operation.node)
    weight = operation[layout.weight]
    if places != {(layout.input, None)} or not isinstance(weight, fx.Node) or weight not in facts.parametric:
        raise Blocked(Reason.UNSUPPORTED_WEIGHT, f"it is multiplied by something that is not a parameter in {where}")
    tensor, result = tensor_of(weight), tensor_of(operation.node)
    is_convolution = operation.name == "convolution"
    if tensor is None or result is None or (not is_convolution and tensor.dim() != 2) or is_sharded(tensor):
        raise Blocked(Reason.UNSUPPORTED_WEIGHT, f"the weight of {where} is not a plain matrix")
    given = tensor_of(site.input)
    if given is None or given.device != tensor.device:
        raise Blocked(Reason.UNSUPPORTED_WEIGHT, f"the weight of {where} is on another device")
    if not {tensor.dtype, result.dtype} <= _DTYPES:
        raise Blocked(Reason.UNSUPPORTED_WEIGHT, f"{where} computes in a dtype too narrow for W diag(γ)")
    features = axes.rank - 1 - (tensor.dim() - 2 if is_convolution else 0)
    if features_of(axes) != features or (is_convolution and operation["groups"] != 1):
        raise Blocked(Reason.DIFFERENT_AXES, f"{where} does not sum over exactly the normalised axis")
    if site.bias is not None:
        _require_place_for_shift(consumer, facts, where)
    return consumer


def _require_place_for_shift(consumer: Consumer, facts: GraphFacts, where: str) -> None:
    """``Wβ`` goes into the bias, so that must be one for each output feature, added once."""
    operation, bias = consumer.operation, consumer.bias
    if bias is not None and (bias not in facts.parametric or len(shape(bias)) != 1 or is_sharded(tensor_of(bias))):
        raise Blocked(Reason.UNSUPPORTED_WEIGHT, f"what {where} adds is not a plain bias")
    if operation.name == "addmm" and (operation["alpha"] != 1 or operation["beta"] != 1):
        raise Blocked(Reason.VARYING_SCALE, f"{where} scales its bias and its product apart")
    if operation.name == "convolution":
        padding = operation["padding"]
        amounts = padding if isinstance(padding, tuple | list) else (padding,)
        if padding != "valid" and any(amount != 0 for amount in amounts):
            raise Blocked(Reason.DIFFERENT_AXES, f"{where} pads with zeros, where β would be missing")
