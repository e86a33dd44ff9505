"""One workload in several processes: half of them compile the candidates in the opposite order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lncompile.comparisons.processes import RepeatedTimings, orders, run_processes
from lncompile.comparisons.timing import PairedTimings
from suite.candidates import ALL_RECIPES, Recipe
from suite.measurement import Settings, measure_workload, summarise
from suite.suites import SUITES
from suite.workloads import Workload


def measure_in_processes(
    script: str,
    suite: str,
    workload: Workload,
    recipes: Sequence[Recipe],
    settings: Settings,
    processes: int,
    say: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """Measure a workload in several processes. Compile times are those of the first, which has empty caches.

    Args:
        script: hands the task to :func:`carry_out`.
        suite: the workload's.
        workload: what to run.
        recipes: the candidates.
        settings: how to measure; the seconds are those of all processes together.
        processes: how many.
        say: called before each.

    Returns:
        What ``measure_workload`` returns, with intervals over processes.

    Raises:
        ProcessError: if a process ends without a result.
    """
    shared = {key: value for key, value in dataclasses.asdict(settings).items() if key != "stopwatch"}
    tasks = [
        {
            "suite": suite,
            "workload": workload.name,
            "layers": workload.depth,
            "recipes": order,
            "settings": {
                **shared,
                "seconds": settings.seconds / processes,
                "empty_caches": settings.empty_caches and number == 0,
            },
            "threads": torch.get_num_threads(),
        }
        for number, order in enumerate(orders([recipe.name for recipe in recipes], processes))
    ]
    results = run_processes(script, tasks, lambda number: say(f"process {number + 1} of {processes}"))
    return combine(results)


def carry_out(task: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the workload of a task in this process.

    Args:
        task: as :func:`measure_in_processes` makes it.
    """
    (workload,) = (found for found in SUITES[task["suite"]] if found.name == task["workload"])
    recipes = [ALL_RECIPES[name] for name in task["recipes"]]
    return measure_workload(workload.capped(task["layers"]), recipes, Settings(**task["settings"]))


def combine(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the results of several processes together.

    Args:
        results: what ``measure_workload`` returned in each.
    """
    first = results[0]
    timings = RepeatedTimings(
        tuple(
            PairedTimings({name: tuple(found["samples_s"][0]) for name, found in result["candidates"].items()})
            for result in results
        )
    )
    facts = {name: first["candidates"][name] for name in timings.names}
    left_out = {name: why for result in results for name, why in result["left_out"].items()}
    return {
        **first,
        **summarise(timings, facts),
        "left_out": left_out,
        "load_average_after": results[-1]["load_average_after"],
    }
