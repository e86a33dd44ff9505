"""What happens when code of ours fails: it is logged, and the caller gets what stock torch gives.

Only what we do with a graph stands over this net. What the model, its input or the options do wrong is raised as ever.
"""

from __future__ import annotations

import logging
import os

from torch import fx

from lncompile.lowering import torch_private_dynamo
from lncompile.passes.decisions import Reason
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.reporting.report import FoldReport

log = logging.getLogger("lncompile")

#: Whether a failure of our own is logged and the graph left untouched (True), or raised (False; our tests).
enabled = os.environ.get("LNCOMPILE_SAFETY_NET", "1") != "0"


def log_failure(what_follows: str, error: Exception) -> str:
    """Log a failure of ours.

    Args:
        what_follows: who failed and what is done about it: ``"lncompile.fold failed and folds nothing"``.
        error: the failure.

    Returns:
        The failure in one line.
    """
    reason = f"{type(error).__name__}: {error}"
    log.warning("%s. Please report it: %s", what_follows, reason)
    log.debug("where it failed", exc_info=error)
    torch_private_dynamo.count("internal_errors")
    return reason


def report_untouched(graph_module: fx.GraphModule, reason: str) -> FoldReport:
    """Return the report of a graph that stays as it came, because of a failure of ours.

    Args:
        graph_module: the graph.
        reason: the failure in one line, see :func:`log_failure`.

    Returns:
        A report whose sites all say :attr:`lncompile.Reason.INTERNAL_ERROR`.
    """
    # Here, and not above: most processes do without.
    from lncompile.passes.norms.folded_before import gather_folded_norms
    from lncompile.passes.norms.sites import list_norms
    from lncompile.passes.verdicts.judge import left_alone

    try:
        graph = copy_graph_module(graph_module).graph
        gather_folded_norms(graph)
        sites = list_norms(graph)
    except Exception as second:  # the failure may be in finding sites itself; that one was logged already
        log.debug("no list of sites: %s", second)
        sites = ()
    return FoldReport(left_alone(sites, Reason.INTERNAL_ERROR, reason))
