"""From a decision to a graph for Inductor: the second half of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lncompile.lowering import leave_rows_to_inductor
from lncompile.options import Options
from lncompile.passes.graph.expressions import Expression
from lncompile.passes.pipeline.analysis import Analysis
from lncompile.passes.pipeline.context import Rewriting
from lncompile.passes.pipeline.order import REWRITE
from lncompile.passes.pipeline.runner import Runner


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


def transform(analysis: Analysis, options: Options, runner: Runner | None = None) -> Transformed:
    """Carry the decisions of an analysis out, on the analysis's own copy of the graph.

    Args:
        analysis: its graph is changed in place.
        options: our options.
        runner: what runs the passes, where somebody looks at them; that of the analysis.
    """
    work = Rewriting(analysis, options)
    (runner or Runner(options.switched_off)).run(REWRITE, work)
    if options.persistent == "off":
        leave_rows_to_inductor(work.graph)
    work.graph.lint()
    work.graph_module.recompile()
    return Transformed(work.graph_module, tuple(work.expressions), tuple(work.rewritten.trained))
