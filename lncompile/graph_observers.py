"""Who looks at graphs on their way through the pipeline: the log, torch's structured trace, and whoever asks.

``TORCH_LOGS="+lncompile"`` (or the logger ``lncompile`` at level debug) prints the graph after each pass that changed
it, and what the passes that decide have decided. ``TORCH_TRACE=DIR`` has the same written where tlparse shows it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from lncompile import safety_net
from lncompile.lowering import torch_private_logs
from lncompile.passes.pipeline.runner import Observer, Step

log = logging.getLogger("lncompile")
torch_private_logs.register_log("lncompile", "lncompile")

_watching: ContextVar[tuple[Observer, ...]] = ContextVar("_watching", default=())


@contextlib.contextmanager
def watched_by(observer: Observer) -> Iterator[None]:
    """Have an observer look at every graph that goes through the pipeline in this thread.

    Args:
        observer: what looks.

    Example:
        >>> with watched_by(GraphDirectory(Path("graphs"))):
        ...     lncompile.explain(model, input_ids)
    """
    token = _watching.set((*_watching.get(), observer))
    try:
        yield
    finally:
        _watching.reset(token)


def observers() -> Sequence[Observer]:
    """Return those who look at the graph that is about to go through the pipeline; usually there are none."""
    looking: list[Observer] = list(_watching.get())
    if log.isEnabledFor(logging.DEBUG):
        looking.append(_Guarded(GraphLog()))
    if torch_private_logs.is_traced():
        looking.append(_Guarded(GraphTrace()))
    return looking


class GraphLog:
    """Writes graphs and decisions into the log, at level debug."""

    def begin(self, code: str, again: bool) -> None:
        """Log the graph as it was captured."""
        if again:
            log.debug("the passes that decide run again, with fewer operators written out")
        else:
            log.debug("graph as captured\n%s", code)

    def after(self, step: Step) -> None:
        """Log what a pass has done, if it did anything."""
        if step.code is not None:
            log.debug("graph after pass %s (%.1f ms)\n%s", step.name, 1e3 * step.seconds, step.code)
        elif step.text:
            log.debug("pass %s (%.1f ms)\n%s", step.name, 1e3 * step.seconds, step.text)
        else:
            log.debug("pass %s (%.1f ms)%s", step.name, 1e3 * step.seconds, " is off" if step.is_off else "")


class GraphTrace:
    """Writes them into torch's structured trace, as artifacts ``lnfold_03_center``."""

    def begin(self, code: str, again: bool) -> None:
        """Write the graph as it was captured."""
        if not again:
            torch_private_logs.trace_text("lnfold_00_captured", lambda: code)

    def after(self, step: Step) -> None:
        """Write what a pass has done, if it changed the graph or says something."""
        text = step.code if step.code is not None else step.text
        if text:
            torch_private_logs.trace_text(f"lnfold_{step.number:02}_{step.name}", lambda: text)


class _Guarded:
    """An observer whose failure changes nothing of what is compiled."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def begin(self, code: str, again: bool) -> None:
        with _net():
            self._observer.begin(code, again)

    def after(self, step: Step) -> None:
        with _net():
            self._observer.after(step)


@contextlib.contextmanager
def _net() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not safety_net.enabled:
            raise
        safety_net.log_failure("lnfold cannot show a graph, and goes on", error)
