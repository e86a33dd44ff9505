"""From a decision to a graph for Inductor: the second half of the pipeline, a pass a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from lncompile.analysis import Analysis
from lncompile.lowering import NormCall, lower_to_aten, lower_to_rms_norm, sizes_of_stored_scale, slices_of_row
from lncompile.options import Options
from lncompile.passes.graph.canonical import tensor_of
from lncompile.passes.graph.expressions import Expression, closure
from lncompile.passes.norms.calls import WITH_STATISTICS
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.rewrites.affine import absorb
from lncompile.passes.rewrites.center import rewrite
from lncompile.passes.rewrites.deferral import defer
from lncompile.passes.rewrites.handwritten import fold_handwritten_norm
from lncompile.passes.rewrites.hoist import hoist
from lncompile.passes.rewrites.matrix_vector import copy_transposed, write_as_sums


@dataclass(frozen=True)
class Transformed:
    """What goes to Inductor.

    Attributes:
        graph_module: the rewritten graph.
        expressions: the parameter expressions that its new placeholders stand for, in their order.
        in_graph: centered weights that are computed in the graph, at every call, because gradients pass through them.
    """

    graph_module: fx.GraphModule
    expressions: tuple[Expression, ...]
    in_graph: tuple[fx.Node, ...] = ()


def transform(analysis: Analysis, options: Options) -> Transformed:
    """Carry the decisions of an analysis out, on the analysis's own copy of the graph.

    Args:
        analysis: its graph is changed in place.
        options: our options.
    """
    graph_module = analysis.graph_module
    graph = graph_module.graph
    folded = {site.node for site in analysis.sites if site.folded_before}
    if analysis.placement is not None:
        folded |= {site.node for site in analysis.placement.folded}
    one_row = analysis.matrix_vectors
    # They are no calls of a norm any more.
    deferred = {deferral.site.node for deferral in analysis.deferrals} | one_row.norms
    calls = [site for site in analysis.sites if site.handwritten is None and site.node not in deferred]
    expressions: Sequence[Expression] = ()
    in_graph: Sequence[fx.Node] = ()
    if analysis.placement is not None:
        rewritten = rewrite(graph, analysis.placement, analysis.variables, analysis.trained, analysis.costs.training)
        in_graph = rewritten.trained
        # Before expressions leave the graph: one may read a norm by hand, of parameters alone, whose chain is half
        # changed now, with the input exchanged in one place and the raw mean in another.
        for site in analysis.placement.folded:
            if site.handwritten is not None:
                fold_handwritten_norm(graph, site.handwritten, site.current_input)
        absorbed = absorb(graph, analysis.absorptions, rewritten.weights)
        # Taking a mean out may have taken with it what was centered for the mean alone, and where parts of a weight are
        # read together the copies of single parts have no reader.
        present = set(graph.nodes)
        weights = (*rewritten.weights, *absorbed.parameters)
        turned = copy_transposed(graph, one_row)
        # A centered weight that only its transposed copy reads is a step of that expression.
        inner = {node for copy in turned for node in closure(copy)} - set(turned)
        roots = [w for w in weights if w in present and any(user not in inner for user in w.users)]
        expressions, _ = hoist(graph, [*roots, *turned])
        defer(graph, analysis.deferrals, absorbed.products)
        write_as_sums(graph, one_row)
    # One at a time: lowering a norm exchanges the input of a norm of that norm.
    lower_to_rms_norm(graph, (_call(site) for site in calls if site.node in folded))
    if options.nonfoldable == "eager":
        lower_to_aten(graph, (_call(site) for site in calls if site.node not in folded))
    graph.lint()
    graph_module.recompile()
    return Transformed(graph_module, tuple(expressions), tuple(in_graph))


def _call(site: NormSite) -> NormCall:
    operation = site.current()
    stream, tensor = site.current_input, tensor_of(site.input)
    assert tensor is not None  # what find_sites requires of a site
    one_axis = site.groups is None and len(site.normalized_shape) == 1
    # The result may take the memory of a stream that nobody else reads, unless slices of it are read side by side.
    in_slices = one_axis and len(stream.users) > 1
    return NormCall(
        site.node,
        stream,
        site.normalized_shape,
        operation["weight"],
        operation["bias"],
        site.eps,
        tensor.dtype,
        site.output_dtype,
        returns_statistics=site.operation.name in WITH_STATISTICS,
        groups=site.groups,
        slices=slices_of_row(tensor) if in_slices else 1,
        stored_scale=sizes_of_stored_scale(tensor) if one_axis else None,
    )
