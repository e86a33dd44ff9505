"""Does a race (``lnfold.select="measure"``) choose the fastest way there is, and never one below stock?

For every workload of the CPU suites (or of others, on a GPU), in several processes: the model is compiled with the
race, which starts from nothing in each process; then stock and every way that was raced are compiled by themselves, and
timed interleaved. The choice is one of them, and its time is that way's.

    python benchmarks/selection.py [--suite cpu narrow] [--only WORD ...] [--seconds 120] [--processes 3] [--dry-run]

Prints a table and writes ``benchmarks/results/selection.json`` and, with matplotlib (the extra ``plot``), a PNG beside
it. Exit code 1 where a choice is below 0.99 of the best way, or below stock beyond noise.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import recording
import torch
from one_process import SPEEDUPS_ARE, answer_task
from rich.console import Console
from rich.table import Table
from suite.decoding import decode_step
from suite.presentation import draw_choices
from suite.suites import ON_A_CPU, RACED, SUITES
from suite.workloads import Workload

import lncompile
from lncompile.comparisons.even_terms import compile_apart, settle
from lncompile.comparisons.machine import describe_machine
from lncompile.comparisons.processes import RepeatedTimings, orders, run_processes
from lncompile.comparisons.timing import PairedTimings, Ratio, measure
from lncompile.lowering import torch_private_caches, torch_private_dynamo
from lncompile.options import arms
from lncompile.selection.candidates import MODEL, STOCK
from lncompile.selection.kept import FOLDER_VARIABLE

#: What a choice has to reach of the best way's speed.
OF_THE_BEST = 0.99
CHOSEN, BEST = "the choice", "the best"


def workload_of(name: str, suite: str, dry: bool) -> Workload:
    """Return a workload by its name."""
    (found,) = (workload for workload in SUITES[suite] if workload.name == name)
    return found.dry() if dry else found


def carry_out(task: dict[str, Any]) -> dict[str, Any]:
    """Race one workload in this process, then time what was raced and what was chosen.

    Args:
        task: suite, workload, whether it is tiny, seconds, and whether the ways are compiled in the opposite order.
    """
    workload = workload_of(task["workload"], task["suite"], task["dry"])
    device = "cpu" if task["suite"] in ON_A_CPU or task["dry"] else "cuda"
    settle(device)
    model = workload.build(device)
    inputs, rewind = (
        decode_step(workload, model, device)
        if workload.task == "decode"
        else (workload.inputs(model, device), lambda: None)
    )
    compile = functools.partial(_compiled, model, inputs, rewind, workload.mode)
    by_a_race = {"lnfold.select": "measure"}
    with tempfile.TemporaryDirectory(prefix="lncompile-selection-") as folder:
        os.environ[FOLDER_VARIABLE] = folder
        selections = [
            found for report in lncompile.reports(compile("lnfold", by_a_race)) for found in report.selections
        ]
        if len(selections) != 1 or not selections[0].is_race:
            why = selections[0].reason if len(selections) == 1 else f"{len(selections)} graphs"
            return {"seconds": {}, "raced": False, "why": why}
        (selection,) = selections
        raced = [way for way in selection.raced if way.rounds]
        # The choice is compiled again, as by the next process: what is kept has to lead to it.
        again = compile("lnfold", by_a_race)
    taken = {found.chosen for report in lncompile.reports(again) for found in report.selections}
    if taken != {selection.chosen}:
        raise RuntimeError(f"the race chose '{selection.chosen}', and compiled again it was {sorted(taken)}")
    options = {way.name: {**way.options, "lnfold.select": "model"} for way in raced}
    ways: dict[str, Callable[..., Any]] = {}
    for name in reversed(options) if task["opposite"] else options:
        ways[name] = compile("inductor", {}) if name == STOCK else compile("lnfold", options[name])
    timings = measure(
        {name: _call(function, inputs) for name, function in ways.items()},
        seconds=task["seconds"],
        maximum_rounds=200,
        prepare=dict.fromkeys(ways, rewind),
    )
    return {
        "seconds": dict(timings.seconds),
        "raced": True,
        "choice": selection.chosen,
        "race_s": selection.seconds,
        "in_the_race": {way.name: [way.speedup, way.low, way.high, way.rounds] for way in raced},
    }


def _compiled(
    model: Any,
    inputs: dict[str, Any],
    rewind: Callable[[], None],
    mode: str | None,
    backend: str,
    options: dict[str, Any],
) -> Callable[..., Any]:
    function = compile_apart(model, backend=backend, **arms(mode, options)[backend])
    gc.collect()  # what earlier compilations left would be holes to fill
    with torch_private_dynamo.many_recompiles(), torch_private_caches.without_autograd_cache():
        rewind()
        function(**inputs)
    return function


def _call(function: Callable[..., Any], inputs: dict[str, Any]) -> Callable[[], Any]:
    return lambda: function(**inputs)


def judge(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say how the choices of several processes did.

    Args:
        results: of :func:`carry_out`.

    Returns:
        What is written for a workload. ``of_the_best`` compares, in each process, the way that its race chose with the
        way that is the best in the other processes. Picked by the same times, the best of equals would be one that
        chance has made look faster than it is.
    """
    unraced = [result["why"] for result in results if not result["raced"]]
    if unraced:
        return {"raced": False, "why": unraced[0]}
    names = [name for name in results[0]["seconds"] if all(name in result["seconds"] for result in results)]
    processes = [PairedTimings({name: tuple(result["seconds"][name]) for name in names}) for result in results]
    timings = RepeatedTimings(tuple(processes))
    judged = []
    for number, (result, process) in enumerate(zip(results, processes, strict=True)):
        others = [*processes[:number], *processes[number + 1 :]] or processes
        best = _best(names, others)
        of_this = {CHOSEN: result["choice"], BEST: best, STOCK: STOCK}
        judged.append(PairedTimings({role: process.seconds[way] for role, way in of_this.items()}))
    choices = RepeatedTimings(tuple(judged))
    over_best, over_stock = choices.speedup(CHOSEN, BEST), choices.speedup(CHOSEN, STOCK)
    return {
        "raced": True,
        "choices": [result["choice"] for result in results],
        "race_s": [result["race_s"] for result in results],
        "best": _best(names, processes),
        "of_the_best": vars(over_best),
        "over_stock": vars(over_stock),
        "speedups": {name: vars(timings.speedup(name, STOCK)) for name in names if name != STOCK},
        "in_the_race": [result["in_the_race"] for result in results],
        "passed": over_best.median >= OF_THE_BEST and over_stock.high >= 1.0,
        "timings": timings.to_dict(),
    }


