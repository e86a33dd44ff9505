"""Placement within a memory budget: how much room centered copies of weights may take beside the model.

Placement (:mod:`lncompile.passes.placement.cut`) saves as much memory traffic as it can and has copies for nothing.
Within a budget it is to save as much as it can with copies whose bytes fit. A limit on a sum is not a minimum cut, but
a price is: with a price ``λ`` on each byte of a copy the cut maximises ``S - λB``, traffic saved less bytes of copies.
What maximises that, for whatever ``λ``, is optimal for the bytes it uses: no placement with as many bytes or fewer
saves more (H. Everett, "Generalized Lagrange multiplier method for solving problems of optimum allocation of
resources", Operations Research 11, 1963).

As ``λ`` grows, the optima run along the corners of the concave hull of all ``(B, S)``. The last one that fits is found
by chords (G. Handler and I. Zang, "A dual algorithm for the constrained shortest path problem", Networks 10, 1980): of
one corner that fits and one that does not, the slope of the chord is the next price, and its optimum is a corner in
between that takes the place of one of the two; or there is none, and the search ends. Prices are fractions and
capacities whole numbers, so this is exact. Layers are alike, and copies of equal worth would lie on one edge of the
hull, from none of them to all. So a copy's amount is its bytes and, behind them, a number too small to change anything
but ties.

What is not promised is that nothing *within the budget* saves more: between two corners lie placements that are optimal
for no price (the duality gap). Two things narrow it. A copy that alone is larger than the budget is out from the start;
and what room is left is filled with whatever the corners that do not fit have more, the best worth for its bytes first.
What was filled in this way saves no less than every placement with as many bytes as the corner. Bytes
are counted as the rewrite makes copies, except that two equal expressions which need no copy of their own where they
are streams count apart in the cut.

The bytes are those of one graph. Graphs of one model share the copies of the same weights (``materialize``), and where
a graph break cuts a model in pieces each has weights of its own, so that shares of them add up to a share of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor, fx

from lncompile.passes.decisions import MemoryBudget
from lncompile.passes.graph.canonical import tensor_of
from lncompile.passes.graph.expressions import Expression
from lncompile.passes.graph.provenance import parameter_names
from lncompile.passes.graph.sharding import local_bytes
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.placement.copies import reached, supplies_of
from lncompile.passes.placement.costs import CostModel
from lncompile.passes.placement.cut import Placement, Price, assemble, find_conflict, place
from lncompile.passes.placement.variables import Variable, VariableKey
from lncompile.passes.rules.composed_sources import BatchNorm, ComposedSource


@dataclass(frozen=True)
class Budgeted:
    """A placement within a budget.

    Attributes:
        placement: the one chosen.
        unlimited: the one without the budget.
        budget: the limit, and what the unlimited placement's copies take.
        used: bytes of the copies that the chosen placement makes.
        proven: bytes for which it is proven that no placement with as many saves more; ``used`` or less.
        left: of each site that folds only without the budget, why, in words.
    """

    placement: Placement
    unlimited: Placement
    budget: MemoryBudget
    used: int
    proven: int
    left: Mapping[fx.Node, str]


def limit_in_bytes(budget: int | float, parameters: Iterable[Tensor]) -> int:
    """What a budget allows in bytes.

    Args:
        budget: a number of bytes, or as a float a share of the parameters' own bytes.
        parameters: those of the graph, each once.

    Example:
        >>> limit_in_bytes(0.5, [torch.zeros(4, 4)])
        32
    """
    return budget if isinstance(budget, int) else int(budget * sum(local_bytes(tensor) for tensor in parameters))


def place_within(
    limit: int,
    sites: Sequence[NormSite],
    variables: Mapping[VariableKey, Variable],
    assist: bool,
    costs: CostModel,
    uncopied: Collection[fx.Node] = frozenset(),
) -> Budgeted:
    """Choose what saves the most with copies that fit.

    Args:
        limit: bytes that the copies of this graph may take.
        sites: as for :func:`lncompile.passes.placement.cut.place`, like the next three.
        variables: the streams of the graph.
        assist: whether activations may be centered at run time.
        costs: what folding saves.
        uncopied: parameter expressions that are centered without a copy.

    Returns:
        The placement, whose copies fit. Where the unlimited one's fit, that one.
    """
    unlimited = place(sites, variables, assist, costs)
    ledger = _Ledger(variables, uncopied)
    wanted = _total(ledger.copies(unlimited))
    budget = MemoryBudget(limit, wanted, wanted > limit)
    if not budget.binds:
        return Budgeted(unlimited, unlimited, budget, wanted, wanted, {})
    search = _Search(limit, sites, variables, assist, costs, ledger, unlimited)
    corner, beyond = search.corner()
    placement = search.fill(corner.placement, (beyond.placement, unlimited))
    used = ledger.copies(placement)
    folded = {site.node for site in placement.folded}
    stay = [site for site in unlimited.folded if site.node not in folded]
    left = {site.node: _why(site, ledger, unlimited, used, limit) for site in stay}
    return Budgeted(placement, unlimited, budget, _total(used), search.proven(corner), left)


@dataclass(frozen=True)
class Copy:
    """A centered copy of weights: the parameters' names and the bytes beside the model."""

    name: str
    bytes: int


