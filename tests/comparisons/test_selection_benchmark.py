"""What ``benchmarks/selection.py`` says of the choices of races, by times of the test's own."""

from __future__ import annotations

from typing import Any

import selection as benchmark


def process(choice: str, chosen: float, **seconds: float) -> dict[str, Any]:
    """What one process found: each call takes what is said, a little more in every other round."""
    named = {"chosen": chosen, **{name.replace("_", " "): value for name, value in seconds.items()}}
    rounds = {name: [value * (1.001 if n % 2 else 1.0) for n in range(20)] for name, value in named.items()}
    return {"seconds": rounds, "raced": True, "choice": choice, "race_s": 1.0, "in_the_race": {}}


def test_the_best_was_chosen() -> None:
    found = benchmark.judge([process("model", 1.0 + n / 1e4, stock=1.2, model=1.0, fold_alone=1.1) for n in range(4)])
    assert (found["passed"], found["best"]) == (True, "model")
    assert found["of_the_best"]["median"] > 0.999
    assert found["over_stock"]["median"] > 1.19


def test_another_would_have_been_better() -> None:
    found = benchmark.judge([process("fold alone", 1.1, stock=1.2, model=1.0, fold_alone=1.1) for n in range(4)])
    assert (found["passed"], found["best"]) == (False, "model")


def test_the_choice_is_slower_than_stock() -> None:
    results = [process("model", 1.05 + n / 1e3, stock=1.0, model=1.05 + n / 1e3) for n in range(4)]
    found = benchmark.judge(results)
    assert (found["passed"], found["best"]) == (False, "stock")
    assert found["over_stock"]["high"] < 1


def test_what_was_not_raced_says_why() -> None:
    assert benchmark.judge([{"seconds": {}, "raced": False, "why": "2 graphs"}]) == {"raced": False, "why": "2 graphs"}
