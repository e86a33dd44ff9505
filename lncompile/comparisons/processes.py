"""Latency over several processes: an interval that holds for the next process, not only for the one measured.

Where weights, their copies and compiled code lie in memory is drawn anew in each process and then stays. A program is
some tenths of a percent to some percent faster in one process than in another, however long each is measured. What is
wanted is the ratio that a new process is to expect. Processes are the sample, and each gives one number, the median of
its rounds' ratios, in which the noise of its rounds is contained. Half of them compile the candidates in the opposite
order.

The interval is Student's, of the logarithms of these numbers. A bootstrap that draws processes, and rounds within them,
is the usual answer where there are many processes. Of four to eight it draws the same few again and again and is too
narrow: of four processes its 95% interval contains the truth in 81 of 100 simulated cases, Student's in 95
(``tests/comparisons/test_processes.py``).
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from scipy import stats

from lncompile.comparisons.timing import Estimate, PairedTimings, Ratio


class ProcessError(Exception):
    """A process that was to measure ended without a result. The message says how.

    Attributes:
        printed: what it printed, its traceback included.
        out_of_memory: whether that is, or seems to be, why.
    """

    def __init__(self, message: str, printed: str = "", *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.printed = printed
        self.out_of_memory = out_of_memory


@dataclass(frozen=True)
class RepeatedTimings:
    """The timings of several processes, each of which measured the same candidates.

    With one process the intervals are those over its rounds (:class:`~lncompile.comparisons.timing.PairedTimings`), and
    say nothing of another process.

    Attributes:
        processes: what each measured.

    Example:
        >>> timings = RepeatedTimings((measure(candidates), ...))
        >>> print(timings.speedup("lnfold", "inductor"))
        1.031 [1.012, 1.050]
    """

    processes: tuple[PairedTimings, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates that each process measured."""
        first, *others = self.processes
        return tuple(name for name in first.seconds if all(name in other.seconds for other in others))

    @property
    def rounds(self) -> int:
        """Rounds of all processes together."""
        return sum(len(next(iter(process.seconds.values()))) for process in self.processes)

    def median(self, name: str) -> float:
        """Median seconds of a candidate: the median over processes of each one's median."""
        return float(numpy.median([process.median(name) for process in self.processes]))

    def latency(self, name: str) -> Estimate:
        """Seconds of a candidate, with a 95% interval over processes."""
        if len(self.processes) == 1:
            return self.processes[0].latency(name)
        return Estimate(*_geometric([process.median(name) for process in self.processes]))

    def speedup(self, name: str, baseline: str) -> Ratio:
        """Geometric mean over processes of ``baseline / name``, with Student's 95% interval.

        Args:
            name: the candidate.
            baseline: what it is compared with.
        """
        if len(self.processes) == 1:
            return self.processes[0].speedup(name, baseline)
        return Ratio(*_geometric([process.median_ratio(name, baseline) for process in self.processes]))

    def share_removed(self, name: str, baseline: str, limit: str) -> Estimate | None:
        """How much of the way from a baseline to its limit a candidate goes; see ``PairedTimings.share_removed``.

        The interval is that of the candidate's part of the way. How well the way itself is known is not in it.

        Returns:
            None unless the limit is faster than the baseline: its cost is then smaller than the noise.
        """
        if len(self.processes) == 1:
            return self.processes[0].share_removed(name, baseline, limit)
        if self.speedup(limit, baseline).low <= 1:
            return None
        whole = numpy.mean([process.median_difference(limit, baseline) for process in self.processes])
        parts = numpy.asarray([process.median_difference(name, baseline) for process in self.processes])
        return Estimate(*(value / float(whole) for value in _arithmetic(parts)))

    def to_dict(self) -> dict[str, Any]:
        """Return each process's medians and samples, ready for JSON."""
        return {"processes": [process.to_dict() for process in self.processes]}


def _failure(process: str, ended: subprocess.CompletedProcess[str]) -> ProcessError:
    printed = ended.stderr or ended.stdout
    if any(words in printed for words in ("DefaultCPUAllocator", "OutOfMemoryError", "MemoryError")):
        return ProcessError(f"{process} ran out of memory", printed, out_of_memory=True)
    if ended.returncode == -signal.SIGKILL:
        return ProcessError(f"{process} was killed, most likely for the memory it took", printed, out_of_memory=True)
    return ProcessError(f"{process} ended with code {ended.returncode}", printed)


def _geometric(values: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean with Student's interval."""
    mean, low, high = _arithmetic(numpy.log(values))
    return math.exp(mean), math.exp(low), math.exp(high)


def _arithmetic(values: Any) -> tuple[float, float, float]:
    mean, error = float(numpy.mean(values)), float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - reach, mean + reach


def orders(names: Sequence[str], processes: int) -> list[tuple[str, ...]]:
    """In which order each process compiles its candidates: one way in every other one, the other way in the rest.

    Example:
        >>> orders(["a", "b"], 3)
        [('a', 'b'), ('b', 'a'), ('a', 'b')]
    """
    return [tuple(names) if number % 2 == 0 else tuple(reversed(names)) for number in range(processes)]


def run_processes(
    program: str, tasks: Sequence[Mapping[str, Any]], progress: Callable[[int], None] = lambda number: None
) -> list[dict[str, Any]]:
    """Run a program once for each task, one after the other, and collect what each writes.

    Args:
        program: a module's name or a script's path. It takes two arguments: a JSON file with its task, and where to
            write its result as JSON.
        tasks: what each is to do, ready for JSON.
        progress: called with the number of each before it starts.

    Returns:
        The results.

    Raises:
        ProcessError: if one ends without a result.
    """
    results = []
    for number, task in enumerate(tasks):
        progress(number)
        with tempfile.TemporaryDirectory(prefix="lncompile-") as folder:
            given, written = Path(folder, "task.json"), Path(folder, "result.json")
            given.write_text(json.dumps(task))
            # A module is not looked for in the folder one stands in: it may hold folders called like packages.
            what = [program] if program.endswith(".py") else ["-P", "-m", program]
            command = [sys.executable, *what, str(given), str(written)]
            ended = subprocess.run(command, check=False, capture_output=True, text=True)
            if ended.returncode != 0 or not written.is_file():
                raise _failure(f"process {number + 1} of {len(tasks)}", ended)
            results.append(json.loads(written.read_text()))
    return results
