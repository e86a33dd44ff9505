"""What was decided for a graph: the value that goes from passes that decide to those that rewrite, and to reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from lncompile.passes.decisions import Stream, UnrecognisedDifference, Verdict
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.placement.budget import Budgeted
from lncompile.passes.placement.costs import CostModel
from lncompile.passes.placement.cut import Placement
from lncompile.passes.placement.variables import Variable, VariableKey
from lncompile.passes.rewrites.affine import Absorption
from lncompile.passes.rewrites.deferral import Deferral
from lncompile.passes.rewrites.matrix_vector import MatrixVectors


@dataclass(frozen=True)
class Analysis:
    """A copy of the graph with the decisions made for it.

    Attributes:
        graph_module: the copy.
        sites: its LayerNorms.
        verdicts: what became of each, those inside of operators that stay closed included.
        variables: its streams.
        placement: what is centered where; None where the graph is to stay untouched.
        costs: what was weighed.
        trained: parameter expressions whose gradient is wanted: they are centered in the graph, at every step.
        budgeted: the placement within a budget of memory, where there is one.
        streams: the streams as people draw them.
        absorptions: norms whose γ and β go into the linear layers that read them.
        deferrals: norms whose scale goes behind these layers.
        matrix_vectors: products of one row that become sums, and norms that go into them.
        differences: differences from a mean that are not recognised as norms.
        folded_without_gradients: how many sites would fold if no gradients were recorded, where some stay because they
            are, though the model is in evaluation mode; else None.
    """

    graph_module: fx.GraphModule
    sites: tuple[NormSite, ...]
    verdicts: tuple[Verdict, ...]
    variables: dict[VariableKey, Variable]
    placement: Placement | None
    costs: CostModel = field(default_factory=CostModel)
    trained: frozenset[fx.Node] = frozenset()
    budgeted: Budgeted | None = None
    streams: tuple[Stream, ...] = ()
    absorptions: tuple[Absorption, ...] = ()
    deferrals: tuple[Deferral, ...] = ()
    matrix_vectors: MatrixVectors = field(default_factory=MatrixVectors)
    differences: tuple[UnrecognisedDifference, ...] = ()
    folded_without_gradients: int | None = None
