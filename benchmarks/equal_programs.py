"""How often do the project's own comparisons find a winner between equal programs?

A model without any norm is compiled twice: by stock and by stock, and by stock and by lnfold, which has nothing to do
there; in both orders; with sizes that make a call take about 0.1, 1 and 10 ms. Each pair is compared by ``ABTest`` and
by ``timing.measure``. Pairs of all kinds come in each process, which compiles each pair anew, in an order of its own.
The interval over processes is what ``lncompile bench`` prints.

The pairs are compiled on even terms (``lncompile.comparisons.even_terms``). Beside them ``ABTest(model)`` compiles by
itself, as a server has it do. There arms have the settled process, and where torch can a list of their own. They are
not twins of the model, so that what ``forward`` assigns is shared, and AOTAutograd's cache is used as the process has
it. Each test draws which arm the first request goes to: that arm is compiled first.

    python benchmarks/equal_programs.py [--processes 14]

Writes ``benchmarks/results/equal_programs.json``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import recording
import torch
from one_process import answer_task
from torch import Tensor, nn

from lncompile import ABTest
from lncompile.abtest.arms import compiled_arms
from lncompile.comparisons.even_terms import compile_apart, settle
from lncompile.comparisons.machine import describe_machine
from lncompile.comparisons.processes import RepeatedTimings, run_processes
from lncompile.comparisons.timing import PairedTimings, Ratio, measure
from lncompile.lowering import torch_private_caches

#: Width and rows that make a call of six layers take about so long, in milliseconds, on one thread.
SIZES = {"0.1 ms": (144, 8), "1 ms": (512, 32), "10 ms": (768, 96)}
#: Baseline and candidate.
PAIRS = {"stock, stock": ("inductor", "inductor"), "stock, lnfold": ("inductor", "lnfold")}
ORDERS = ("baseline first", "candidate first")
#: The pair that ``ABTest(model)`` compiles by itself, at its first requests, in the order in which they come.
BY_ITSELF, AS_REQUESTED = "ABTest(model)", "as requested"
#: How long each comparison of a pair takes, in seconds, by size.
SECONDS = {"0.1 ms": 0.8, "1 ms": 1.2, "10 ms": 2.4}


class Layers(nn.Module):
    """Linear layers with GELU between them, and no norm.

    Args:
        width: of each layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, width]`` to the same."""
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return x


def compile_pair(model: nn.Module, value: Tensor, pair: str, order: str) -> dict[str, Callable[..., Any]]:
    """Compile both programs of a pair, baseline and candidate.

    Args:
        model: not compiled yet.
        value: what it is called with.
        pair: one of ``PAIRS``, or ``BY_ITSELF``, whose programs the first requests compile.
        order: one of ``ORDERS``, or ``AS_REQUESTED``.
    """
    if pair == BY_ITSELF:
        return compiled_arms(model, None, None, {})
    names = ("baseline", "candidate")
    backends = dict(zip(names, PAIRS[pair], strict=True))
    arms: dict[str, Callable[..., Any]] = {}
    for name in names if order == ORDERS[0] else reversed(names):
        arms[name] = compile_apart(model, backend=backends[name])
        with torch_private_caches.without_autograd_cache():
            arms[name](value)
    return {name: arms[name] for name in names}


def compare(size: str, pair: str, order: str) -> dict[str, Any]:
    """Compile a pair and compare it both ways.

    Args:
        size: one of ``SIZES``.
        pair: one of ``PAIRS``, or ``BY_ITSELF``.
        order: one of ``ORDERS``, or ``AS_REQUESTED``.

    Returns:
        What both comparisons say, ready for JSON.
    """
    width, rows = SIZES[size]
    model, value = Layers(width).eval(), torch.randn(rows, width)
    arms = compile_pair(model, value, pair, order)
    # A seed of its own: the arm that the first request goes to is compiled first.
    ab = ABTest(arms=arms, warmup=10, seed=random.getrandbits(32))
    while ab.verdict().requests < 1:
        ab(value)
    end = time.perf_counter() + SECONDS[size]
    decided = None
    while time.perf_counter() < end:
        ab(value)
        # Looked at after every batch of requests, as a server's page does.
        decided = decided or ab.verdict().winner
    baseline, candidate = (functools.partial(arm, value) for arm in arms.values())
    timings = measure({"baseline": baseline, "candidate": candidate}, seconds=SECONDS[size])
    verdict = ab.verdict()
    return {
        "size": size,
        "pair": pair,
        "order": order,
        "abtest": {
            "winner_at_any_look": decided,
            "speedup": verdict.speedup.to_dict(),
            "outcome": verdict.outcome.value,
            "requests": verdict.requests,
        },
        "median_s": timings.median("baseline"),
        "rounds": len(timings.seconds["baseline"]),
        "median_ratio": timings.median_ratio("candidate", "baseline"),
        "interval_over_rounds": vars(timings.speedup("candidate", "baseline")),
    }


def carry_out(task: dict[str, Any]) -> dict[str, Any]:
    """Compare a pair of every kind, in the order that the task gives."""
    settle()
    return {"tests": [compare(*kind) for kind in task["kinds"]]}


def over_processes(processes: Sequence[Sequence[dict[str, Any]]]) -> Ratio:
    """The speed-up over processes, each of which gives one number: the geometric mean of its tests' ratios.

    Args:
        processes: tests of one kind, by process.
    """
    ratios = [statistics.geometric_mean(test["median_ratio"] for test in process) for process in processes]
    timings = (PairedTimings({"baseline": (ratio,), "candidate": (1.0,)}) for ratio in ratios)
    return RepeatedTimings(tuple(timings)).speedup("candidate", "baseline")


def summarise(processes: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Count the winners, and make the interval over processes of each kind.

    Args:
        processes: the tests of each.
    """
    tests = [test for process in processes for test in process]
    winners = [test for test in tests if test["abtest"]["winner_at_any_look"] is not None]
    kinds = []
    for size, pair in itertools.product(SIZES, (*PAIRS, BY_ITSELF)):
        orders = sorted({test["order"] for test in tests if test["pair"] == pair})
        ours = [[test for test in process if (test["size"], test["pair"]) == (size, pair)] for process in processes]
        flat = [test for process in ours for test in process]
        kinds.append(
            {
                "size": size,
                "pair": pair,
                "tests": len(flat),
                "median_s": statistics.median(test["median_s"] for test in flat),
                "abtest_winners": sum(test["abtest"]["winner_at_any_look"] is not None for test in flat),
                "speedup_over_processes": vars(over_processes(ours)),
                "speedup_over_processes_by_order": {
                    order: vars(over_processes([[t for t in process if t["order"] == order] for process in ours]))
                    for order in orders
                },
            }
        )
    return {"tests": len(tests), "abtest_winners": len(winners), "kinds": kinds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as a command."""
    parser = argparse.ArgumentParser(description="How often do comparisons find a winner between equal programs?")
    parser.add_argument(
        "--processes",
        type=int,
        choices=range(2, 101),
        default=14,
        metavar="N",
        help="each makes 15 tests (default: 14)",
    )
    parser.add_argument("--output", type=Path, default=recording.RESULTS / "equal_programs.json")
    chosen = parser.parse_args(arguments)
    machine = describe_machine()
    kinds = [*itertools.product(SIZES, PAIRS, ORDERS), *((size, BY_ITSELF, AS_REQUESTED) for size in SIZES)]
    tasks = []
    for number in range(chosen.processes):
        random.Random(number).shuffle(kinds)
        tasks.append({"kinds": list(kinds), "threads": 1})
    started = time.perf_counter()
    results = run_processes(
        str(Path(__file__)), tasks, lambda number: print(f"process {number + 1} of {len(tasks)}", flush=True)
    )
    processes = [result["tests"] for result in results]
    found = {
        "benchmark": "equal_programs",
        "measured": recording.now(),
        "commit": recording.commit(),
        "machine": {**machine, "threads": 1},
        "seconds": time.perf_counter() - started,
        "load_average_after": describe_machine()["load_average"],
        **summarise(processes),
        "processes": processes,
    }
    path = recording.write_to(chosen.output, found)
    for kind in found["kinds"]:
        ratio = kind["speedup_over_processes"]
        print(
            f"{kind['size']:7} {kind['pair']:14} ABTest: {kind['abtest_winners']} winners in {kind['tests']} tests; "
            f"over processes {ratio['median']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]"
        )
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(0 if answer_task(carry_out) else main())
