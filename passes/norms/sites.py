"""Finding the LayerNorm sites of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lncompile.passes.decisions import Blocked
from lncompile.passes.graph import provenance
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation, canonicalise, tensor_of, value_of
from lncompile.passes.graph.effects import find_writes
from lncompile.passes.graph.operands import shape
from lncompile.passes.norms.calls import (
    FOLDED_NORMS,
    GROUP_NORMS,
    LAYER_NORMS,
    is_layer_norm,
    mean_is_read,
    normalised_axes,
    output_is_read,
)
from lncompile.passes.norms.handwritten import Chains, HandwrittenNorm, find_handwritten_norms

# Passes that expand an opaque operator leave the name of a norm inside it here, for the report.
SITE_NAME = "lnfold_site_name"


@dataclass(frozen=True)
class NormSite:
    """One LayerNorm, a call or a chain written by hand: its node, what it normalises, its parameters as graph nodes."""

    operation: Operation
    input: fx.Node
    axes: Axes
    name: str
    location: str
    handwritten: HandwrittenNorm | None = None

    @property
    def node(self) -> fx.Node:
        """The call's node."""
        return self.operation.node

    @property
    def folded_before(self) -> bool:
        """Whether it is folded as it came (``lncompile.nn.RMSNorm``): it needs nothing centered for it."""
        return self.operation.name in FOLDED_NORMS

    @property
    def places(self) -> Sequence[tuple[Operation, Key]]:
        """Where its input stands: in the call, or in the differences of a chain."""
        if self.handwritten is None:
            return [(self.operation, ("input", None))]
        return [(difference.operation, difference.source) for difference in self.handwritten.differences]

    @property
    def current_input(self) -> fx.Node:
        """Its input as it stands in the graph now, after rewrites."""
        operation, place = self.places[0]
        current = canonicalise(operation.node)
        assert current is not None  # it was one when the site was found, and rewrites only exchange operands
        return next(node for key, node in current.operands() if key == place)

    def current(self) -> Operation:
        """The call as it stands in the graph now, after rewrites."""
        operation = canonicalise(self.node)
        assert operation is not None  # it was one when the site was found, and rewrites only exchange operands
        return operation

    @property
    def groups(self) -> int | None:
        """Number of groups the channels are normalised in (``group_norm``); None for a norm of trailing axes."""
        return self.operation["num_groups"] if self.operation.name in GROUP_NORMS else None

    @property
    def normalized_shape(self) -> tuple[Any, ...]:
        """Sizes of the normalised trailing axes; of a group norm those of one group."""
        groups = self.groups
        if groups is not None:
            return (shape(self.input)[1] // groups,)
        sizes = self.operation["normalized_shape"]
        return tuple(value_of(sizes) if isinstance(sizes, fx.Node) else sizes)

    @property
    def weight(self) -> Any:
        """γ: a node, or None."""
        return self.operation["weight"]

    @property
    def bias(self) -> Any:
        """β: a node, or None."""
        return self.operation["bias"]

    @property
    def eps(self) -> Any:
        """ε: a number, or a node where Dynamo made it an input of the graph (``dynamic=True``)."""
        return self.operation["eps"]

    @property
    def output_dtype(self) -> torch.dtype:
        """Dtype of the normalised tensor, as eager gives it (autocast included)."""
        value = value_of(self.node)
        dtype: torch.dtype = (value[0] if isinstance(value, tuple | list) else value).dtype
        return dtype


def find_sites(graph: fx.Graph, chains: Chains) -> Sequence[NormSite]:
    """Return every LayerNorm of the graph, in order: calls in any spelling, and chains written by hand.

    Args:
        graph: the graph.
        chains: what :func:`.find_handwritten_norms` finds in it.

    A call whose input is no floating-point tensor of known shape is left out, it is not a site; so is one
    whose mean is read (``native_layer_norm`` returns it) or whose output is not, and a group norm with spatial extent.
    """
    sites = []
    handwritten = {norm.mean: norm for norm in chains.norms}
    for node in graph.nodes:
        operation = canonicalise(node)
        if operation is not None and node in handwritten:
            norm = handwritten[node]
            sites.append(NormSite(operation, norm.input, norm.axes, site_name(node), provenance.location(node), norm))
            continue
        axes = _axes_of_call(operation) if operation is not None else None
        if operation is not None and axes is not None:
            sites.append(NormSite(operation, operation["input"], axes, site_name(node), provenance.location(node)))
    return sites


def list_norms(graph: fx.Graph) -> Sequence[NormSite]:
    """Return every LayerNorm of a graph that is only looked at: what :func:`find_sites` finds, with what that needs."""
    return find_sites(graph, find_handwritten_norms(graph, find_writes(graph)))


def _axes_of_call(operation: Operation) -> Axes | None:
    """What a call normalises if it is a LayerNorm, else None."""
    if operation.name not in LAYER_NORMS | GROUP_NORMS:
        return None
    source = operation["input"]
    tensor = tensor_of(source) if isinstance(source, fx.Node) else None
    if tensor is None or value_of(operation.node) is None or not tensor.is_floating_point():
        return None
    if not is_layer_norm(operation) or mean_is_read(operation) or not output_is_read(operation):
        return None
    try:
        return normalised_axes(operation)
    except Blocked:
        return None


def site_name(node: fx.Node) -> str:
    """What a report calls the norm that a node is, or stands in."""
    given = node.meta.get(SITE_NAME)
    if given:
        return str(given)
    stack = node.meta.get("nn_module_stack")
    path = provenance.module_path(node)
    if not stack or not path:
        return node.name
    innermost = list(stack.values())[-1][1]
    class_name = innermost if isinstance(innermost, str) else innermost.__name__
    # A functional call in the middle of a larger module: the module's path alone would not tell two of them apart.
    return path if "norm" in class_name.lower() else f"{path}:{node.name}"
