"""Latency over processes: the interval contains the truth as often as it says, orders balance, failures are told."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy
import pytest

from lncompile.comparisons.processes import ProcessError, RepeatedTimings, orders, run_processes
from lncompile.comparisons.timing import PairedTimings


def process(generator: numpy.random.Generator, ratio: float, spread: float, rounds: int = 9) -> PairedTimings:
    """A process in which the candidate is faster by a ratio of the process's own around the true one."""
    own = ratio * numpy.exp(spread * generator.standard_normal())
    noise = 1.0 + 0.002 * generator.standard_normal((2, rounds))
    return PairedTimings({"baseline": tuple(noise[0] * own), "candidate": tuple(noise[1])})


@pytest.mark.parametrize("count", [4, 6])
def test_the_interval_over_processes_contains_the_truth_in_95_of_100_cases(count: int) -> None:
    generator = numpy.random.default_rng(0)
    held = 0
    for _ in range(600):
        timings = RepeatedTimings(tuple(process(generator, 1.01, 0.01) for _ in range(count)))
        ratio = timings.speedup("candidate", "baseline")
        held += ratio.low <= 1.01 <= ratio.high
    assert 0.93 <= held / 600 <= 0.97


def test_the_interval_within_one_process_says_nothing_of_the_next() -> None:
    generator = numpy.random.default_rng(0)
    held = 0
    for _ in range(50):
        ratio = RepeatedTimings((process(generator, 1.0, 0.01, 200),)).speedup("candidate", "baseline")
        held += ratio.low <= 1.0 <= ratio.high
    assert held < 25


def test_latency_and_share_are_over_processes() -> None:
    generator = numpy.random.default_rng(0)

    def one() -> PairedTimings:
        place = 1.0 + 0.05 * generator.standard_normal()  # this process's processor is slower, or faster
        return PairedTimings(
            {
                name: tuple(place * seconds * (1.0 + 0.001 * generator.standard_normal(20)))
                for name, seconds in (("inductor", 1.0), ("lnfold", 0.925), ("no norms", 0.9))
            }
        )

    timings = RepeatedTimings(tuple(one() for _ in range(6)))
    assert timings.rounds == 120
    latency = timings.latency("inductor")
    assert latency.low < 1.0 < latency.high
    share = timings.share_removed("lnfold", "inductor", "no norms")
    assert share is not None
    assert share.low < 0.75 < share.high
    assert timings.share_removed("lnfold", "inductor", "inductor") is None
    assert list(timings.to_dict()) == ["processes"]


def test_what_a_process_left_out_is_left_out() -> None:
    first = PairedTimings({"a": (1.0,), "b": (1.0,), "c": (1.0,)})
    assert RepeatedTimings((first, PairedTimings({"b": (2.0,), "a": (2.0,)}))).names == ("a", "b")


def test_orders_alternate() -> None:
    assert orders("abc", 4) == [tuple("abc"), tuple("cba"), tuple("abc"), tuple("cba")]


def test_processes_get_tasks_and_give_results(tmp_path: Path) -> None:
    script = tmp_path / "double.py"
    script.write_text(
        textwrap.dedent("""
        import json, pathlib, sys
        task = json.loads(pathlib.Path(sys.argv[1]).read_text())
        if task["number"] == 13:
            sys.exit("not this one")
        pathlib.Path(sys.argv[2]).write_text(json.dumps({"doubled": 2 * task["number"]}))
        """)
    )
    begun: list[int] = []
    assert run_processes(str(script), [{"number": 1}, {"number": 4}], begun.append) == [{"doubled": 2}, {"doubled": 8}]
    assert begun == [0, 1]
    with pytest.raises(ProcessError, match="process 2 of 2 ended with code 1") as failed:
        run_processes(str(script), [{"number": 1}, {"number": 13}])
    assert failed.value.printed.strip() == "not this one"
    assert not failed.value.out_of_memory


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise MemoryError", "process 1 of 1 ran out of memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "process 1 of 1 was killed, most likely for the memory it took"),
    ],
)
def test_a_process_without_memory_is_told_apart(body: str, says: str, tmp_path: Path) -> None:
    script = tmp_path / "greedy.py"
    script.write_text(f"import os, signal\n{body}\n")
    with pytest.raises(ProcessError, match=says) as failed:
        run_processes(str(script), [{}])
    assert failed.value.out_of_memory
