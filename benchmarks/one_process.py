"""Cases of a benchmark in several processes: what a script needs to be one of them, and what puts them together."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import recording
import torch
from rich.console import Console

from lncompile.comparisons.even_terms import compile_apart, settle
from lncompile.comparisons.machine import describe_machine
from lncompile.comparisons.processes import RepeatedTimings, orders, run_processes
from lncompile.comparisons.timing import PairedTimings, measure
from lncompile.lowering import torch_private_caches, torch_private_dynamo

#: How many processes measure a case, half of which compile its candidates in the opposite order.
PROCESSES = 4
#: For the JSON.
SPEEDUPS_ARE = (
    "geometric means over processes of the medians of per-round ratios, with Student's 95% interval over processes; "
    "above 1 the first is faster"
)


def answer_task(carry_out: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
    """Carry out a task, where this script was started as one process of a measurement.

    Args:
        carry_out: takes the task and returns its result, both ready for JSON.

    Returns:
        Whether it was.
    """
    if len(sys.argv) != 3 or not sys.argv[1].endswith("task.json"):
        return False
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task.get("threads", torch.get_num_threads()))
    with torch.no_grad():
        Path(sys.argv[2]).write_text(json.dumps(carry_out(task)))
    return True


def compiled_in_order(
    model: Callable[..., Any],
    call: Callable[[Callable[..., Any]], Any],
    candidates: Mapping[str, Mapping[str, Any]],
    order: Sequence[str],
    device: str,
) -> dict[str, Callable[..., Any]]:
    """Compile candidates on even terms and call each once.

    Args:
        model: not compiled yet.
        call: calls what it is given.
        candidates: by name what ``torch.compile`` is given; empty for the model as it is.
        order: of names.
        device: what they run on.
    """
    settle(device)
    runs = {}
    for name in order:
        runs[name] = compile_apart(model, **candidates[name]) if candidates[name] else model
        gc.collect()  # what earlier compilations left would be holes to fill
        with torch_private_dynamo.many_recompiles(), torch_private_caches.without_autograd_cache():
            call(runs[name])
    return runs


def time_case(runs: Mapping[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, Any]:
    """Time what :func:`in_processes` collects."""
    return {"seconds": dict(measure(runs, seconds=seconds, device=device).seconds)}


def in_processes(
    script: str, case: Mapping[str, Any], names: Sequence[str], seconds: float, processes: int = PROCESSES
) -> tuple[RepeatedTimings, dict[str, Any]]:
    """Measure a case in several processes.

    Args:
        script: calls :func:`answer_task`.
        case: what is handed to it, ready for JSON, with ``order`` and ``seconds`` besides.
        names: of the candidates.
        seconds: of all processes together.
        processes: how many.

    Returns:
        The timings, and what the first process found besides.
    """
    tasks = [
        {**case, "order": order, "seconds": seconds / processes, "threads": torch.get_num_threads()}
        for order in orders(names, processes)
    ]
    results = run_processes(script, tasks)
    timings = tuple(
        PairedTimings({name: tuple(result["seconds"][name]) for name in sorted(names)}) for result in results
    )
    return RepeatedTimings(timings), {key: value for key, value in results[0].items() if key != "seconds"}


def measured_case(
    script: str,
    case: Mapping[str, Any],
    names: Sequence[str],
    comparisons: Sequence[tuple[str, str]],
    seconds: float,
) -> tuple[RepeatedTimings, dict[str, Any], dict[str, Any]]:
    """Measure a case and put what every result says of one together.

    Args:
        script: as for :func:`in_processes`.
        case: likewise, with the ``device``.
        names: of the candidates.
        comparisons: what is compared with what: (candidate, baseline).
        seconds: of all processes together.

    Returns:
        The timings, what the first process found besides, and the case's part of the JSON.
    """
    timings, found = in_processes(script, case, names, seconds)
    return (
        timings,
        found,
        {
            "rounds": timings.rounds,
            "load_average_after": describe_machine(case["device"])["load_average"],
            "speedups": {f"{a} over {b}": vars(timings.speedup(a, b)) for a, b in comparisons},
            "timings": timings.to_dict(),
        },
    )


def run_on_devices(
    name: str,
    description: str,
    options: Mapping[str, Mapping[str, Any]],
    run: Callable[[str, argparse.Namespace, Console], dict[str, Any]],
) -> int:
    """Run a benchmark as a command: on the CPU and, where there is one, on a GPU; a result each.

    Args:
        name: of the benchmark, and of its results.
        description: for the help.
        options: of the command besides ``--threads``, as argparse takes them.
        run: measures on one device and prints; returns what it found, ready for JSON.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=description)
    for option, settings in options.items():
        parser.add_argument(option, **settings)
    parser.add_argument("--threads", type=int, help="CPU threads; one is steadier on a machine shared with others")
    chosen = parser.parse_args()
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    with torch.no_grad():
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            # Before it begins: the tree may change while this takes its minutes.
            head = {"benchmark": name, "machine": describe_machine(device), "commit": recording.commit()}
            cases = run(device, chosen, console)
            found = {**head, "measured": recording.now(), "speedups_are": SPEEDUPS_ARE, **cases}
            path = recording.write(f"{name}-{device}", found)
            console.print(f"written to {path}", soft_wrap=True)
    return 0
