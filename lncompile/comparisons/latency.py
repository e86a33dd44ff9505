"""Latency of a model run eagerly, by stock Inductor and by lnfold, with words for what the measurement can tell."""

from __future__ import annotations

import functools
import gc
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lncompile.comparisons.even_terms import compile_apart, settle
from lncompile.comparisons.machine import describe_machine
from lncompile.comparisons.no_norm import no_norm, with_small_weights
from lncompile.comparisons.processes import RepeatedTimings, orders, run_processes
from lncompile.comparisons.timing import PairedTimings, Ratio
from lncompile.lowering import torch_private_caches, torch_private_dynamo
from lncompile.options import arms
from lncompile.progress import Say

#: The candidates: the model as it is, stock torch.compile, lnfold, and stock without any norm, which is the limit.
EAGER, BASELINE, CANDIDATE, LIMIT = "eager", "inductor", "lnfold", "no norms"
#: How many processes measure by default: an even number, half of which compile in the opposite order.
PROCESSES = 4


@dataclass(frozen=True)
class Latency:
    """Seconds a call of each candidate, interleaved, in one process or in several. ``print`` shows a table.

    Attributes:
        timings: every call.
        machine: what it ran on, and how busy that was before the measurement began.
        left_out: candidates without a number, and why.
    """

    timings: RepeatedTimings
    machine: Mapping[str, Any]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def speedup(self) -> Ratio:
        """Of lnfold over stock torch.compile, with a 95% interval."""
        return self.timings.speedup(CANDIDATE, BASELINE)

    @property
    def limit(self) -> Ratio | None:
        """Of the model without norms over stock torch.compile, which nothing can exceed; None if unknown."""
        return self.timings.speedup(LIMIT, BASELINE) if LIMIT in self.timings.names else None

    def verdict(self) -> str:
        """Say in a few words what the interval allows to say."""
        if self.speedup.low > 1:
            return "faster"
        if self.speedup.high < 1:
            return "slower"
        return "the interval contains 1: no measurable difference"

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
            f"one call takes {1e3 * self.timings.median(CANDIDATE):.3g} ms, with stock torch.compile "
            f"{1e3 * self.timings.median(BASELINE):.3g} ms: a speed-up of {self.speedup}, "
            f"{self.verdict()}{self.caveat()}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return medians, all samples in seconds, and speed-ups, ready for JSON."""
        return {
            "sentence": self.sentence(),
            "timing": self.timings.to_dict(),
            "median_s": {name: self.timings.median(name) for name in self.timings.names},
            "speedup_over_inductor": {
                name: vars(self.timings.speedup(name, BASELINE)) for name in self.timings.names if name != BASELINE
            },
            "left_out": dict(self.left_out),
        }

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=80).print(self)
        return buffer.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: Any) -> Iterable[Any]:
        """How rich prints it."""
        table = Table(box=None, pad_edge=False)
        for header in ("", "median ms", "speed-up over inductor [95% interval]"):
            table.add_column(header)
        for name in self.timings.names:
            ratio = "1" if name == BASELINE else str(self.timings.speedup(name, BASELINE))
            table.add_row(name, f"{1e3 * self.timings.median(name):.3f}", ratio)
        yield table
        for name, why in self.left_out.items():
            yield Text(f"{name}: not measured, {why}")
        count = len(self.timings.processes)
        where = f"{self.machine['threads']} CPU threads" if self.machine["device_type"] == "cpu" else "a GPU"
        yield Text(
            f"{self.timings.rounds} rounds of interleaved calls in {count} process{'' if count == 1 else 'es'} on "
            f"{where}: {self.machine['device']}",
            style="dim",
        )


@dataclass(frozen=True)
class Candidates:
    """What is to be timed.

    Attributes:
        calls: by name, in the order in which they were compiled.
        left_out: those that could not be compiled, and why.
    """

    calls: Mapping[str, Callable[[], Any]]
    left_out: Mapping[str, str]


def compile_candidates(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Sequence[str],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Candidates:
    """Compile and call each candidate once, on even terms.

    Args:
        model: not compiled yet.
        args: what it is called with, by position.
        kwargs: what it is called with, by name.
        names: of the candidates, in the order in which they are to be compiled.
        mode: of ``torch.compile``.
        options: of ``torch.compile``, ours included.
        device: what they run on.

    Returns:
        The candidates. The limit is left out, with its reason, where norms cannot be taken out of the graph.
    """
    settle(device)
    given = arms(mode, options)
    calls: dict[str, Callable[[], Any]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        function = model
        if name in given:
            function = compile_apart(model, backend=name, **given[name])
        elif name == LIMIT:
            if not isinstance(model, nn.Module):
                left_out[name] = "what is compiled is not a module, whose weights could be scaled down"
                continue
            function = compile_apart(with_small_weights(model), backend=no_norm(mode, given[BASELINE].get("options")))
        if function is not model:
            gc.collect()  # what earlier compilations left would be holes to fill
        call = functools.partial(function, *args, **kwargs)
        try:
            with torch_private_dynamo.many_recompiles(), torch_private_caches.without_autograd_cache():
                call()
        except Exception as error:
            if name != LIMIT:
                raise
            left_out[name] = _why(error)
            continue
        calls[name] = call
    return Candidates(calls, left_out)


def _why(error: Exception) -> str:
    """A reason in one line; Dynamo wraps what a backend raises."""
    inner = getattr(error, "inner_exception", None) or error
    lines = str(inner).strip().splitlines()
    return lines[0] if isinstance(inner, NotImplementedError) and lines else f"{type(inner).__name__}: {lines[:1]}"


def compare_in_processes(
    name: str,
    loading: Mapping[str, Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    limit: bool = False,
    seconds: float = 10.0,
    processes: int = PROCESSES,
    machine: Mapping[str, Any] | None = None,
    progress: Say | None = None,
) -> Latency:
    """Measure a model that can be named in several processes, half of which compile in the opposite order.

    Args:
        name: as for :func:`lncompile.models.loading.load_model`.
        loading: keyword arguments for it, a dtype by its name.
        mode: of ``torch.compile``.
        options: of ``torch.compile``, ours included.
        limit: whether to measure the model without its norms as well.
        seconds: how long to measure, over all processes, compilation and warm-up not counted.
        processes: how many.
        machine: :func:`~lncompile.comparisons.machine.describe_machine` as it was before other work began; by
            default as it is now.
        progress: called before each process.

    Returns:
        The timings, with intervals over processes.

    Raises:
        ProcessError: if one ends without a result.

    Example:
        >>> print(compare_in_processes("gpt2", {"batch": 1, "length": 64}).sentence())
    """
    say = progress or (lambda words, share=None: None)
    machine = machine or describe_machine(loading.get("device") or "cpu")
    names = (BASELINE, CANDIDATE, *((LIMIT,) if limit else ()))
    tasks = [
        {
            "model": name,
            "loading": dict(loading),
            "mode": mode,
            "options": dict(options or {}),
            # Eager compiles nothing, so it has no place in the order.
            "candidates": [EAGER, *order],
            "seconds": seconds / processes,
            "threads": torch.get_num_threads(),
        }
        for order in orders(names, processes)
    ]
    results = run_processes(
        "lncompile.comparisons.latency_process",
        tasks,
        lambda number: say(f"process {number + 1} of {processes}", number / processes),
    )
    say("measured", 1.0)
    timings = RepeatedTimings(
        tuple(PairedTimings({key: tuple(value) for key, value in result["seconds"].items()}) for result in results)
    )
    left_out = {key: why for result in results for key, why in result["left_out"].items()}
    return Latency(timings, machine, left_out)
