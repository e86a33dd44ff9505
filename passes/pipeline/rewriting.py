"""The passes that rewrite: from the decisions to a graph for Inductor.

Each function is a pass (:mod:`.interface`). What one puts into the graph it returns, for those behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from lncompile.lowering import NormCall, lower_to_aten, lower_to_rms_norm, slices_of_row, stored_scale_of
from lncompile.passes.graph.canonical import tensor_of
from lncompile.passes.graph.expressions import Expression, closure
from lncompile.passes.norms.calls import WITH_STATISTICS
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.pipeline.context import Rewriting
from lncompile.passes.pipeline.interface import rewrites
from lncompile.passes.rewrites import affine, deferral
from lncompile.passes.rewrites import hoist as hoisting
from lncompile.passes.rewrites.affine import Absorbed
from lncompile.passes.rewrites.center import Rewrite, rewrite
from lncompile.passes.rewrites.handwritten import fold_handwritten_norm
from lncompile.passes.rewrites.matrix_vector import copy_transposed, write_as_sums


def _nothing(work: Rewriting) -> None:
    return None


def _not_centered(work: Rewriting) -> Rewrite:
    return Rewrite()


@rewrites(Rewriting.rewritten, instead=_not_centered)
def center(work: Rewriting) -> Rewrite:
    """Centered weights and activations go into the graph, and every folded site reads a centered input."""
    analysis = work.analysis
    if analysis.placement is None:
        return Rewrite()
    return rewrite(work.graph, analysis.placement, analysis.variables, analysis.trained, analysis.costs.training)


@rewrites(Rewriting.means_taken_out, instead=_nothing)
def handwritten(work: Rewriting) -> None:
    """Norms written by hand no longer subtract a mean that is zero."""
    placement = work.analysis.placement
    for site in () if placement is None else placement.folded:
        if site.handwritten is not None:
            fold_handwritten_norm(work.graph, site.handwritten, site.current_input)


def _not_absorbed(work: Rewriting) -> Absorbed:
    return Absorbed()


@rewrites(Rewriting.absorbed, instead=_not_absorbed)
def absorb(work: Rewriting) -> Absorbed:
    """γ and β of norms go into the weights and biases of the products that read them."""
    return affine.absorb(work.graph, work.analysis.absorptions, work.rewritten.weights)


def _not_transposed(work: Rewriting) -> Sequence[fx.Node]:
    return ()


@rewrites(Rewriting.transposed, instead=_not_transposed)
def transpose(work: Rewriting) -> Sequence[fx.Node]:
    """Products that become sums read copies of their weights whose rows lie one after the other."""
    return copy_transposed(work.graph, work.matrix_vectors)


# An expression may hold a norm by hand, of parameters alone. Its chain is half changed until its mean is taken out: the
# input is exchanged in one place, and the raw mean stands in another.
@rewrites(Rewriting.expressions, after=[handwritten])
def hoist(work: Rewriting) -> Sequence[Expression]:
    """What is computed of parameters alone leaves the graph, and extra inputs take its place."""
    # Taking a mean out may have taken with it what was centered for the mean alone.
    present = set(work.graph.nodes)
    turned = list(work.transposed)
    # A centered weight that only its transposed copy reads is a step of that expression.
    inner = {node for copy in turned for node in closure(copy)} - set(turned)
    weights = (*work.rewritten.weights, *work.absorbed.parameters)
    roots = [weight for weight in weights if weight in present and any(user not in inner for user in weight.users)]
    expressions, _ = hoisting.hoist(work.graph, [*roots, *turned])
    return expressions


@rewrites(Rewriting.deferred, instead=_nothing)
def defer(work: Rewriting) -> None:
    """Scales of norms move behind the products that read them."""
    deferral.defer(work.graph, work.analysis.deferrals, work.absorbed.products)


@rewrites(Rewriting.sums, instead=_nothing)
def matrix_vector(work: Rewriting) -> None:
    """Products of one row become sums, with norms inside."""
    write_as_sums(work.graph, work.matrix_vectors)


@rewrites(Rewriting.lowered, instead=_nothing)
def lower(work: Rewriting) -> None:
    """Folded norms become RMSNorms, in operations that Inductor fuses."""
    # One at a time: lowering a norm exchanges the input of a norm of that norm.
    lower_to_rms_norm(work.graph, (_call(site) for site in work.calls(folded=True)))


@rewrites(Rewriting.eager, instead=_nothing)
def eager(work: Rewriting) -> None:
    """Norms that stay run ATen's own kernel, where that is asked for."""
    if work.options.nonfoldable == "eager":
        lower_to_aten(work.graph, (_call(site) for site in work.calls(folded=False)))


def _call(site: NormSite) -> NormCall:
    operation = site.current()
    stream, tensor = site.current_input, tensor_of(site.input)
    assert tensor is not None  # what find_sites requires of a site
    one_axis = site.groups is None and len(site.normalized_shape) == 1
    # The result may take the memory of a stream that nothing else reads, unless slices of it are read side by side.
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
        stored_scale=stored_scale_of(tensor) if one_axis else None,
    )
