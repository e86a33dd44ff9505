"""Cases of a benchmark in several processes: what a script needs to be one of them, and what puts them together."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lncompile.comparisons.even_terms import compile_apart, settle
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
