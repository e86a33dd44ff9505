"""Latency of a model run eagerly, by stock Inductor and by lnfold, with words for what the measurement can tell."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lncompile.explanation import settings_of
from lncompile.lowering import torch_private
from lncompile.machine import describe_machine
from lncompile.options import arms
from lncompile.progress import Say
from lncompile.timing import PairedTimings, Ratio, measure


@dataclass(frozen=True)
class Latency:
    """Seconds a call of ``eager``, ``inductor`` and ``lnfold``, interleaved. ``print`` shows a table.

    Attributes:
        timings: every call.
        machine: what it ran on, and how busy that was before the measurement began.
    """

    timings: PairedTimings
    machine: Mapping[str, Any]

    @property
    def speedup(self) -> Ratio:
        """Of lnfold over stock torch.compile, with a 95% interval."""
        return self.timings.speedup("lnfold", "inductor")

    def verdict(self) -> str:
        """Say in a few words what the interval allows to say."""
        if self.speedup.low > 1:
            return "faster"
        if self.speedup.high < 1:
            return "slower"
        return "the interval holds 1: no difference this measurement can tell from noise"

    def caveat(self) -> str:
        """Say that the machine was busy, where it was; else ``""``."""
        # Two threads that wait for each other on taken cores take tens of milliseconds at each barrier: what is timed
        # then is the number of parallel loops, in an interval that can be narrow all the same.
        load, cores = self.machine["load_average"], os.cpu_count() or 1
        if load is None or load < 0.5 * cores:
            return ""
        return f", on a machine that was busy with other work (load {load:.1f} on {cores} cores): not to be relied on"

    def sentence(self) -> str:
        """Say in one sentence what was measured."""
        return (
            f"one call takes {1e3 * self.timings.median('lnfold'):.3g} ms, with stock torch.compile "
            f"{1e3 * self.timings.median('inductor'):.3g} ms: a speed-up of {self.speedup}, "
            f"{self.verdict()}{self.caveat()}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return medians, all samples in seconds, and speed-ups, ready for JSON."""
        return {
            "sentence": self.sentence(),
            "timing": self.timings.to_dict(),
            "speedup_over_inductor": {
                name: vars(self.timings.speedup(name, "inductor")) for name in ("eager", "lnfold")
            },
        }

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=120).print(self)
        return buffer.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: Any) -> Iterable[Any]:
        """How rich prints it."""
        table = Table(box=None, pad_edge=False)
        for header in ("", "median ms", "speed-up over inductor [95% interval]"):
            table.add_column(header)
        for name in self.timings.seconds:
            ratio = "1" if name == "inductor" else str(self.timings.speedup(name, "inductor"))
            table.add_row(name, f"{1e3 * self.timings.median(name):.3f}", ratio)
        yield table
        rounds = len(self.timings.seconds["lnfold"])
        where = f"{self.machine['threads']} CPU threads" if self.machine["device_type"] == "cpu" else "a GPU"
        yield Text(f"{rounds} rounds of interleaved calls on {where}: {self.machine['device']}", style="dim")


def compare_latency(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seconds: float = 10.0,
    device: torch.device | str = "cpu",
    machine: Mapping[str, Any] | None = None,
    progress: Say | None = None,
) -> Latency:
    """Measure eager, stock Inductor and lnfold in turn, call by call, under ``torch.no_grad()``.

    Args:
        model: a module or function; one compiled with lnfold is measured with its mode and options.
        args: what it is called with, by position.
        kwargs: what it is called with, by name.
        seconds: how long to measure, compilation and warm-up not counted.
        device: where the work happens; calls on CUDA are synchronised.
        machine: :func:`lncompile.machine.describe_machine` as it was before other work began; by default as it is now.
        progress: called before each compilation and after each round.

    Returns:
        The timings.

    Example:
        >>> print(compare_latency(model, (input_ids,), seconds=5.0).sentence())
    """
    say = progress or (lambda words, share=None: None)
    settings = settings_of(model) or {}
    model = torch_private.original_callable(model)
    machine = machine or describe_machine(device)
    calls: dict[str, Callable[[], Any]] = {"eager": functools.partial(model, *args, **(kwargs or {}))}
    with torch.no_grad():
        for backend, arguments in arms(settings.get("mode"), settings.get("options")).items():
            compiled = torch.compile(model, backend=backend, **arguments)
            calls[backend] = functools.partial(compiled, *args, **(kwargs or {}))
            say(f"torch.compile(backend={backend!r})")
            with torch_private.many_recompiles():
                calls[backend]()
        timings = measure(calls, seconds=seconds, device=device, progress=lambda share: say("measuring", share))
    return Latency(timings, machine)
