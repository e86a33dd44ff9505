"""What passes share: what is known of a graph while it is decided, and what was put into it while it is rewritten."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import fx

from lncompile.options import Options
from lncompile.passes.decisions import Verdict
from lncompile.passes.graph.effects import Writes
from lncompile.passes.graph.expressions import Expression
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.norms.handwritten import Chains
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.pipeline.analysis import Analysis
from lncompile.passes.pipeline.interface import Made
from lncompile.passes.placement.budget import Budgeted
from lncompile.passes.placement.costs import CostModel
from lncompile.passes.placement.cut import Placement
from lncompile.passes.placement.variables import Variable, VariableKey
from lncompile.passes.rewrites.affine import Absorbed, Absorption, CenteredFor
from lncompile.passes.rewrites.center import Rewrite
from lncompile.passes.rewrites.deferral import Deferral
from lncompile.passes.rewrites.matrix_vector import MatrixVectors
from lncompile.passes.verdicts.obstacles import Named


@dataclass(frozen=True)
class Gradients:
    """What gradients ask of a graph.

    Attributes:
        parameter: a parameter whose gradient is wanted, by its name; None where the graph computes no gradients.
        refusal: why the graph is to stay as it is because of them, in words; ``""`` where it is not.
    """

    parameter: str | None
    refusal: str = ""

    @property
    def are_wanted(self) -> bool:
        """Whether the graph computes gradients of parameters."""
        return self.parameter is not None


@dataclass(frozen=True)
class Placed:
    """Where centering happens.

    Attributes:
        placement: what is centered where.
        budgeted: the same within a budget of memory, where there is one.
        centered: which parameters each product's result is centered by.
    """

    placement: Placement
    budgeted: Budgeted | None = None
    centered: CenteredFor = field(default_factory=dict)


@dataclass(frozen=True)
class OneRow:
    """Products of one row that become sums.

    Attributes:
        products: what is done.
        inside: of norms that go into such products, by their nodes, where they go, in words.
    """

    products: MatrixVectors
    inside: Mapping[fx.Node, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Deferred:
    """Scales that move behind products.

    Attributes:
        deferrals: what is done.
        words: for every folded norm, by its node, why or why not.
    """

    deferrals: tuple[Deferral, ...] = ()
    words: Mapping[fx.Node, str] = field(default_factory=dict)

    @property
    def absorptions(self) -> dict[fx.Node, Absorption]:
        """What they absorb of γ and β, by the norm's node."""
        return {deferral.site.node: deferral.absorption for deferral in self.deferrals}


@dataclass(frozen=True)
class AffineAbsorbed:
    """γ and β that go into the products behind a norm.

    Attributes:
        absorptions: what is done, those of deferred norms included.
        words: for every folded norm, by its node, why or why not.
    """

    absorptions: tuple[Absorption, ...] = ()
    words: Mapping[fx.Node, str] = field(default_factory=dict)


class Known:
    """What is known of a graph while it is decided: the copy that passes work on, and what each of them found.

    Args:
        graph_module: a copy of the graph, which may be changed.
        example_inputs: the value of each placeholder, real Parameters among them.
        options: our options.
        inductor: what differs from Inductor's own configuration.
        opened: the names of the operators that are to be written out.
        off: the passes that are switched off.
    """

    written_out: Made[Collection[str]] = Made()
    expanded: Made[Collection[str]] = Made()
    gathered: Made[int] = Made()
    writes: Made[Writes] = Made()
    gradients: Made[Gradients] = Made()
    facts: Made[GraphFacts] = Made()
    chains: Made[Chains] = Made()
    sites: Made[tuple[NormSite, ...]] = Made()
    variables: Made[dict[VariableKey, Variable]] = Made()
    placed: Made[Placed | None] = Made()
    one_row: Made[OneRow] = Made()
    deferred: Made[Deferred] = Made()
    absorbed: Made[AffineAbsorbed] = Made()
    obstacles: Made[Mapping[fx.Node, Named]] = Made()
    verdicts: Made[tuple[Verdict, ...]] = Made()

    def __init__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        inductor: Mapping[str, Any] = MappingProxyType({}),
        opened: Collection[str] = (),
        off: Collection[str] = (),
    ) -> None:
        self.graph_module = graph_module
        self.example_inputs, self.options, self.inductor = example_inputs, options, inductor
        self.opened, self.off = opened, off

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.graph_module.graph

    @property
    def costs(self) -> CostModel:
        """What is weighed."""
        return CostModel(training=self.gradients.are_wanted, weighs_weights=self.options.training == "auto")

    @property
    def folded(self) -> tuple[NormSite, ...]:
        """The sites that fold."""
        return () if self.placed is None else self.placed.placement.folded

    @property
    def matrix_vectors(self) -> MatrixVectors:
        """The products of one row that become sums, without those that absorb γ and β: one rewrite for each product."""
        absorbing = {c.operation.node for absorption in self.absorbed.absorptions for c in absorption.consumers}
        return self.one_row.products.without(absorbing)


class Rewriting:
    """A graph while it is rewritten, and what each pass put into it.

    Args:
        analysis: what was decided; its graph is changed.
        options: our options.
    """

    rewritten: Made[Rewrite] = Made()
    means_taken_out: Made[None] = Made()
    absorbed: Made[Absorbed] = Made()
    transposed: Made[Sequence[fx.Node]] = Made()
    expressions: Made[Sequence[Expression]] = Made()
    deferred: Made[None] = Made()
    sums: Made[None] = Made()
    lowered: Made[None] = Made()
    eager: Made[None] = Made()

    def __init__(self, analysis: Analysis, options: Options) -> None:
        self.analysis, self.options = analysis, options

    @property
    def graph_module(self) -> fx.GraphModule:
        """What is rewritten."""
        return self.analysis.graph_module

    @property
    def graph(self) -> fx.Graph:
        """The graph of it."""
        return self.graph_module.graph

    @property
    def matrix_vectors(self) -> MatrixVectors:
        """The products that become sums; none in a graph that stays as it is."""
        return MatrixVectors() if self.analysis.placement is None else self.analysis.matrix_vectors

    def calls(self, folded: bool) -> Iterator[NormSite]:
        """The sites that are calls of a norm still and fold, or do not: what is deferred or goes into sums is none."""
        placement = self.analysis.placement
        gone = self.matrix_vectors.norms | {deferral.site.node for deferral in self.analysis.deferrals}
        fold = set() if placement is None else {site.node for site in placement.folded}
        for site in self.analysis.sites:
            folds = site.folded_before or site.node in fold
            if site.handwritten is None and site.node not in gone and folds == folded:
                yield site
