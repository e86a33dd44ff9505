"""``make fuzz``: random programs through the backend for as long as wanted.

    python tests/support/fuzz.py --minutes 60 --jobs 4
    python tests/support/fuzz.py --seed 123 --graphs 1        # one program again

Every difference is shrunk, printed and written to a folder. The exit code is 1 if there was one.
"""

from __future__ import annotations

import os

# Before torch is imported, as in conftest.py. One thread: the tensors are tiny, and there are --jobs processes.
os.environ["LNCOMPILE_SAFETY_NET"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import functools
import itertools
import json
import multiprocessing
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

import torch
from fuzzing import COMPILERS, Outcome, Statistics, examine, examine_training
from places import ROOT
from random_modules import Program, random_program
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from shrinking import shrink

BATCH = 20
# Dynamo keeps something of every class it has seen: workers are replaced before that adds up.
BATCHES_PER_PROCESS = 100


MODES: dict[str, Callable[..., Outcome]] = {
    "inference": examine,
    "training": examine_training,
    "writes": functools.partial(examine, writes=True),
}


@dataclass(frozen=True)
class Counterexample:
    """A program that goes wrong, by its seed, and the smallest that still does."""

    seed: int
    program: Program
    problem: str


def run_seeds(seeds: range, steps: int, compiler: str, mode: str) -> tuple[list[Outcome], list[Counterexample]]:
    """Examine the programs of some seeds, and shrink those that go wrong."""
    look = functools.partial(MODES[mode], compiler=compiler)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # torch's remarks on programs that nobody wrote
    outcomes, counterexamples = [], []
    for seed in seeds:
        program = random_program(seed, steps)
        outcome = look(program)
        outcomes.append(outcome)
        if outcome.problem:
            small = shrink(program, functools.partial(_fails_like, outcome, look))
            counterexamples.append(Counterexample(seed, small, look(small).problem))
    return outcomes, counterexamples


def _fails_like(outcome: Outcome, look: Callable[[Program], Outcome], program: Program) -> bool:
    """A wrong number stays a wrong number while it is shrunk, an exception the same exception."""

    def kind(problem: str) -> str:
        return "difference" if problem.startswith("call ") else problem.split(":")[0]

    problem = look(program).problem
    return bool(problem) and kind(problem) == kind(outcome.problem)


def batches(first: int, graphs: int | None) -> Iterator[range]:
    """Consecutive seeds, endless without a number of graphs."""
    for start in itertools.count(first, BATCH):
        left = BATCH if graphs is None else min(BATCH, first + graphs - start)
        if left <= 0:
            return
        yield range(start, start + left)


def fuzz(arguments: argparse.Namespace, console: Console) -> tuple[Statistics, list[Counterexample]]:
    """Run programs in processes of their own, with a progress bar."""
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else None
    statistics, counterexamples = Statistics(), []
    todo = batches(arguments.seed, arguments.graphs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = ProcessPoolExecutor(
        arguments.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=BATCHES_PER_PROCESS
    )
    with Progress(*columns, console=console) as progress, pool:
        bar = progress.add_task("graphs", total=arguments.graphs)
        running: set[Future[tuple[list[Outcome], list[Counterexample]]]] = set()
        while True:
            while len(running) < 2 * arguments.jobs and (deadline is None or time.monotonic() < deadline):
                if (seeds := next(todo, None)) is None:
                    break
                running.add(pool.submit(run_seeds, seeds, arguments.steps, arguments.compiler, arguments.mode))
            if not running:
                return statistics, counterexamples
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for outcomes, found in (future.result() for future in done):
                statistics.add(outcomes)
                counterexamples += found
                for counterexample in found:
                    report(counterexample, arguments, console)
                words = f"graphs, {statistics.folded} of {statistics.sites} sites folded, {len(counterexamples)} wrong"
                progress.update(bar, completed=statistics.graphs, description=words)


def report(counterexample: Counterexample, arguments: argparse.Namespace, console: Console) -> None:
    """Print a counterexample and write it to a file."""
    text = f"# --seed {counterexample.seed} --steps {arguments.steps} --compiler {arguments.compiler}"
    text += f" --mode {arguments.mode}\n"
    text += f"# torch {torch.__version__}, {commit()}\n"
    text += "".join(f"# {line}\n" for line in counterexample.problem.splitlines())
    text += repr(counterexample.program)
    arguments.counterexamples.mkdir(parents=True, exist_ok=True)
    (arguments.counterexamples / f"seed_{counterexample.seed}.py").write_text(text)
    console.print(text, markup=False, highlight=False)


def tables(statistics: Statistics) -> Iterator[Table]:
    """The statistics for people."""
    numbers = Table("", "", title="programs", show_header=False)
    share = functools.partial("{:.0%}".format)
    graphs, sites = max(1, statistics.graphs), max(1, statistics.sites)
    numbers.add_row("programs", str(statistics.graphs))
    numbers.add_row("with a site that folds", share(statistics.with_a_folded_site / graphs))
    numbers.add_row("not taken by Dynamo", str(statistics.unsupported))
    numbers.add_row("sites", str(statistics.sites))
    numbers.add_row("folded", share(statistics.folded / sites))
    for reason, count in statistics.reasons.most_common():
        numbers.add_row(f"left: {reason}", share(count / sites))
    yield numbers
    used = Table("instruction", "times", title="written by")
    for name, count in statistics.instructions.most_common():
        used.add_row(name, str(count))
    yield used


@functools.cache
def commit() -> str:
    """The commit that is tested, with a mark where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def summary(
    arguments: argparse.Namespace, statistics: Statistics, counterexamples: list[Counterexample], seconds: float
) -> dict[str, object]:
    """The result for programs."""

    def sorted_counts(counts: Counter[str]) -> dict[str, int]:
        return dict(counts.most_common())

    return {
        "commit": commit(), "torch": torch.__version__, "seed": arguments.seed, "steps": arguments.steps,
        "compiler": arguments.compiler, "mode": arguments.mode,
        "jobs": arguments.jobs, "seconds": round(seconds, 1), "graphs": statistics.graphs,
        "graphs_with_a_folded_site": statistics.with_a_folded_site, "sites": statistics.sites,
        "folded": statistics.folded, "differences": len(counterexamples),
        "not_taken_by_dynamo": statistics.unsupported, "seeds_of_differences": sorted(c.seed for c in counterexamples),
        "reasons": sorted_counts(statistics.reasons), "instructions": sorted_counts(statistics.instructions),
    }  # fmt: skip


def main() -> int:
    """Parse the command line and run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, help="number of programs (default: 2000 if no --minutes are given)")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--seed", type=int, help="of the first program (default: another one each time)")
    parser.add_argument("--steps", type=int, default=14, help="instructions in a program, at most")
    parser.add_argument("--compiler", choices=COMPILERS, default="none", help="of rewritten graphs (default: none)")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="inference",
        help="training: compare gradients; writes: weights are written between calls in random ways, most of which "
        "torch does not count (default: inference)",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a summary")
    parser.add_argument("--counterexamples", type=Path, default=ROOT / "counterexamples", metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.graphs is None and arguments.minutes is None:
        arguments.graphs = 2000
    if arguments.seed is None:
        arguments.seed = SystemRandom().randrange(10**9)
    console = Console()
    console.print(f"seed {arguments.seed}, torch {torch.__version__}, {commit()}", highlight=False)
    started = time.monotonic()
    statistics, counterexamples = fuzz(arguments, console)
    seconds = time.monotonic() - started
    console.print(
        *tables(statistics), f"{statistics.graphs / seconds:.1f} graphs/s, {len(counterexamples)} differences"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(summary(arguments, statistics, counterexamples, seconds), indent=2) + "\n")
    return 1 if counterexamples else 0


if __name__ == "__main__":
    sys.exit(main())
