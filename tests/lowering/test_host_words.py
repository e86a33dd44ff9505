"""Words of the host's memory, compared by a function in C: what it sees, and that no other thread interferes."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lncompile.lowering import HostWords, can_compare, host_words, torch_private_compiler
from lncompile.runtime import parameter_state
from lncompile.runtime.parameter_state import ParameterState

pytestmark = pytest.mark.skipif(not can_compare(), reason="words cannot be compared in C here: no C++ compiler")
ALL_BITS = 0xFFFFFFFF


@pytest.fixture(params=["C", "NumPy"])
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Look at weights in one way or the other: both have to see the same."""
    if request.param == "NumPy":
        monkeypatch.setattr(parameter_state, "look_at", lambda *_: None)
    return str(request.param)


def test_every_group_is_compared_and_only_the_bits_that_count() -> None:
    memory = [(ctypes.c_uint32 * 100)(*range(100)) for _ in range(3)]
    item = object()
    address = [ctypes.addressof(words) for words in memory]
    everywhere = [[(start + 4 * index, ALL_BITS) for index in range(100)] for start in address]
    everywhere[1][7] = (everywhere[1][7][0], 0x0000FFFF)
    words = HostWords((item,), everywhere)
    assert words.are_same((item,))
    assert not words.are_same((object(),))
    for group in range(3):
        for index in (0, 31, 32, 99):
            memory[group][index] += 1
            assert not words.are_same((item,))
            memory[group][index] -= 1
            assert words.are_same((item,))
    memory[1][7] ^= 0xFFFF0000
    assert words.are_same((item,))
    memory[1][7] ^= 0x00000001
    assert not words.are_same((item,))
    words.record()
    assert words.are_same((item,))
    words.end()
    assert not words.are_same((item,))


def _write(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(1)


def _swap(weight: nn.Parameter) -> None:
    swap: Callable[[Tensor, Tensor], None] = torch.utils.swap_tensors
    swap(weight, nn.Parameter(torch.full_like(weight, 2.0)))


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "a write that torch counts": _write,
    "a write through .data": lambda weight: weight.data.add_(1),
    "a write by NumPy": lambda weight: weight.data.numpy().fill(7),
    "other memory": lambda weight: setattr(weight, "data", torch.zeros_like(weight)),
    "another dtype": lambda weight: setattr(weight, "data", weight.data.double()),
    "another part of its memory": lambda weight: setattr(weight, "data", weight.data[1:]),
    "a swap": _swap,
    "no memory any more": lambda weight: weight.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("changed", [0, 4])
def test_every_change_is_seen(look: str, change: str, changed: int) -> None:
    weights = tuple(nn.Parameter(torch.randn(9, 16)) for _ in range(5))
    state = ParameterState(weights, values=True)
    assert (state._look is not None) == (look == "C")
    assert state.is_current(weights)
    assert not state.is_current(weights[::-1])
    CHANGES[change](weights[changed])
    assert not state.is_current(weights)


def test_a_state_ends_with_one_of_its_tensors(look: str) -> None:
    weights = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    ended = []
    state = ParameterState(tuple(weights), ended.append, values=True)
    assert state.is_current(tuple(weights))
    weights[1] = nn.Parameter(weights[1].data)
    assert ended == [state]
    assert not state.is_current(tuple(weights))


def test_threads_that_exchange_memory_meanwhile(look: str) -> None:
    """Large memory goes back to the system when it is freed: to read it then would end the process."""
    weight, small = nn.Parameter(torch.zeros(1 << 20)), nn.Parameter(torch.zeros(4))
    weights = (weight, small)
    over = threading.Event()

    def exchange() -> None:
        while not over.is_set():
            weight.data = torch.zeros(1 << 20)

    thread = threading.Thread(target=exchange)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(300):
            state = ParameterState(weights, values=True)
            for _ in range(20):
                state.is_current(weights)
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
    state = ParameterState(weights, values=True)
    assert state.is_current(weights)


def test_without_a_compiler_numpy_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    def no_compiler() -> str:
        raise RuntimeError("there is none")

    monkeypatch.setattr(torch_private_compiler, "cpp_compiler", no_compiler)
    host_words._comparison.cache_clear()
    try:
        assert not can_compare()
        with pytest.raises(NotImplementedError):
            HostWords((), [])
        weight = nn.Parameter(torch.randn(4))
        state = ParameterState((weight,), values=True)
        assert state._look is None
        assert state.is_current((weight,))
    finally:
        host_words._comparison.cache_clear()
