"""Calls with the parameters of the last one ask one function in C, and nothing else; every change ends that."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import Block, block
from streams import TOLERANCE
from torch import nn

import lncompile
from lncompile.compiled_graphs import compiled_graphs
from lncompile.lowering import can_compare
from lncompile.runtime.materialize import Materializer

pytestmark = [
    pytest.mark.skipif(not can_compare(), reason="words cannot be compared in C here: no C++ compiler"),
    pytest.mark.usefixtures("without_inductor"),
]
VALUE = torch.randn(3, 8, dtype=torch.float64)
#: Calls until the first computation is made up for.
ENOUGH = 10


def materializer_of(model: Block) -> Materializer:
    (record,) = (record for record in compiled_graphs if id(model.inner.weight) in record.served())
    assert record.materializer is not None
    return record.materializer


def settled(check: str = "values") -> tuple[Block, Callable[..., Any], Materializer]:
    model = block()
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.check": check})
    for _ in range(ENOUGH):
        torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)
    materializer = materializer_of(model)
    assert (materializer.settled is None) == (check == "versions")
    return model, compiled, materializer


@pytest.mark.parametrize("check", ["values", "off"])
def test_nothing_else_is_asked(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, compiled, _ = settled(check)

    def asked(*_: object) -> None:
        raise AssertionError("there is nothing to ask")

    monkeypatch.setattr(Materializer, "__call__", asked)
    torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)


def _written(model: Block) -> None:
    with torch.no_grad():
        model.inner.weight.mul_(2.0)


def _replaced(model: Block) -> None:
    model.inner.weight = nn.Parameter(model.inner.weight.detach() * 2)


def _loaded(model: Block) -> None:
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


def _assigned(model: Block) -> None:
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)


def _written_behind_torch(model: Block) -> None:
    model.inner.weight.data.numpy()[:] *= 2


def _exchanged(model: Block) -> None:
    model.inner.bias.data = model.inner.bias.data * 2


@pytest.mark.parametrize("change", [_written, _replaced, _loaded, _assigned, _written_behind_torch, _exchanged])
def test_a_change_is_noticed_at_the_next_call(change: Callable[[Block], None]) -> None:
    model, compiled, materializer = settled()
    before = compiled(VALUE)
    change(model)
    torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)
    assert not torch.allclose(before, compiled(VALUE))
    for _ in range(ENOUGH):
        torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)
    assert materializer_of(model).settled is not None
    assert materializer.settled is not None


def test_other_parameters_under_the_same_code() -> None:
    """One of two blocks that share a graph does not get the other's values, and with two nothing is settled."""
    first, second = block(), block(seed=1)
    for model in (first, second):
        model.compile(backend="lnfold")
    for model in ENOUGH * (first,) + ENOUGH * (second, first):
        torch.testing.assert_close(model(VALUE), model.forward(VALUE), **TOLERANCE)
        was_settled = materializer_of(first).settled is not None
    assert materializer_of(second) is materializer_of(first)
    assert not was_settled


@pytest.mark.parametrize("check", ["values", "off"])
def test_what_is_freed_or_forgotten_is_not_settled(check: str) -> None:
    model, compiled, materializer = settled(check)
    lncompile.refresh()
    assert materializer.settled is None
    for _ in range(ENOUGH):
        compiled(VALUE)
    assert materializer.settled is not None
    _replaced(model)
    gc.collect()
    assert materializer.settled is None
    torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)


def test_without_a_check_a_write_waits_for_refresh() -> None:
    model, compiled, _ = settled("off")
    before = compiled(VALUE)
    _written(model)
    torch.testing.assert_close(compiled(VALUE), before, **TOLERANCE)
    lncompile.refresh()
    torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)


def test_a_call_with_too_few_arguments_is_not_read_beyond_its_end() -> None:
    _, _, materializer = settled()
    assert materializer.settled is not None
    look, _ = materializer.settled
    assert look.difference(())
    assert look.difference((VALUE,))
    with pytest.raises(TypeError, match="tuple"):
        look.difference([VALUE])  # type: ignore[arg-type]