def copy_bytes(parameter: fx.Node, value: Tensor, uncopied: Collection[fx.Node]) -> int:
    """Bytes that centering a parameter expression adds beside the model.

    Args:
        parameter: the expression.
        value: a (fake) tensor like the centered one.
        uncopied: expressions that are centered without a copy: in the graph, where they are trained.
    """
    return 0 if parameter in uncopied else local_bytes(value)


class _Ledger:
    """Which choice makes which copies. Equal expressions share one, as they do in ``materialize``."""

    def __init__(self, variables: Mapping[VariableKey, Variable], uncopied: Collection[fx.Node]) -> None:
        self._variables = variables
        self._identities: dict[fx.Node, Hashable] = {}
        #: By variable, what tells the copy from others: of centering it explicitly, and of making it centered.
        self.explicit: dict[VariableKey, Hashable] = {}
        self.made: dict[VariableKey, Hashable] = {}
        self.known: dict[Hashable, Copy] = {}
        for key, variable in variables.items():
            tensor, parameter, source = tensor_of(variable.node), variable.parameter, variable.composed_source
            if parameter is not None and tensor is not None and variable.centering_cost is not None:
                size = copy_bytes(parameter, tensor, uncopied)
                # Parts of a parameter that are read together are centered in one copy.
                axes = None if variable.axes.partial else variable.axes
                self._enter(self.explicit, key, (self._identity(parameter), tensor.dtype, axes), [parameter], size)
            if source is not None:
                size = 0 if any(p in uncopied for p in source.parameters()) else _composed_bytes(source)
                self._enter(self.made, key, self._composed_identity(source), source.parameters(), size)

    def _enter(
        self,
        copies: dict[VariableKey, Hashable],
        key: VariableKey,
        identity: Hashable,
        parameters: Iterable[fx.Node],
        size: int,
    ) -> None:
        if size:
            copies[key] = identity
            names = dict.fromkeys(name for parameter in parameters for name in parameter_names(parameter))
            self.known[identity] = Copy(" · ".join(names), size)

    def _identity(self, node: fx.Node) -> Hashable:
        if node.op == "placeholder":
            return node
        if node not in self._identities:
            expression = Expression(node, [other for other in node.graph.nodes if other.op == "placeholder"])
            self._identities[node] = (expression.code, expression.leaves)
        return self._identities[node]

    def _composed_identity(self, source: ComposedSource) -> Hashable:
        stages = tuple(s.eps if isinstance(s, BatchNorm) else s.divides for s in source.stages)
        parameters = tuple(self._identity(parameter) for parameter in source.parameters())
        layout = (source.weight_axes, source.dimension, source.groups, source.bias_axes)
        return (parameters, tuple(type(stage) for stage in source.stages), stages, layout)

    def copies(self, placement: Placement, sites: Sequence[NormSite] | None = None) -> dict[Hashable, Copy]:
        """The copies that the rewrite makes of a placement: for all of its sites, or for some.

        The cut counts one copy for all the parts of a parameter. Here each set of parts that a reader wants is one.
        """
        supplies = supplies_of(placement, self._variables, sites)
        found = {self.made[key]: self.known[self.made[key]] for key in supplies.keys if key in self.made}
        for supply in supplies.made():
            copied = [axes for axes in supply.axes if (supply.operand, axes) in self.explicit]
            if copied:
                group = self.explicit[(supply.operand, copied[0])]
                found[(group, frozenset(copied))] = self.known[group]
        return found


def _composed_bytes(source: ComposedSource) -> int:
    """Bytes of the weight and the bias that a composed source puts in the place of its parameters."""
    weight = tensor_of(source.product[source.weight[0]])
    assert weight is not None  # its shape was read when the source was found
    size = local_bytes(weight)
    if source.bias is not None:
        shifts = any(isinstance(stage, BatchNorm) for stage in source.stages)
        if shifts or source.product[source.bias[0]] is not None:
            size += weight.shape[source.dimension] * source.groups * weight.element_size()
    return size


def _total(copies: Mapping[Hashable, Copy]) -> int:
    return sum(copy.bytes for copy in copies.values())


@dataclass(frozen=True)
class _Point:
    """A placement, what it saves, and what its copies amount to and take."""

    placement: Placement
    saved: int
    amount: int
    bytes: int


