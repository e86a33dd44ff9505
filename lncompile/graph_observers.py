"""Who looks at a graph on its way through the pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from lncompile.passes.pipeline.runner import Observer


def observers() -> Sequence[Observer]:
    """Return those who look at the graph that is about to be compiled."""
    return ()
