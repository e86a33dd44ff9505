"""The limit: the same graph, through the same Inductor, with every LayerNorm replaced by the identity.

No way to compute a norm can be faster than not computing it. What ``T_inductor - T_no_norm`` leaves is the cost of the
norms in this model on this device: their kernels, and what they keep Inductor from fusing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lncompile.lowering import torch_private_inductor
from lncompile.options import parse_options
from lncompile.passes.graph.canonical import tensor_of
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.passes.norms.calls import WITH_STATISTICS
from lncompile.passes.norms.expand import closed_norms, expand_opaque_layers, find_opaque_layers
from lncompile.passes.norms.folded_before import gather_folded_norms
from lncompile.passes.norms.sites import NormSite, list_norms
from lncompile.passes.norms.subgraphs import norms_in_subgraphs


def replace_norms(graph_module: fx.GraphModule, replacement: Callable[[fx.Graph, NormSite], fx.Node]) -> int:
    """Replace the LayerNorms of a graph that are single calls with a single result.

    Before::

        y = layer_norm(x, (768,), γ, β, 1e-5)

    After::

        y = replacement(graph, site)

    Args:
        graph_module: its graph is changed in place; operators with norms inside are written out first.
        replacement: makes the node that takes a norm's place, at the graph's insertion point.

    Returns:
        How many were replaced.

    Raises:
        NotImplementedError: for a norm written by hand, one that returns statistics too, and one inside an operator
            or a subgraph. Leaving it in place would make the limit a wrong number.
    """
    graph = graph_module.graph
    if any((*closed_norms(graph).values(), *norms_in_subgraphs(graph_module).values())):
        raise NotImplementedError("there are norms inside operators or subgraphs, which this does not reach")
    expand_opaque_layers(graph, [node.name for node in find_opaque_layers(graph)])
    gather_folded_norms(graph)
    sites = list_norms(graph)
    for site in sites:
        if site.handwritten is not None or site.operation.name in WITH_STATISTICS:
            raise NotImplementedError(
                f"'{site.name}' is not a single call of layer_norm, and nothing else can be replaced here"
            )
        with graph.inserting_before(site.node):
            result = replacement(graph, site)
        site.node.replace_all_uses_with(result)
        graph.erase_node(site.node)
    graph.lint()
    graph_module.recompile()
    return len(sites)


def identity(graph: fx.Graph, site: NormSite) -> fx.Node:
    """Put the input of a norm in the place of its output, in the output's dtype."""
    source = site.current()["input"]
    tensor = tensor_of(source)
    assert tensor is not None  # what list_norms requires of a site
    # A copy, which Inductor takes out: an author may go on with `y += ...`, and that must not write into the stream.
    result = graph.create_node("call_function", torch.clone, (source,), name=f"{site.node.name}_identity")
    result.meta["example_value"] = tensor
    if tensor.dtype != site.output_dtype:
        result = graph.create_node("call_method", "to", (result, site.output_dtype))
        result.meta["example_value"] = tensor.to(site.output_dtype)
    return result


class NormsReplaced:
    """A Dynamo backend: Inductor, on the graph with its norms replaced.

    Args:
        replacement: as for :func:`replace_norms`.
        mode: as for ``torch.compile``.
        options: Inductor's, likewise.

    Attributes:
        replaced: number of norms in the graphs compiled so far.
    """

    def __init__(
        self,
        replacement: Callable[[fx.Graph, NormSite], fx.Node],
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._replacement = replacement
        self._mode, self._options = mode, options
        self.replaced = 0

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph."""
        _, config = parse_options(self._mode, self._options)
        own = copy_graph_module(graph_module)
        self.replaced += replace_norms(own, self._replacement)
        return torch_private_inductor.inductor_compile(own, list(example_inputs), config)


def no_norm(mode: str | None = None, options: Mapping[str, Any] | None = None) -> NormsReplaced:
    """Return a Dynamo backend that leaves every LayerNorm out. Its outputs are not predictions.

    Args:
        mode: as for ``torch.compile``.
        options: Inductor's, likewise.

    Raises (when it compiles):
        NotImplementedError: for a model with norms written by hand.

    Example:
        >>> limit = torch.compile(model, backend=no_norm("reduce-overhead"))
    """
    return NormsReplaced(identity, mode, options)


def with_small_weights(model: nn.Module, factor: float = 0.05) -> nn.Module:
    """Return a copy of a model whose residual stream stays bounded without its norms.

    Nothing else bounds it: with random weights it overflows within a few layers, and a GPU multiplies infinities with
    less power, so faster, than numbers. Scaled down, a layer adds less to the stream than the stream has.

    Args:
        model: not changed.
        factor: what every matrix, embeddings and filters included, is multiplied with.

    Returns:
        A copy, with equal shapes and so with the same code.
    """
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(factor)
    return changed