class _Search:
    """The search for the last corner that fits, and for what else does."""

    def __init__(
        self,
        limit: int,
        sites: Sequence[NormSite],
        variables: Mapping[VariableKey, Variable],
        assist: bool,
        costs: CostModel,
        ledger: _Ledger,
        unlimited: Placement,
    ) -> None:
        self._limit, self._sites, self._variables = limit, sites, variables
        self._assist, self._costs, self._ledger = assist, costs, ledger
        self._numbers = {identity: number for number, identity in enumerate(ledger.known)}
        sizes = [copy.bytes for copy in ledger.known.values()]
        # One unit is so little that all the copies' numbers together weigh less than one byte of traffic at any price.
        self._unit = (unlimited.saved.hint + 1) * (len(sizes) + 1) ** 2
        self._amounts = [size * self._unit + number for number, size in enumerate(sizes, 1)]

    def _point(self, rate: Fraction) -> _Point:
        amounts = [
            amount if copy.bytes <= self._limit else None
            for copy, amount in zip(self._ledger.known.values(), self._amounts, strict=True)
        ]
        explicit, made = (
            {key: self._numbers[identity] for key, identity in copies.items()}
            for copies in (self._ledger.explicit, self._ledger.made)
        )
        price = Price(explicit, made, amounts, rate)
        placement = place(self._sites, self._variables, self._assist, self._costs, price)
        chosen = {explicit[key] for key in placement.centered - placement.streams if key in explicit}
        chosen |= {made[key] for key in placement.streams if key in made}
        amount = sum(self._amounts[number] for number in chosen)
        return _Point(placement, placement.saved.hint, amount, _total(self._ledger.copies(placement)))

    def corner(self) -> tuple[_Point, _Point]:
        """The last corner that fits, and the one behind it; the same twice where nothing is beyond."""
        beyond = self._point(Fraction(0))
        if beyond.bytes <= self._limit:
            return beyond, beyond
        fits = self._point(Fraction(beyond.saved + 1))  # a price at which no copy is worth anything
        while True:
            rate = Fraction(beyond.saved - fits.saved, beyond.amount - fits.amount)
            if rate <= 0:
                return fits, beyond
            between = self._point(rate)
            above_the_chord = between.saved - rate * between.amount > fits.saved - rate * fits.amount
            if not above_the_chord or not fits.amount < between.amount < beyond.amount:
                return fits, beyond
            if between.bytes <= self._limit:
                fits = between
            else:
                beyond = between

    def proven(self, corner: _Point) -> int:
        """Bytes for which a corner is optimal: those the cut counted, where the rewrite makes more of them."""
        return min(corner.bytes, corner.amount // self._unit)

    def fill(self, placement: Placement, others: Sequence[Placement]) -> Placement:
        """Add what other placements do for single sites, as long as that fits and saves more."""
        cones = {}
        for other in others:
            for site in other.centered_for:
                cone = frozenset(reached(other, self._variables, [site]))
                cones[cone, other.streams & cone] = self._ledger.copies(other, [site])
        while True:
            best: tuple[Fraction, Placement] | None = None
            copies = self._ledger.copies(placement)
            for (centered, streams), needed in cones.items():
                if sum(copy.bytes for key, copy in needed.items() if key not in copies) > self._limit - _total(copies):
                    continue
                union = assemble(
                    self._sites,
                    self._variables,
                    self._costs,
                    placement.streams | streams,
                    placement.centered | centered,
                )
                size = _total(self._ledger.copies(union))
                gain = union.saved.hint - placement.saved.hint
                if gain <= 0 or size > self._limit or find_conflict(union.streams) is not None:
                    continue
                worth = Fraction(gain, max(size - _total(copies), 1))
                if best is None or worth > best[0]:
                    best = worth, union
            if best is None:
                return placement
            placement = best[1]


def _why(site: NormSite, ledger: _Ledger, unlimited: Placement, used: Mapping[Hashable, Copy], limit: int) -> str:
    """Why a site stays that folds without the budget, in words."""
    missing = [copy for key, copy in ledger.copies(unlimited, [site]).items() if key not in used]
    if not missing:
        return f"the norms it would share a centering with do not fit within lnfold.memory_budget ({amount(limit)})"
    largest = max(missing, key=lambda copy: copy.bytes)
    copies = f"a centered copy of '{largest.name}' ({amount(largest.bytes)}), which does"
    if len(missing) > 1:
        total = amount(sum(copy.bytes for copy in missing))
        copies = f"centered copies of {len(missing)} more weights ({total}, {amount(largest.bytes)} of it "
        copies += f"'{largest.name}'), which do"
    room = f"{amount(limit)}, {amount(_total(used))} of it used"
    return f"to fold it takes {copies} not fit within lnfold.memory_budget ({room})"


def amount(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size} bytes"
