"""What reads a norm, through views and casts, until products: the one walk that every rewrite behind norms asks.

A product may take γ and β into its parameters (:mod:`.affine`), be scaled behind its sum (:mod:`.deferral`), or take in
the whole norm (:mod:`.matrix_vector`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph import provenance
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Operation, canonicalise, tensor_of
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.graph.operands import WRITTEN, shape
from lncompile.passes.graph.product_operands import PRODUCTS, ProductOperands
from lncompile.passes.graph.sharding import is_sharded
from lncompile.passes.graph.traits import VIEWS, Trait, has
from lncompile.passes.norms.calls import LAYER_NORMS, WITH_STATISTICS
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.rules.base import RULES

# What only moves elements, or rounds them: it commutes with a scale and a shift of the features.
_MOVES = VIEWS | Trait.PASSES | Trait.DROPS | Trait.CUTS | Trait.SELECTS | Trait.ROTATES
_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16})


# What may multiply the features of a norm's output with a matrix.
ABSORBING = ("linear", "addmm", "matmul", "convolution")


@dataclass(frozen=True)
class Consumer:
    """A product that reads a norm's output.

    Attributes:
        operation: the product.
        operands: where its operands stand.
        path: what stands between the norm and the product, the norm first.
        axes: the features in what it reads.
        is_input: whether it reads it as the activation, and nowhere else.
    """

    operation: Operation
    operands: ProductOperands
    path: tuple[fx.Node, ...]
    axes: Axes
    is_input: bool

    @property
    def weight(self) -> fx.Node:
        """Its weight, as the graph was when the consumer was found."""
        weight: fx.Node = self.operation[self.operands.weight]
        return weight

    @property
    def bias(self) -> fx.Node | None:
        """Its bias, or None."""
        return None if self.operands.bias is None else self.operation[self.operands.bias]


def consumers_of(
    site: NormSite, through: Trait, dtypes: Collection[torch.dtype], asked_for_shape: bool
) -> Iterator[Consumer]:
    """Walk from a norm to the products that read it, whatever these can be made of.

    Args:
        site: a folded LayerNorm.
        through: what may stand in between.
        dtypes: which dtypes what stands in between may have.
        asked_for_shape: whether operations may ask for its shape, which needs the norm to stay.

    Raises:
        Blocked: something else reads it, or what is read is not the features as one dimension; the sentence says what.
    """
    pending: list[tuple[fx.Node, Axes, tuple[fx.Node, ...]]] = [(site.node, site.axes, ())]
    while pending:
        node, axes, before = pending.pop()
        path = (*before, node)
        if node.meta.get(WRITTEN):
            raise Blocked(Reason.MUTATION, f"{provenance.describe(node)} is written to")
        for user in node.users:
            operation = canonicalise(user)
            if operation is None or operation.in_place:
                raise _is_read_by(user)
            if operation.name in ABSORBING:
                operands = PRODUCTS[operation.name]
                places = {key for key, operand in operation.operands() if operand is node}
                yield Consumer(operation, operands, path, axes, places == {(operands.input, None)})
                continue
            moved = None
            if operation.name != "metadata":
                if not has(operation, through):
                    raise _is_read_by(user)
                moved = _features_behind(operation, node, axes)
            if moved is not None:
                tensor = tensor_of(user)
                if tensor is None or tensor.dtype not in dtypes:
                    raise _is_read_by(user)
                pending.append((user, moved, path))
            elif not asked_for_shape:
                raise _is_read_by(user)


def find_consumers(site: NormSite, facts: GraphFacts) -> tuple[Consumer, ...]:
    """Return the products that read a norm's output, if they are all that reads it and can absorb its affine.

    Args:
        site: a folded LayerNorm.
        facts: the facts of the graph.

    Raises:
        Blocked: something else reads it, or a parameter cannot be rewritten; the sentence says what.
    """
    _require_plain_call(site, facts)
    consumers = []
    for consumer in consumers_of(site, _MOVES, _DTYPES, asked_for_shape=True):
        _require_absorbable(consumer, site, facts)
        consumers.append(consumer)
    if not consumers:
        raise Blocked(Reason.VISIBLE, "nothing multiplies its output")
    return tuple(consumers)


def _is_read_by(user: fx.Node) -> Blocked:
    words = "its output is returned" if user.op == "output" else f"its output is read by {provenance.describe(user)}"
    return Blocked(Reason.VISIBLE, words)


def is_plain_layer_norm(site: NormSite) -> bool:
    """Whether a norm is a ``layer_norm`` as torch calls it, which returns nothing else."""
    name = site.operation.name
    return site.handwritten is None and name in LAYER_NORMS and name not in WITH_STATISTICS


def _require_plain_call(site: NormSite, facts: GraphFacts) -> None:
    if not is_plain_layer_norm(site):
        raise Blocked(Reason.UNKNOWN_OPERATION, "it is not a plain layer_norm")
    if len(site.normalized_shape) != 1:
        raise Blocked(Reason.DIFFERENT_AXES, "it normalises several axes")
    for parameter in (site.weight, site.bias):
        if parameter is not None and (
            parameter not in facts.parametric or is_sharded(tensor_of(parameter)) or facts.trained
        ):
            raise Blocked(Reason.UNSUPPORTED_WEIGHT, "its γ or β is not a plain frozen parameter")


def _features_behind(operation: Operation, given: fx.Node, axes: Axes) -> Axes | None:
    """Follow the features of a norm's output through an operation that only moves elements.

    Args:
        operation: that reads it.
        given: the norm's output, or what it was moved to.
        axes: the features in there.

    Returns:
        The features in the result; None if the operation asks for the shape alone.

    Raises:
        Blocked: the operation does something else, or the features are not a dimension of the result.
    """
    problem = _is_read_by(operation.node)
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


def _require_absorbable(consumer: Consumer, site: NormSite, facts: GraphFacts) -> None:
    operation, axes = consumer.operation, consumer.axes
    where = provenance.describe(operation.node)
    weight = operation[consumer.operands.weight]
    if not consumer.is_input or not isinstance(weight, fx.Node) or weight not in facts.parametric:
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
