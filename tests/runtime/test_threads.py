"""Several threads call one compiled model while another changes its weights: each answer is that of one state."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from blocks import block
from torch import Tensor

import lncompile

pytestmark = pytest.mark.usefixtures("without_inductor")

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def call(compiled: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    # Gradient mode is a thread's own, and a new thread's is on.
    with torch.no_grad():
        return compiled(value)


def test_two_callers_while_a_third_exchanges_a_layer() -> None:
    """What is exchanged at once is seen at once: never half a layer, never the one before the last."""
    model = block(width=16)
    value = torch.randn(5, 16, dtype=torch.float64)
    layers = [block(seed, 16).inner for seed in range(4)]
    answers = []
    for layer in layers:
        model.inner = layer
        answers.append(model(value))
    compiled = torch.compile(model, backend="lnfold")
    call(compiled, value)
    done = threading.Event()

    def exchange() -> None:
        for number in range(400):
            model.inner = layers[number % 4]
        done.set()

    def keep_calling() -> list[Tensor]:
        results = []
        while not done.is_set() or len(results) < 20:
            results.append(call(compiled, value))
        return results

    with ThreadPoolExecutor(3) as pool:
        callers = [pool.submit(keep_calling) for _ in range(2)]
        pool.submit(exchange).result()
        results = [result for caller in callers for result in caller.result()]
    distances = torch.stack([torch.stack([(r - a).abs().max() for a in answers]).min() for r in results])
    assert distances.max() < 1e-10
    torch.testing.assert_close(call(compiled, value), answers[399 % 4], **TOLERANCE)
    assert [report.folded for report in lncompile.reports(compiled)] == [1]


def test_two_callers_and_a_reload_between_their_calls() -> None:
    """Weights loaded in place while nobody calls: both callers, at the same moment, get the new state's answer."""
    model = block(width=16)
    value = torch.randn(5, 16, dtype=torch.float64)
    states = [block(seed, 16).state_dict() for seed in range(3)]
    compiled = torch.compile(model, backend="lnfold")
    call(compiled, value)
    rounds = 60
    barrier = threading.Barrier(3, timeout=60)

    def keep_calling() -> list[Tensor]:
        results = []
        for _ in range(rounds):
            barrier.wait()
            results.append(call(compiled, value))
            barrier.wait()
        return results

    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(keep_calling) for _ in range(2)]
        expected = []
        for state in itertools.islice(itertools.cycle(states), rounds):
            model.load_state_dict(state)
            expected.append(model(value))
            barrier.wait()
            barrier.wait()
        for caller in callers:
            torch.testing.assert_close(torch.stack(caller.result()), torch.stack(expected), **TOLERANCE)


def test_a_reload_in_the_middle_of_calls_leaves_nothing_stale_behind() -> None:
    """In place and unsynchronised, a call in the middle may see both states, as it would in eager; none after it."""
    model = block(width=16)
    value = torch.randn(5, 16, dtype=torch.float64)
    states = [block(seed, 16).state_dict() for seed in range(3)]
    compiled = torch.compile(model, backend="lnfold")
    call(compiled, value)
    done = threading.Event()

    def keep_calling() -> None:
        while not done.is_set():
            call(compiled, value)

    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(keep_calling) for _ in range(2)]
        try:
            for state in itertools.islice(itertools.cycle(states), 150):
                model.load_state_dict(state)
                torch.testing.assert_close(call(compiled, value), model(value), **TOLERANCE)
        finally:
            done.set()
        for caller in callers:
            caller.result()


def test_several_threads_compile_and_call_equal_blocks() -> None:
    blocks = [block(seed, 16) for seed in range(6)]
    value = torch.randn(5, 16, dtype=torch.float64)
    expected = [each(value) for each in blocks]
    for each in blocks:
        each.compile(backend="lnfold")
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            for actual, wanted in zip(pool.map(lambda each: call(each, value), blocks), expected, strict=True):
                torch.testing.assert_close(actual, wanted, **TOLERANCE)
