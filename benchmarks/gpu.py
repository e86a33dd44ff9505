"""Everything that one NVIDIA GPU is needed for, in one run of nine minutes, the most telling first.

1. The tests that need a GPU.
2. Decoding at batch 1 under CUDA graphs, with each lever by itself (``latency.py --suite decoding``).
3. Whether a race chooses well there (``selection.py --suite decoding``).
4. Prompts and encoders (``latency.py --suite gpu``).
5. Times of the norms' kernels, with GB/s (``norm_kernels.py --time``).

Each step writes its own results as it goes. A step that takes longer than its share is stopped, and the next begins.
What became of each step is in ``benchmarks/results/gpu-run.json``, written after each.

    python benchmarks/gpu.py [--minutes 9]
    python benchmarks/gpu.py --dry-run --output FOLDER     # tiny models on a CPU: shows that it works, times nothing
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recording
import torch

from lncompile.comparisons.machine import describe_machine

HERE = Path(__file__).parent
#: The goals that were decided on before anything was timed: at least so many times as fast as stock.
GOALS = {
    "sums for one row on by themselves in reduce-overhead": "lower end of the interval at least 1.02 on both decoders",
    "deferral likewise for prompts": "lower end of the interval at least 1.02",
    "decoding": "at least 1.15 times stock",
    "prompts and encoders": "at least 1.03 times stock, none below 0.995",
    "share of the norms' cost that is removed": "at least 0.6",
}


@dataclass(frozen=True)
class Step:
    """One part of the run.

    Attributes:
        name: in the results.
        share: of the time that the whole run may take.
        command: what is run, with Python; takes the folder of results and whether it is a dry run.
    """

    name: str
    share: float
    command: Callable[[Path, bool], list[str]]


def _script(name: str, *arguments: str) -> Callable[[Path, bool], list[str]]:
    def command(output: Path, dry: bool) -> list[str]:
        return [str(HERE / name), *arguments, "--output", str(output), *(["--dry-run"] if dry else [])]

    return command


def _kernels(output: Path, dry: bool) -> list[str]:
    sizes = ["--widths", "64", "--rows", "1"] if dry else ["--widths", "768", "2048", "8192", "--time"]
    return [str(HERE / "norm_kernels.py"), *sizes, "--output", str(output)]


def _tests(output: Path, dry: bool) -> list[str]:
    # A file that cannot be imported, for want of a package that no test of a GPU needs, does not keep the others back.
    return ["-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", str(HERE.parent / "tests")]


STEPS = (
    Step("tests", 0.10, _tests),
    Step("decoding", 0.36, _script("latency.py", "--suite", "decoding", "--minutes", "3")),
    Step("selection", 0.20, _script("selection.py", "--suite", "decoding", "--processes", "1", "--seconds", "6")),
    Step("prompts and encoders", 0.24, _script("latency.py", "--suite", "gpu", "--minutes", "2", "--no-peers")),
    Step("kernels", 0.10, _kernels),
)


def run(steps: Sequence[Step], seconds: float, output: Path, dry: bool) -> dict[str, Any]:
    """Run step after step.

    Args:
        steps: the most telling first.
        seconds: for all of them. What a step does not use is left for those behind it.
        output: folder of the results.
        dry: whether tiny models run on a CPU.

    Returns:
        What became of each, ready for JSON.
    """
    started = time.perf_counter()
    left = 1.0
    found: dict[str, Any] = {
        "benchmark": "gpu",
        "measured": recording.now(),
        "commit": recording.commit(),
        "machine": describe_machine("cpu" if dry else "cuda"),
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers")},
        "dry_run": dry,
        "goals": GOALS,
        "steps": [],
    }
    for step in steps:
        remaining = seconds - (time.perf_counter() - started)
        limit = remaining * step.share / left
        left -= step.share
        print(f"--- {step.name}: {limit:.0f} s at most", flush=True)
        begun = time.perf_counter()
        code = run_at_most(limit, [sys.executable, *step.command(output, dry)])
        if code is None:
            outcome = "stopped: it took longer than its share"
        else:
            # pytest says 5 where every test was left out, as on a machine without a GPU.
            outcome = "done" if code in (0, 5) else f"ended with exit code {code}"
        taken = time.perf_counter() - begun
        found["steps"].append({"step": step.name, "outcome": outcome, "seconds": taken})
        recording.write_to(output / f"gpu-run{'-dry-run' if dry else ''}.json", found)
        print(f"--- {step.name}: {outcome}, {taken:.0f} s", flush=True)
    return found


def run_at_most(seconds: float, command: Sequence[str]) -> int | None:
    """Run a command, and stop it and all processes that it has started when its time is over.

    Args:
        seconds: its time.
        command: the command.

    Returns:
        The exit code; None where it was stopped.
    """
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except BaseException as error:
        # What a benchmark has started would go on, beside what comes next.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    return str(importlib.import_module(name).__version__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as a command.

    Returns:
        0, 1 where a step did not end well, or 2 without a GPU.
    """
    parser = argparse.ArgumentParser(description="Everything that one NVIDIA GPU is needed for.")
    parser.add_argument("--minutes", type=float, help="for everything (default: 9; 60 of a dry run)")
    parser.add_argument("--output", type=Path, default=recording.RESULTS, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on a CPU; no number means anything")
    chosen = parser.parse_args(arguments)
    if not chosen.dry_run and not torch.cuda.is_available():
        print("error: this needs an NVIDIA GPU; --dry-run does not", file=sys.stderr)
        return 2
    minutes = chosen.minutes or (60.0 if chosen.dry_run else 9.0)
    found = run(STEPS, 60 * minutes, chosen.output, chosen.dry_run)
    return 0 if all(step["outcome"] == "done" for step in found["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
