"""The private torch names of its logs and of its structured trace, each with what it is for."""

from __future__ import annotations

from collections.abc import Callable


def register_log(alias: str, logger: str) -> None:
    """Let ``TORCH_LOGS="+alias"`` and ``torch._logging.set_logs`` set the level of a logger of ours.

    Args:
        alias: the name in ``TORCH_LOGS``.
        logger: the name of the logger.
    """
    from torch._logging import _internal

    _internal.register_log(alias, logger)


def is_traced() -> bool:
    """Whether torch writes a structured trace (``TORCH_TRACE``), which tlparse reads."""
    from torch._logging._internal import LazyTraceHandler, trace_log

    # It takes itself away when it finds that nobody asked for a trace.
    return any(isinstance(handler, LazyTraceHandler) for handler in trace_log.handlers)


def trace_text(name: str, payload: Callable[[], str]) -> None:
    """Write a text into torch's structured trace, where tlparse shows it beside the graph.

    Args:
        name: what it is called there.
        payload: makes the text, if it is wanted.
    """
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload)