def _best(names: Sequence[str], processes: Sequence[PairedTimings]) -> str:
    def speedup(name: str) -> float:
        return statistics.geometric_mean(process.median_ratio(name, STOCK) for process in processes)

    return max(names, key=speedup)


def _measured(workload: Workload, suite: str, chosen: argparse.Namespace) -> dict[str, Any]:
    tasks = [
        {
            "suite": suite,
            "workload": workload.name,
            "dry": chosen.dry_run,
            "seconds": chosen.seconds / chosen.processes,
            "threads": torch.get_num_threads(),
            "opposite": order[0] != "first",
        }
        for order in orders(["first", "second"], chosen.processes)
    ]
    return {"workload": workload.name, "suite": suite, **judge(run_processes(__file__, tasks))}


def main() -> int:
    """Run the benchmark as a command."""
    parser = argparse.ArgumentParser(description="Whether the race chooses well.")
    parser.add_argument("--suite", nargs="+", choices=sorted(SUITES), default=list(RACED))
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="those whose name holds one of these")
    parser.add_argument("--seconds", type=float, default=120.0, help="of timing for each workload, races not counted")
    parser.add_argument("--processes", type=int, default=3, help="for each workload (default: 3)")
    parser.add_argument("--output", type=Path, default=recording.RESULTS, help="folder of the JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny models; no number means anything")
    chosen = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    result: dict[str, Any] = {
        "benchmark": "selection",
        "measured": recording.now(),
        "commit": recording.commit(),
        "machine": describe_machine(),
        "dry_run": chosen.dry_run,
        "speedups_are": SPEEDUPS_ARE,
        "workloads": [],
    }
    on_a_gpu = not set(chosen.suite) <= set(ON_A_CPU)
    path = chosen.output / f"selection{'-gpu' if on_a_gpu else ''}{'-dry-run' if chosen.dry_run else ''}.json"
    for suite in chosen.suite:
        for workload in SUITES[suite]:
            if not chosen.only or any(word in workload.name for word in chosen.only):
                console.print(workload.name)
                result["workloads"].append(_measured(workload, suite, chosen))
                recording.write_to(path, result)
    _print(result["workloads"], console)
    if any(found["raced"] for found in result["workloads"]):
        try:
            draw_choices(result, path.with_suffix(".png"))
        except ImportError as error:
            console.print(f'no plot, matplotlib is missing (pip install "lncompile[plot]"): {error}', markup=False)
    console.print(f"written to {path}", soft_wrap=True)
    return 0 if chosen.dry_run or all(found.get("passed", True) for found in result["workloads"]) else 1


def _print(workloads: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title="what the race chose, times as fast as ...", box=None, pad_edge=False)
    for header in ("workload", "choices", "stock", "the model's way over stock", "the best way", "which is"):
        table.add_column(header)
    for found in workloads:
        if not found["raced"]:
            table.add_row(found["workload"], f"not raced: {found['why']}")
            continue
        model = found["speedups"].get(MODEL)
        table.add_row(
            found["workload"],
            ", ".join(found["choices"]),
            str(Ratio(**found["over_stock"])),
            "" if model is None else str(Ratio(**model)),
            str(Ratio(**found["of_the_best"])),
            found["best"],
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(0 if answer_task(carry_out) else main())
