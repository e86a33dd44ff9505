"""Running passes: one after the other, each timed, linted where that is asked for, and shown to whoever looks."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from lncompile.passes.decisions import PassTime
from lncompile.passes.pipeline.graph_text import graph_text
from lncompile.passes.pipeline.interface import C, Kind, NotMadeYet, Pass

#: Whether the graph is linted behind every pass that rewrites it (our tests), and not only when it is done.
lint_each = os.environ.get("LNCOMPILE_LINT_PASSES", "0") != "0"


@dataclass(frozen=True)
class Step:
    """A pass that has run, as those who look at the pipeline are shown it.

    Attributes:
        number: of the step, from 1 on.
        name: of the pass.
        kind: whether it decides or rewrites.
        description: what it does, in a line.
        seconds: how long it took.
        is_off: whether it was switched off.
        text: what it decided, in words; ``""`` where there is nothing to say.
        code: the graph behind it, as text; None where the pass has not changed it.
    """

    number: int
    name: str
    kind: Kind
    description: str
    seconds: float
    is_off: bool
    text: str
    code: str | None


class Observer(Protocol):
    """What looks at a graph on its way through the pipeline."""

    def begin(self, code: str, again: bool) -> None:
        """Look at a graph before its first pass.

        Args:
            code: the graph, as text.
            again: whether it was looked at before: passes run again, on a copy with fewer operators written out.
        """

    def after(self, step: Step) -> None:
        """Look at what a pass has done.

        Args:
            step: the pass, what it says, and the graph behind it.
        """


@dataclass
class Runner:
    """Runs the passes on one graph.

    Attributes:
        off: the passes that are switched off.
        observers: what looks at the graph between them.
        until: the name of the last pass that is to run; ``""`` for all.
        times: how long each pass took, in the order in which they first ran.

    Example:
        >>> runner = Runner()
        >>> known = Known(copy_graph_module(graph_module), example_inputs, Options())
        >>> runner.run(DECIDE, known)
        >>> known.sites
        (NormSite(...), ...)
    """

    off: Collection[str] = frozenset()
    observers: Sequence[Observer] = ()
    until: str = ""
    times: dict[str, PassTime] = field(default_factory=dict)
    is_stopped: bool = False
    _steps: int = 0
    _code: str = ""

    def begin(self, graph_module: fx.GraphModule) -> None:
        """Say that passes are about to run on a fresh copy of the graph."""
        if self.observers:
            self._code = graph_text(graph_module.graph)
        for observer in self.observers:
            observer.begin(self._code, self._steps > 0)

    def run(self, passes: Sequence[Pass[C]], context: C) -> None:
        """Run passes.

        Args:
            passes: in their order.
            context: what they share; it holds what each has made when this returns.

        Raises:
            NotMadeYet: where one reads what none before it has made.
            RuntimeError: of ``graph.lint()``, where one leaves a graph that is wrong.
        """
        for one in passes:
            if not self.is_stopped:
                self._run(one, context)
                self.is_stopped = one.name == self.until

    def _run(self, one: Pass[C], context: C) -> None:
        if missing := [name for name in one.after if name not in self.times]:
            raise NotMadeYet(f"pass '{one.name}' runs before '{missing[0]}'")
        started = time.perf_counter()
        instead: Any = one.instead if one.name in self.off else None
        made = (instead or one.run)(context)
        one.makes.make(context, made)
        seconds = time.perf_counter() - started
        before = self.times.get(one.name)
        self.times[one.name] = PassTime(one.name, seconds + (0.0 if before is None else before.seconds))
        if lint_each and one.kind is Kind.REWRITES:
            context.graph_module.graph.lint()
        self._steps += 1
        if self.observers:
            self._show(one, context, seconds, instead is not None)

    def _show(self, one: Pass[C], context: C, seconds: float, is_off: bool) -> None:
        text = "" if one.text is None or is_off else one.text(context)
        code = graph_text(context.graph_module.graph) if one.kind is Kind.REWRITES else self._code
        changed = code != self._code
        self._code = code
        step = Step(self._steps, one.name, one.kind, one.description, seconds, is_off, text, code if changed else None)
        for observer in self.observers:
            observer.after(step)
