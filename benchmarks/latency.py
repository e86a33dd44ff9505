"""How fast are whole models with lnfold, next to stock torch.compile, to the same models without norms, and to eager?

Every workload is a real model's shapes with random weights. Its candidates run interleaved, in several processes, half
of which compile them in the opposite order; intervals are over processes. The share of the norms' cost that is removed
is (T_inductor - T_lnfold) / (T_inductor - T_no_norm): 1 is as fast as a model without any norm.

    python benchmarks/latency.py --suite cpu|narrow|cpu-decoding|decoding|gpu|all [--minutes 10] [--only NAME ...]
    python benchmarks/latency.py --suite cpu --dry-run     # tiny models: shows that it works, times nothing

Prints tables and writes ``benchmarks/results/latency-<suite>.json`` and, with matplotlib (the extra ``plot``), a PNG
beside it, after every workload anew. What does not fit into the minutes is listed as not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recording
import torch
from one_process import answer_task
from rich.console import Console
from suite.candidates import FOR_ONE_ROW, FOR_ONE_ROW_ON_A_CPU, MEASURED, PEERS, RECIPES, Recipe
from suite.measurement import Settings, measure_workload
from suite.presentation import draw, print_tables, summarise_run
from suite.repeated import carry_out, measure_in_processes
from suite.suites import ON_A_CPU, RACED, SUITES
from suite.workloads import Workload

from lncompile.comparisons.machine import describe_machine

log = logging.getLogger("lncompile.benchmarks")

#: What each suite takes at most, unless asked otherwise.
MINUTES = {"cpu": 10.0, "narrow": 90.0, "cpu-decoding": 60.0, "decoding": 3.0, "gpu": 8.0, "all": 120.0}
SECONDS = {"cpu": 20.0, "narrow": 20.0, "cpu-decoding": 20.0, "decoding": 6.0, "gpu": 6.0, "all": 20.0}
PROCESSES = {"cpu": 4, "narrow": 4, "cpu-decoding": 4, "decoding": 2, "gpu": 3, "all": 3}


class Budget:
    """Says which workloads still fit into the time.

    Args:
        minutes: for all of them, model building and compiling included.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.perf_counter() + 60 * minutes
        self._started = 0.0
        self._cost = 0.0  # the most seconds that one layer of one candidate has taken, timing aside

    def fits(self, workload: Workload, candidates: int, seconds: float) -> bool:
        """Whether a workload fits, by what those before it took; the first always does."""
        expected = seconds + self._cost * workload.depth * candidates
        self._started = time.perf_counter()
        return self._cost == 0.0 or self._started + expected <= self._end

    def spent(self, workload: Workload, candidates: int, seconds: float) -> None:
        """Learn from a workload that was run."""
        taken = time.perf_counter() - self._started - seconds
        self._cost = max(self._cost, taken / (workload.depth * candidates))


def choose(suite: str, only: Sequence[str], layers: int | None, dry: bool) -> list[Workload]:
    """Return the workloads of a suite.

    Args:
        suite: its name.
        only: words; a workload is chosen whose name holds one of them. All without any.
        layers: of each model at most; None for the suite's own choice.
        dry: whether tiny models take their place.

    Raises:
        ValueError: if none is left.
    """
    chosen = [w for w in SUITES[suite] if not only or any(word in w.name for word in only)]
    if not chosen:
        names = ", ".join(workload.name for workload in SUITES[suite])
        raise ValueError(f"no workload of '{suite}' is called {' or '.join(only)}; there are {names}")
    if layers is not None:
        chosen = [workload.capped(layers) for workload in chosen]
    return [workload.dry() for workload in chosen] if dry else chosen


