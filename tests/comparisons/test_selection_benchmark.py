"""What ``benchmarks/selection.py`` says of the choices of races, by times of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import selection as benchmark
from suite.presentation import draw_choices


def process(choice: str, **seconds: float) -> dict[str, Any]:
    """What one process found: each call takes what is said, a little more in every other round."""
    named = {name.replace("_", " "): value for name, value in seconds.items()}
    rounds = {name: [value * (1.001 if n % 2 else 1.0) for n in range(20)] for name, value in named.items()}
    return {"seconds": rounds, "raced": True, "choice": choice, "race_s": 1.0, "in_the_race": {}}


def test_the_best_was_chosen() -> None:
    found = benchmark.judge([process("model", stock=1.2, model=1.0 + n / 1e4, fold_alone=1.1) for n in range(4)])
    assert (found["passed"], found["best"]) == (True, "model")
    assert found["of_the_best"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert found["over_stock"]["median"] > 1.19


def test_another_would_have_been_better() -> None:
    found = benchmark.judge([process("fold alone", stock=1.2, model=1.0, fold_alone=1.1) for _ in range(4)])
    assert (found["passed"], found["best"]) == (False, "model")
    assert found["of_the_best"]["median"] == pytest.approx(1 / 1.1)


def test_each_process_is_judged_by_its_own_choice() -> None:
    results = [process("model" if n else "stock", stock=1.02, model=1.0) for n in range(4)]
    found = benchmark.judge(results)
    assert found["of_the_best"]["median"] == pytest.approx(1.02**-0.25)
    assert found["over_stock"]["median"] == pytest.approx(1.02**0.75)
    assert found["choices"] == ["stock", "model", "model", "model"]


def test_the_choice_is_slower_than_stock() -> None:
    results = [process("model", stock=1.0, model=1.05 + n / 1e3) for n in range(4)]
    found = benchmark.judge(results)
    assert (found["passed"], found["best"]) == (False, "stock")
    assert found["over_stock"]["high"] < 1


def test_chance_does_not_make_the_best_look_better() -> None:
    """Equal ways, each of which is 3% faster in a process of its own: none is known to be the best beforehand."""
    ways = ("stock", "model", "fold_alone")
    results = [process("stock", **{way: 0.97 if m == n else 1.0 for m, way in enumerate(ways)}) for n in range(3)]
    found = benchmark.judge(results)
    assert found["of_the_best"]["median"] >= 1.0
    assert found["passed"]


def test_what_was_not_raced_says_why() -> None:
    assert benchmark.judge([{"seconds": {}, "raced": False, "why": "2 graphs"}]) == {"raced": False, "why": "2 graphs"}


def test_a_plot_of_choices(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    raced = benchmark.judge([process("model", stock=1.2, model=1.0 + n / 1e3) for n in range(3)])
    workloads = [{"workload": "a", **raced}, {"workload": "b", "raced": False, "why": "2 graphs"}]
    result = {
        "workloads": workloads,
        "machine": {"device": "a device", "torch": "2"},
        "commit": "0" * 40,
        "dry_run": True,
    }
    draw_choices(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
