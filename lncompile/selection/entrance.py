"""Where the backend comes in: what a race needs is imported when there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from lncompile.options import Options

if TYPE_CHECKING:
    from lncompile.pipeline import Prepared


def prepare_selected(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: dict[str, Any],
    prepare: Callable[[fx.GraphModule, Sequence[Any], Options, Mapping[str, Any]], Prepared],
) -> tuple[Prepared, dict[str, Any]]:
    """Make a graph ready for Inductor: as the model of costs has it, or as a race does (``lnfold.select``).

    Args:
        graph_module: the graph Dynamo captured; it is not changed.
        example_inputs: the value of each placeholder.
        options: our options.
        inductor: Inductor's configuration.
        prepare: decides and rewrites with given options (:func:`lncompile.pipeline.prepare`).

    Returns:
        The graph, with the selection in its report, and Inductor's configuration for it.
    """
    if options.select == "model":
        return prepare(graph_module, example_inputs, options, inductor), inductor
    from lncompile.selection.choose import prepare_fastest

    return prepare_fastest(graph_module, example_inputs, options, inductor, prepare)
