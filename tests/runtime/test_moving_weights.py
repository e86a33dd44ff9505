"""Weights that change or move at nearly every call: after a few calls the graph runs as stock compiles it."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import randomise
from blocks import Block, block
from torch import Tensor, nn

import lncompile
from lncompile.compiled_graphs import compiled_graphs
from lncompile.passes.decisions import Reason
from lncompile.runtime.renewals import Renewals

pytestmark = pytest.mark.usefixtures("without_inductor")

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


VALUE = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def data_exchanged(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def parameters_replaced(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))


def emptied_and_filled(model: nn.Module) -> None:
    """As offloading does it by storages: given back behind a call, and filled anew in front of the next one."""
    for parameter in model.parameters():
        values, storage = parameter.detach().clone(), parameter.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        parameter.data.copy_(values)


def written(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.01).add_(0.01 * torch.arange(parameter.numel()).view_as(parameter).sin())


def to_another_dtype_and_back(model: nn.Module) -> None:
    model.float().double()


def states(compiled: Callable[..., object]) -> list[tuple[int, int, Reason | None]]:
    return [(report.folded, report.total, report.sites[0].reason) for report in lncompile.reports(compiled)]


def given_up() -> tuple[nn.Module, Callable[..., Any]]:
    """A block whose weights moved until its folding was given up, and what it is compiled to."""
    model = block()
    compiled = torch.compile(model, backend="lnfold")
    for _ in range(12):
        data_exchanged(model)
        compiled(VALUE)
    assert states(compiled) == [(0, 1, Reason.MOVING_WEIGHTS)]
    return model, compiled


@pytest.mark.parametrize(
    "move", [data_exchanged, parameters_replaced, emptied_and_filled, written, to_another_dtype_and_back]
)
def test_folding_is_given_up(move: Callable[[nn.Module], None], caplog: pytest.LogCaptureFixture) -> None:
    model = block()
    compiled = torch.compile(model, backend="lnfold")
    folded = []
    for _ in range(16):
        move(model)
        torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)
        folded.append(states(compiled))
    assert folded[0] == [(1, 1, None)]
    assert folded[-1] == [(0, 1, Reason.MOVING_WEIGHTS)]
    told = [record for record in caplog.records if "costs more than folding saves" in record.message]
    assert len(told) == 1
    assert told[0].levelno == logging.WARNING
    assert "'inner.weight'" in told[0].message
    (report,) = lncompile.reports(compiled)
    assert "keep the weights where they are between calls" in str(report)
    assert report.weights == ()


def test_nothing_is_computed_or_kept_any_more() -> None:
    model, compiled = given_up()
    counters = torch._dynamo.utils.counters["lnfold"]
    (record,) = (record for record in compiled_graphs if id(model.inner.weight) in record.served())
    before = counters["materialized"]
    assert record.materializer is not None
    assert not record.materializer._sets
    for _ in range(5):
        data_exchanged(model)
        compiled(VALUE)
    assert counters["materialized"] == before


def test_refresh_lets_it_fold_again() -> None:
    model, compiled = given_up()
    lncompile.refresh()
    torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)
    assert states(compiled) == [(1, 1, None)]


@pytest.mark.parametrize("calls", [1, 8])
def test_weights_that_stay_for_a_few_calls_go_on_folding(calls: int) -> None:
    """Eight calls between two changes are enough; one is the control."""
    model = block()
    compiled = torch.compile(model, backend="lnfold")
    for _ in range(20):
        written(model)
        for _ in range(calls):
            compiled(VALUE)
        torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE) if calls > 1 else None
    assert (states(compiled) == [(1, 1, None)]) is (calls > 1)


def test_many_blocks_under_one_graph_are_no_moving_weights() -> None:
    blocks = [block(seed) for seed in range(40)]
    for each in blocks:
        each.compile(backend="lnfold")
    for _ in range(2):
        for each in blocks:
            torch.testing.assert_close(each(VALUE), each.forward(VALUE), **TOLERANCE)
    assert states(blocks[0]) == [(1, 1, None)]
    data_exchanged(blocks[0])
    blocks[0](VALUE)
    assert states(blocks[0]) == [(1, 1, None)]


def test_sizes_may_differ_from_call_to_call() -> None:
    model = block()
    compiled = torch.compile(model, backend="lnfold", dynamic=True)
    for rows in [*range(3, 15), *range(3, 15)]:
        data_exchanged(model)
        value = torch.randn(rows, 8, dtype=torch.float64)
        torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
    assert states(compiled) == [(0, 1, Reason.MOVING_WEIGHTS)]


def test_where_gradients_are_recorded_it_goes_on() -> None:
    model = block()
    model.requires_grad_(False)
    model.outer.requires_grad_(True)
    compiled = torch.compile(model, backend="lnfold")
    with torch.enable_grad():
        for _ in range(14):
            data_exchanged(model)
            compiled(VALUE).sin().sum().backward()
            mine = model.outer.weight.grad.clone()
            model.zero_grad()
            model(VALUE).sin().sum().backward()
            torch.testing.assert_close(mine, model.outer.weight.grad, **TOLERANCE)
            model.zero_grad()
    assert states(compiled) == [(1, 1, None)]


def test_where_recompiling_is_forbidden() -> None:
    model = block()
    compiled = torch.compile(model, backend="lnfold")
    compiled(VALUE)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(14):
            data_exchanged(model)
            torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)


def test_the_graph_kept_for_it_holds_no_weights() -> None:
    model = block()
    compiled = torch.compile(model, backend="lnfold")
    compiled(VALUE)
    weight = weakref.ref(model.inner.weight.untyped_storage())
    model.inner = randomise(nn.Linear(8, 8).double(), seed=2)
    gc.collect()
    assert weight() is None
    torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)


def test_the_count() -> None:
    renewals = Renewals()
    counted = [renewals.are_too_many(1) for _ in range(12)]
    assert counted == [False] * 10 + [True] * 2
    renewals = Renewals()
    for _ in range(1000):
        assert not renewals.are_too_many(1)
        for _ in range(8):
            renewals.spared()
    renewals = Renewals()
    assert not any(renewals.are_too_many(sets) for sets in range(48)), "each has to be computed once"


def test_weights_that_stay_fold_again() -> None:
    """A sweep over checkpoints or steps is over at some time; what is served then folds."""
    model, compiled = given_up()
    for _ in range(90):
        compiled(VALUE)
    assert states(compiled) == [(1, 1, None)]
    torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)


def test_trying_again_gets_rarer() -> None:
    renewals, weight = Renewals(), torch.zeros(2)
    for _ in range(11):
        renewals.are_too_many(1)
    calls = []
    for _ in range(3):
        count = 1
        while not renewals.have_ended(weight):
            count += 1
        calls.append(count)
        assert not renewals.are_too_many(1)
        assert [renewals.are_too_many(1) for _ in range(2)] == [False, True], "given up at once if they move on"
    assert calls[0] < 80
    assert calls[1] > 1.5 * calls[0]
    assert calls[2] > 1.5 * calls[1]


def test_a_weight_that_moves_is_never_calm() -> None:
    renewals = Renewals()
    assert not any(renewals.have_ended(torch.zeros(2)) or renewals.have_ended(torch.zeros(3)) for _ in range(300))


def test_a_checkpoint_computes_the_same_twice() -> None:
    """Frozen weights come before each use and are gone behind it, in the second computation of a checkpoint as well."""
    blocks = [block(seed).requires_grad_(False) for seed in range(3)]
    for each in blocks:
        each.outer.requires_grad_(True)
        each.compile(backend="lnfold")

    def fetched(each: Block, value: Tensor) -> Tensor:
        data_exchanged(each)
        return each(value)

    with torch.enable_grad():
        for _ in range(12):
            value = VALUE.clone().requires_grad_()
            stream = value
            for each in blocks:
                stream = torch.utils.checkpoint.checkpoint(fetched, each, stream, use_reentrant=False)
            stream.sin().sum().backward()
            mine, value.grad = value.grad.clone(), None
            stream = value
            for each in blocks:
                stream = each.forward(stream)
            stream.sin().sum().backward()
            torch.testing.assert_close(mine, value.grad, **TOLERANCE)


def test_every_block_is_told() -> None:
    blocks = [block(seed) for seed in range(3)]
    for each in blocks:
        each.compile(backend="lnfold")
    for _ in range(12):
        for each in blocks:
            data_exchanged(each)
            each(VALUE)
    assert [states(each) for each in blocks] == [[(0, 1, Reason.MOVING_WEIGHTS)]] * 3


def test_sets_that_share_their_first_weight_do_not_take_turns() -> None:
    model = block()
    compiled = torch.compile(model, backend="lnfold")
    biases = [nn.Parameter(torch.randn(8, dtype=torch.float64)) for _ in range(2)]
    counters = torch._dynamo.utils.counters["lnfold"]
    for index in range(24):
        model.inner.bias = biases[index % 2]
        torch.testing.assert_close(compiled(VALUE), model(VALUE), **TOLERANCE)
        if index == 3:
            before = counters["materialized"]
    assert states(compiled) == [(1, 1, None)]
    assert counters["materialized"] == before


def test_the_callers_stance_stays() -> None:
    model = block()
    compiled = torch.compile(model, backend="lnfold")
    compiled(VALUE)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(14):
            data_exchanged(model)
            compiled(VALUE)
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            torch.compile(block(), backend="lnfold")(VALUE.float())


class Branching(Block):
    def forward(self, value: Tensor) -> Tensor:
        chosen = torch.cond(value.sum() > 0, lambda x: x * 2, lambda x: x - 1, (value,))
        return super().forward(chosen)


def test_graphs_within_graphs() -> None:
    """The graph is compiled as Dynamo captured it: captured once more, these operators would not be understood."""
    model = randomise(Branching().double()).eval()
    compiled = torch.compile(model, backend="lnfold")
    for index in range(14):
        data_exchanged(model)
        value = VALUE if index % 2 else -VALUE
        torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
    assert states(compiled) == [(0, 1, Reason.MOVING_WEIGHTS)]
