"""Graph breaks, and the code that Dynamo makes to go on behind them: the private names of torch for that."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx


class Break(NamedTuple):
    """A graph break: Dynamo's reason, and the source line of the model at which the graph ends ("" and 0: unknown)."""

    reason: str
    file: str
    line: int


def graph_break_of(graph_module: fx.GraphModule) -> Break | None:
    """Return the graph break at which a graph that Dynamo handed out ends; None where it ends with its frame."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return None if reason is None or not reason.graph_break else _break(reason)


def watch_graph_breaks() -> Callable[[], list[Break]]:
    """Return a function that lists the graph breaks since now, those without a graph in front of them included."""
    from torch._dynamo.utils import graph_break_reasons

    before = len(graph_break_reasons)
    return lambda: [_break(reason) for reason in graph_break_reasons[before:]]


def _break(reason: Any) -> Break:
    """What Dynamo noted of a break. The innermost frame is the last one; of libraries it says little to a user."""
    own = [frame for frame in reason.user_stack if not _is_library(frame.filename)]
    frame = (own or reason.user_stack or [None])[-1]
    return Break(reason.reason, frame.filename if frame else "", (frame.lineno or 0) if frame else 0)


def _is_library(filename: str) -> bool:
    standard = filename.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in filename
    return standard or "/torch/nn/" in filename or "/torch/_" in filename


def original_code(code: Any) -> Any:
    """Return the code object of the user's that Dynamo made a continuation of; any other code as it is."""
    from torch._dynamo.resume_execution import ContinueExecutionCache

    made = ContinueExecutionCache.generated_code_metadata.get(code)
    return code if made is None else made.code
