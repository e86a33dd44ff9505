"""How often does `lncompile.ABTest` see a difference that is not there, and how soon one that is?

Simulated traffic (`tests/support/traffic.py`), two kinds: *steady*, with heavy tails, and *drifting*, with
autocorrelated load, bursts and a changing mix of shapes. Every run is one test of 5,000 requests that is looked at
after every request and ends at the first look that tells the arms apart. Welch's t-test on the same requests, looked at
as often, is what one does without thinking.

    python benchmarks/abtest.py [--runs 1000]

Prints a table and writes ``benchmarks/results/abtest.json``. Needs the test extras (``make test`` installs them).
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy
import recording
from rich.console import Console
from rich.table import Table

from lncompile.comparisons.machine import describe_machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

ALPHA = 0.05
REQUESTS = 5000
RATIOS = (0.5, 0.2, 0.05)
SPEEDUPS = (1.05, 1.1)


def simulate(kind: str, ratio: float, speedup: float, runs: int) -> dict[str, Any]:
    """Run one setting.

    Args:
        kind: of traffic.
        ratio: the candidate's share of requests.
        speedup: of the candidate; 1 for equal arms.
        runs: how many tests.

    Returns:
        The share of tests that told the arms apart, by the package's test and, for equal arms and a fair coin, by
        Welch's; and after how many requests half, and nine in ten, of all tests had (None: not within the run).
    """
    traffic: Any = importlib.import_module("traffic")
    found, welch = [], []
    for seed in range(runs):
        random = numpy.random.default_rng([seed, *kind.encode()])
        stream = traffic.KINDS[kind](random, REQUESTS)
        log_seconds, candidate = traffic.with_arms(random, stream, ratio, speedup)
        found.append(traffic.sequential_test(stream, log_seconds, candidate, ratio).first_rejection(ALPHA))
        if speedup == 1.0 and ratio == 0.5:
            welch.append(traffic.welch_rejects(log_seconds, candidate, ALPHA))
    half, most = (float(value) for value in numpy.quantile(found, [0.5, 0.9], method="inverted_cdf"))
    return {
        "traffic": kind,
        "ratio": ratio,
        "speedup": speedup,
        "runs": runs,
        "told_apart": float(numpy.mean(numpy.isfinite(found))),
        "told_apart_by_repeated_welch": float(numpy.mean(welch)) if welch else None,
        "requests_half": half if math.isfinite(half) else None,
        "requests_nine_in_ten": most if math.isfinite(most) else None,
    }


def main() -> int:
    """Run the benchmark as a command."""
    traffic: Any = importlib.import_module("traffic")
    parser = argparse.ArgumentParser(description="False positives and power of lncompile.ABTest.")
    parser.add_argument("--runs", type=int, default=1000, help="tests in each setting (default: 1000)")
    runs = parser.parse_args().runs
    commit = recording.commit()
    rows = [
        simulate(kind, ratio, speedup, runs)
        for kind in traffic.KINDS
        for ratio in RATIOS
        for speedup in (1.0, *SPEEDUPS)
    ]
    table = Table(
        title=f"{runs} tests of {REQUESTS} requests, a look after each, α = {ALPHA}", box=None, pad_edge=False
    )
    for header in ("traffic", "ratio", "speed-up", "told apart", "by Welch", "half within", "nine in ten within"):
        table.add_column(header)
    for row in rows:
        welch = row["told_apart_by_repeated_welch"]
        table.add_row(
            row["traffic"],
            f"{row['ratio']:g}",
            f"{row['speedup']:g}",
            f"{row['told_apart']:.1%}",
            "" if welch is None else f"{welch:.1%}",
            *(
                "-" if value is None else f"{value:.0f}"
                for value in (row["requests_half"], row["requests_nine_in_ten"])
            ),
        )
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    result = {
        "machine": describe_machine(),
        "commit": commit,
        "measured": recording.now(),
        "alpha": ALPHA,
        "requests": REQUESTS,
        "rows": rows,
    }
    console.print(f"written to {recording.write('abtest', result)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
