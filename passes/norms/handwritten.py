"""LayerNorms written out by hand: a difference from the mean, scaled by a function of that difference.

    m = x.mean(-1, keepdim=True);  d = x - m;  v = d.pow(2).mean(-1, keepdim=True);  y = d * rsqrt(v + ε)

Only the two lines with the mean matter to folding: where x is centered already, ``m = 0`` and ``d = x``, and what is
left *is* an RMSNorm. So a fold takes ``d`` out and leaves the author's other lines as they are, upcasts and all
(:mod:`.handwritten_fold`). Whatever those lines are: a variance biased or not, clamped or not, an ε inside the root or
outside of it, a 2-norm, ``normalize`` or ``rms_norm`` of the difference. They are functions of ``d`` alone, and ``d``
stays what it was.

What counts: any spelling of the mean (:mod:`.totals`), of which only the difference is taken (:mod:`.differences`), and
a difference that is scaled by a function of itself (:mod:`.normalisation`).

What does not: a mean that comes back (a scaler), a scale that reads x itself, a difference that nothing scales. Those
are :class:`Lookalike`, for the report. And normalisations of other kinds, whose statistics go over the batch (batch
norm) or over the positions of each channel (instance norm). The kind shows in γ and β where there are any, else in the
axes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lncompile.lowering import torch_private
from lncompile.passes.graph import provenance
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import canonicalise, tensor_of
from lncompile.passes.graph.effects import Writes
from lncompile.passes.graph.traits import Trait, has
from lncompile.passes.norms.differences import Difference, MeanUses, difference_of_moments, differences_in, uses_of_mean
from lncompile.passes.norms.moments import (
    Moment,
    behind_views,
    correction_of,
    exact_origin,
    passes_gradients,
    spread_of,
)
from lncompile.passes.norms.normalisation import Dependence, Normalisation, factors, varying_dimensions


@dataclass(frozen=True)
class Spread:
    """A node that holds the variance of ``x`` (or its root, the deviation), read off ``x`` itself.

    Attributes:
        node: the node.
        moment: of what, over which axes.
        is_deviation: whether it is the root.
        correction: what it takes off the number of elements that it divides by; None where that is not known.
    """

    node: fx.Node
    moment: Moment
    is_deviation: bool
    correction: float | None

    @property
    def can_be_exchanged(self) -> bool:
        """Whether it can be written as a sum of squares of a tensor without mean, divided by a known number."""
        if not passes_gradients(self.node, exact_origin(self.moment.source)):
            return False
        return self.correction == 0 or (self.correction is not None and isinstance(self.moment.axes.count, int))


@dataclass(frozen=True)
class HandwrittenNorm:
    """One chain.

    Attributes:
        input: ``x``.
        axes: what it normalises.
        mean: the reduction that its mean comes from.
        differences: the differences ``x - m``; some authors write the difference twice, and the mean too.
        spreads: the variances and deviations that read ``x`` itself or the difference, if the author wrote them so.
    """

    input: fx.Node
    axes: Axes
    mean: fx.Node
    differences: tuple[Difference, ...]
    spreads: tuple[Spread, ...]


@dataclass(frozen=True)
class Lookalike:
    """A difference from a mean over features that is not recognised as a LayerNorm: where it is taken, and why not."""

    node: fx.Node
    why: str


@dataclass(frozen=True)
class Chains:
    """What was found in a graph: norms in the order of their means, and what looks like one."""

    norms: tuple[HandwrittenNorm, ...]
    lookalikes: tuple[Lookalike, ...]


# What a chain is of, whatever casts the author wrote: the tensor before exact casts, its dtype where it counts, and A.
_Values = tuple[fx.Node, Axes]
_Typed = tuple[fx.Node, torch.dtype, Axes]


def _values(moment: Moment) -> _Values:
    return exact_origin(moment.source), moment.axes


def _typed(moment: Moment) -> _Typed:
    return exact_origin(moment.source), dtype_of(moment.source), moment.axes


@dataclass
class _Mean:
    """A reduction, the differences that its mean serves, and how each of them is scaled."""

    node: fx.Node
    moment: Moment
    differences: Sequence[Difference]
    normalisations: Sequence[Normalisation] = ()

    @property
    def is_normalised(self) -> bool:
        """Whether one of its differences is scaled by a function of the difference."""
        return any(normalisation.quotients for normalisation in self.normalisations)

    @property
    def is_over_features(self) -> bool:
        """Whether one of them is, and the mean is over features."""
        return any(
            _is_over_features([*normalisation.products, quotient], self.moment)
            for normalisation in self.normalisations
            for quotient in normalisation.quotients
        )

    @property
    def why_not(self) -> str:
        """Why none of them is."""
        raw = next((normalisation.raw for normalisation in self.normalisations if normalisation.raw is not None), None)
        if raw is None:
            return "nothing scales the difference by a function of the difference, as a norm does"
        return f"what scales it reads the tensor itself and not the difference alone: {provenance.describe(raw)}"


def find_handwritten_norms(graph: fx.Graph, writes: Writes) -> Chains:
    """Find every hand-written LayerNorm of a graph, and the differences from a mean that are none.

    Args:
        graph: the graph.
        writes: what it writes to. A chain is read as one only where nothing is written to in between.
    """
    taken: dict[fx.Node, list[Difference]] = defaultdict(list)
    for difference in differences_in(graph):
        taken[difference.total.node].append(difference)
    if not taken:
        return Chains((), ())
    means: list[_Mean] = []
    why: dict[_Values, tuple[Difference, str]] = {}
    for node in graph.nodes:
        if node not in taken:
            continue
        first, uses = taken[node][0], uses_of_mean(node)
        obstacle = _obstacle(uses, first)
        if uses is None or obstacle:
            why.setdefault(_values(first.moment), (first, obstacle))
        else:
            means.append(_Mean(node, first.moment, uses.differences))
    spreads = _spreads(graph)
    _read_scales(graph, means, spreads)
    norms = [mean for mean in means if mean.is_over_features]
    helpers: dict[_Typed, list[Difference]] = defaultdict(list)
    for mean in means:
        if not mean.is_normalised:
            helpers[_typed(mean.moment)] += mean.differences
            if not any(normalisation.layer_norm for normalisation in mean.normalisations):
                why.setdefault(_values(mean.moment), (mean.differences[0], mean.why_not))
    normalised = {_values(mean.moment) for mean in means if mean.is_normalised}
    computed = _computed_by_layers(graph)
    lookalikes = [
        Lookalike(difference.node, reason)
        for values, (difference, reason) in why.items()
        if values not in normalised and values[0] in computed and _are_plainly_features(difference.moment)
    ]
    return Chains(tuple(_norms(norms, helpers, spreads, writes)), tuple(lookalikes))


def _read_scales(graph: fx.Graph, means: Sequence[_Mean], spreads: Mapping[_Values, Sequence[Spread]]) -> None:
    """Find out what scales the differences."""
    shiftless: dict[_Values, set[fx.Node]] = defaultdict(set)
    for mean in means:
        shiftless[_values(mean.moment)] |= {difference.node for difference in mean.differences}
    for values, found in spreads.items():
        shiftless[values] |= {spread.node for spread in found}
    dependence = Dependence(graph)
    for mean in means:
        known = shiftless[_values(mean.moment)]
        mean.normalisations = [dependence.normalisation_of(d.node, mean.moment, known) for d in mean.differences]


def _norms(
    means: Sequence[_Mean],
    helpers: Mapping[_Typed, Sequence[Difference]],
    spreads: Mapping[_Values, Sequence[Spread]],
    writes: Writes,
) -> Iterator[HandwrittenNorm]:
    """Put the norms together. Two of one tensor may share a variance, and the differences it is made of."""
    served: set[_Values] = set()
    for mean in means:
        values = _values(mean.moment)
        differences = list(mean.differences)
        own: list[Spread] = []
        if values not in served:  # these are exchanged once
            differences += helpers.get(_typed(mean.moment), ())
            own += spreads.get(values, ())
            served.add(values)
        for difference in differences:
            if difference.node not in writes.marked:
                own += spreads.get((exact_origin(difference.node), mean.moment.axes), ())
        exchanged = tuple(spread for spread in own if spread.can_be_exchanged)
        yield HandwrittenNorm(*mean.moment.subject, mean.node, tuple(differences), exchanged)


def _obstacle(uses: MeanUses | None, difference: Difference) -> str:
    """Why the differences from one mean cannot be taken out whatever becomes of them, in words; "" if they can."""
    if uses is None or uses.other is difference.total.node:
        return "the tensor or its mean is written to before the mean is subtracted"
    if uses.other is not None:
        return f"the mean is not only subtracted, it is also read by {provenance.describe(uses.other)}"
    if any(dtype_of(taken.node) != dtype_of(taken.moment.source) for taken in uses.differences):
        return "the mean is taken in a wider dtype than the tensor, and the difference is in that dtype"
    if difference.moment.axes.count == 1:
        return "the mean is that of a single element"
    return ""


def _spreads(graph: fx.Graph) -> dict[_Values, list[Spread]]:
    """The variances and deviations of a graph, by what they are of."""
    found: dict[_Values, list[Spread]] = defaultdict(list)
    for node in graph.nodes:
        spread = _spread(node)
        if spread is not None:
            found[_values(spread.moment)].append(spread)
    return found


def _spread(node: fx.Node) -> Spread | None:
    """Read a node as a variance or deviation whose lines read ``x`` itself and not the difference."""
    operation = canonicalise(node)
    if operation is None or operation.name not in ("var", "std", "getitem", "sub"):
        return None
    if operation.name == "sub":
        moment = difference_of_moments(operation)
        return None if moment is None else Spread(node, moment, False, 0)
    read = spread_of(node) if behind_views(node) is node else None
    if read is None:
        return None
    return Spread(node, read[1], read[0].name.startswith("std"), correction_of(read[0]))


# --- the kind of normalisation ---


def _is_over_features(products: Sequence[fx.Node], moment: Moment) -> bool:
    """Whether γ and β vary along A, as a LayerNorm's do; without them, whether A can be features.

    Args:
        products: what multiplies the difference, the quotient last.
        moment: the mean.
    """
    for node in products:
        operation = canonicalise(node)
        for operand in operation.operands() if operation is not None else ():
            varying = varying_dimensions(operand[1], moment) if _is_parameter(operand[1]) else set()
            if varying:
                return not varying.isdisjoint(moment.dimensions)
    current: fx.Node | None = products[-1]
    while current is not None:
        following = None
        for user in current.users:
            operation = canonicalise(user)
            if operation is not None and has(operation, Trait.CASTS):
                following = user if operation["input"] is current else following
                continue
            for other in factors(operation, current) if operation is not None else ():
                if not _is_parameter(other):
                    continue
                assert isinstance(other, fx.Node)  # a parameter is one
                varying = varying_dimensions(other, moment)
                if varying:
                    return not varying.isdisjoint(moment.dimensions)
                following = user
        current = following
    return _can_be_features(moment)


def _can_be_features(moment: Moment) -> bool:
    """Whether A can be features, by where it stands: not the batch, and not all positions of an image."""
    rank = moment.axes.rank
    over_batch = 0 in moment.dimensions and rank > 1
    over_positions = rank >= 4 and set(moment.dimensions) == set(range(2, rank))
    return not over_batch and not over_positions


def _are_plainly_features(moment: Moment) -> bool:
    """Whether A must be features where neither γ nor β says so: the last axes, or the channels of an image."""
    rank = moment.axes.rank
    trailing = rank - 1 in moment.dimensions
    return _can_be_features(moment) and (trailing or (rank >= 4 and moment.dimensions == (1,)))


def _computed_by_layers(graph: fx.Graph) -> set[fx.Node]:
    """The tensors that are computed of parameters and of what the caller passes in: neither weights nor raw data."""
    of_parameters: set[fx.Node] = set()
    of_inputs: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            (of_parameters if torch_private.is_static_input(node) else of_inputs).add(node)
            continue
        for sources in (of_parameters, of_inputs):
            if not sources.isdisjoint(node.all_input_nodes):
                sources.add(node)
    return of_parameters & of_inputs


def _is_parameter(node: object) -> bool:
    """Whether a node is a view of a parameter or buffer."""
    if not isinstance(node, fx.Node):
        return False
    source = behind_views(node)
    return source.op == "placeholder" and torch_private.is_static_input(source)


def dtype_of(node: fx.Node) -> torch.dtype:
    """Dtype of a node's tensor."""
    tensor = tensor_of(node)
    assert tensor is not None  # asked of results of arithmetic only
    return tensor.dtype