def run(
    workloads: Sequence[Workload],
    settings: Settings,
    minutes: float,
    write: Any,
    console: Console,
    with_peers: bool = True,
    suite: str = "cpu",
    processes: int = 1,
) -> dict[str, Any]:
    """Measure workload after workload.

    Args:
        workloads: the most telling first.
        settings: how to measure each.
        minutes: for all of them.
        write: called with the result after each workload, so that nothing is lost if a later one takes the process.
        console: where to say what goes on.
        with_peers: whether peers run where a workload asks for them.
        suite: of the workloads.
        processes: for each workload; with 1 it is measured in this one.

    Returns:
        Everything measured, ready for JSON.
    """
    result: dict[str, Any] = {
        "benchmark": "latency",
        "measured": recording.now(),
        "commit": recording.commit(),  # now: the tree may change while this takes its minutes
        "machine": describe_machine(settings.device),
        "versions": versions(),
        "dry_run": any(workload.tiny for workload in workloads),
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "stopwatch"},
        "speedups_are": "geometric means over processes of the medians of per-round ratios, with Student's 95% "
        "interval over processes (of one process the median, with a bootstrap interval over rounds); above 1 faster "
        "than inductor",
        "summary": {},
        "workloads": [],
        "not_measured": {},
        "failed": {},
    }
    budget = Budget(minutes)
    for number, workload in enumerate(workloads, 1):
        recipes: tuple[Recipe, ...] = RECIPES + (PEERS if workload.peers and with_peers else ())
        if suite in RACED:
            recipes += (MEASURED,)
        elif workload.task == "decode" and workload.batch == 1:
            recipes += FOR_ONE_ROW_ON_A_CPU if suite in ON_A_CPU else FOR_ONE_ROW
        if not budget.fits(workload, len(recipes), settings.seconds):
            result["not_measured"][workload.name] = f"it does not fit into {minutes:g} minutes"
            write(result)
            continue
        console.print(f"{number}/{len(workloads)}  {workload.name}", style="bold")
        try:

            def say(words: str) -> None:
                console.print(f"     {words} ...")

            if processes == 1:
                found = measure_workload(workload, recipes, settings, say)
            else:
                found = measure_in_processes(__file__, suite, workload, recipes, settings, processes, say)
            result["workloads"].append(found)
        except Exception as error:  # the others are worth measuring all the same
            log.exception("%s failed", workload.name)
            result["failed"][workload.name] = f"{type(error).__name__}: {error}"
        budget.spent(workload, len(recipes), settings.seconds)
        result["summary"] = summarise_run(result["workloads"])
        write(result)
    return result


def versions() -> dict[str, str]:
    """Return the versions of what has a part in the numbers."""
    found = {"torch": str(torch.__version__)}
    for name in ("transformers", "triton", "liger-kernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Latency of whole models, interleaved, in several processes.")
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu", help="which workloads (default: cpu)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="those whose name holds one of these")
    parser.add_argument(
        "--minutes",
        type=_positive,
        help=f"for everything (default: {', '.join(f'{k} {v:g}' for k, v in MINUTES.items())})",
    )
    parser.add_argument("--seconds", type=_positive, help="of timing for each workload (default: 20; gpu 6)")
    parser.add_argument(
        "--layers", type=_count, help="of each model at most (default: all; 6 of some in the gpu suite)"
    )
    parser.add_argument("--processes", type=_count, help="for each workload (default: 4; gpu and all 3)")
    parser.add_argument("--no-peers", action="store_true", help="only inductor, lnfold, no norm and eager")
    parser.add_argument("--threads", type=_count, help="CPU threads; one is steadier on a machine shared with others")
    parser.add_argument("--output", type=Path, default=recording.RESULTS, help="folder of JSON and PNG")
    parser.add_argument("--dry-run", action="store_true", help="tiny models and few rounds; no number means anything")
    parser.add_argument("--list", action="store_true", help="print the names of the workloads and end")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as a command.

    Args:
        arguments: of the command line; ``sys.argv``'s by default.

    Returns:
        0, or 1 where a workload failed, or 2 where it cannot be run like this.
    """
    chosen = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    device = "cpu" if chosen.suite in ON_A_CPU or chosen.dry_run else "cuda"
    try:
        workloads = choose(chosen.suite, chosen.only, chosen.layers, chosen.dry_run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.list:
        for workload in workloads:
            console.print(workload.name)
        return 0
    if device == "cuda" and not torch.cuda.is_available():
        print(f"error: the suite '{chosen.suite}' needs an NVIDIA GPU; --suite cpu does not", file=sys.stderr)
        return 2
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    settings = Settings(device, seconds=chosen.seconds or SECONDS[chosen.suite])
    if chosen.dry_run:
        settings = Settings(device, seconds=1e-3, minimum_rounds=5, empty_caches=False)
    path = chosen.output / f"latency-{chosen.suite}{'-dry-run' if chosen.dry_run else ''}.json"
    with torch.no_grad():
        result = run(
            workloads,
            settings,
            chosen.minutes or MINUTES[chosen.suite],
            lambda found: _write(found, path, console),
            console,
            not chosen.no_peers,
            chosen.suite,
            1 if chosen.dry_run else chosen.processes or PROCESSES[chosen.suite],
        )
    print_tables(result, console)
    console.print(f"written to {path}", soft_wrap=True)
    return 1 if result["failed"] else 0


def _write(result: dict[str, Any], path: Path, console: Console) -> None:
    recording.write_to(path, result)
    if not result["workloads"]:
        return
    try:
        draw(result, path.with_suffix(".png"))
    except ImportError as error:
        console.print(f'     no plot, matplotlib is missing (pip install "lncompile[plot]"): {error}', markup=False)


if __name__ == "__main__":
    sys.exit(0 if answer_task(carry_out) else main())
