"""``lncompile.ABTest``: shadow runs, which give a request to both arms and compare what they answer."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from abtesting import ONE, arms, broken, double
from torch import Tensor, nn

import lncompile
from lncompile.abtest.comparison import compare


def test_shadow_compares_a_sample() -> None:
    ab = lncompile.ABTest(
        arms=arms(lambda value: {"logits": value * 2}, lambda value: {"logits": value + value}), shadow=0.2
    )
    for _ in range(300):
        torch.testing.assert_close(ab(ONE)["logits"], ONE * 2)
    verdict = ab.verdict()
    assert 30 <= verdict.comparisons <= 90
    assert verdict.outputs_agree
    assert ab.to_dict()["comparisons"]["largest_relative_errors"] == {"['logits']": 0.0}
    assert f"Outputs agree ({verdict.comparisons} compared)." in str(verdict)


def test_outputs_that_differ_make_a_regression(caplog: pytest.LogCaptureFixture) -> None:
    ab = lncompile.ABTest(arms=arms(double, lambda value: value * 2.01), shadow=1.0)
    for _ in range(20):
        ab(ONE)
    verdict = ab.verdict()
    assert (verdict.outputs_agree, verdict.regression, verdict.improvement) == (False, True, False)
    assert "Outputs DIFFER (20 compared)." in str(verdict)
    assert "output differs by 5.00e-03 (float32) (inputs float32[2,4])" in str(verdict)
    assert caplog.text.count("answer differently") == 1
    assert ab.settle() == "old"
    tolerant = lncompile.ABTest(
        arms=arms(double, lambda value: value * 2.01), shadow=1.0, tolerances={torch.float32: 0.01}
    )
    tolerant(ONE)
    assert tolerant.verdict().outputs_agree


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.00001]), ""),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), ""),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), "differs by inf"),
        (torch.tensor([1.0, INFINITY]), torch.tensor([1.0, -INFINITY]), "differs by inf"),
        (torch.tensor([1.0, INFINITY]), torch.tensor([1.0, NAN]), "differs by inf"),
        (torch.tensor([0.0]), torch.tensor([0.0]), ""),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), ""),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "differs by 5.00e-01 (int64)"),
        (torch.ones(2, dtype=torch.float16), torch.ones(2), "is float16[2] and float32[2]"),
        (torch.ones(2, 1), torch.ones(2), "is float32[2, 1] and float32[2]"),
        (torch.ones(1) * (1 + 1j), torch.ones(1) * (1 + 2j), "differs by"),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1)], "different forms: [0] and [0], [1]"),
        ("a", "b", "is 'a' and 'b'"),
        (None, 1, "is of type NoneType and int"),
        (torch.empty(0), torch.empty(0), ""),
        (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), ""),
        (object(), object(), ""),
    ],
)
def test_what_counts_as_equal(one: Any, other: Any, words: str) -> None:
    _, differences = compare(one, other, {torch.float32: 1e-4})
    assert bool(differences) == bool(words)
    assert words in "".join(differences)


def test_shadow_runs_see_the_inputs_as_they_were() -> None:
    """An arm that writes into its inputs, a cache in an object among them, does so once."""

    def writes(value: Tensor, cache: SimpleNamespace) -> Tensor:
        cache.steps += 1
        cache.keys += 1
        return value.add_(1) * cache.steps + cache.keys

    ab = lncompile.ABTest(arms=arms(writes, writes), shadow=1.0)
    value, cache = torch.zeros(3), SimpleNamespace(steps=0, keys=torch.zeros(3))
    for number in range(1, 11):
        ab(value, cache)
        assert cache.steps == number
        torch.testing.assert_close(value, torch.full((3,), float(number)))
    assert (ab.verdict().comparisons, ab.verdict().outputs_agree) == (10, True)


def test_inputs_that_cannot_be_copied_are_not_compared() -> None:
    ab = lncompile.ABTest(arms=arms(lambda value, lock: value, lambda value, lock: value), shadow=1.0)
    ab(ONE, threading.Lock())
    verdict = ab.verdict()
    assert (verdict.comparisons, verdict.outputs_agree) == (0, None)
    assert "1 requests could not be compared: the inputs cannot be copied: TypeError" in str(verdict)


def test_a_model_that_counts_is_not_run_twice() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, value: Tensor) -> Tensor:
            self.steps += 1
            return value * self.steps

    model = Counter()
    ab = lncompile.ABTest(model, arms={"old": model, "new": model}, shadow=1.0)
    for number in range(1, 6):
        torch.testing.assert_close(ab(ONE), ONE * number)
    assert "the model writes to its own buffers" in str(ab.verdict())
    model = Counter()
    compiled = lncompile.ABTest(
        model, arms={name: torch.compile(model, backend="aot_eager") for name in ("old", "new")}, shadow=1.0
    )
    for number in range(1, 6):
        torch.testing.assert_close(compiled(ONE), ONE * number)
    assert (compiled.verdict().comparisons, compiled.verdict().outputs_agree) == (0, None)


def test_shadow_runs_draw_the_same_random_numbers() -> None:
    def drawing(value: Tensor) -> Tensor:
        return value + torch.rand(3)

    expected = []
    torch.manual_seed(7)
    for _ in range(10):
        expected.append(drawing(torch.zeros(3)))
    ab = lncompile.ABTest(arms=arms(drawing, drawing), shadow=0.5)
    torch.manual_seed(7)
    for value in expected:
        torch.testing.assert_close(ab(torch.zeros(3)), value)
    assert ab.verdict().outputs_agree
    assert ab.verdict().comparisons > 0


def test_an_arm_that_fails_in_a_shadow_run_is_taken_out() -> None:
    ab = lncompile.ABTest(arms=arms(double, broken), shadow=1.0)
    torch.testing.assert_close(ab(ONE), ONE * 2)
    assert ab.verdict().failed == ("new",)
