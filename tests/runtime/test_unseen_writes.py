"""Writes to weights that torch does not count: the next call computes with the new values, as eager and stock do."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from weight_writes import SEEN, UNSEEN, Write, change, changed, prepared

import lncompile
from lncompile.runtime import renewals

pytestmark = [pytest.mark.usefixtures("without_inductor"), pytest.mark.filterwarnings("ignore")]

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
IDS = torch.arange(10).reshape(2, 5)


class Decoder(nn.Module):
    """Two embeddings, two blocks without attention, a head: eight of its parameters are centered for three norms."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, width), nn.Embedding(8, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.final, self.head = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            stream = stream + down(torch.relu(up(norm(stream))))
        return self.head(self.final(stream))


FOLDED = 3


def decoder() -> Decoder:
    return randomise(Decoder().double()).eval()  # type: ignore[return-value]


# --- optimizers ---


def step_of_a_compiled_optimizer(model: nn.Module) -> Iterator[None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    step = torch.compile(optimizer.step)
    yield
    with torch.enable_grad():
        model(IDS).square().sum().backward()
    step()


def own_optimizer_through_data(model: nn.Module) -> Iterator[None]:
    yield
    with torch.enable_grad():
        model(IDS).square().mean().backward()
    for parameter in model.parameters():
        parameter.data -= 0.1 * parameter.grad
        parameter.grad = None


OF_OPTIMIZERS: list[Write] = [step_of_a_compiled_optimizer, own_optimizer_through_data]


@pytest.mark.parametrize("kind", [*UNSEEN, *OF_OPTIMIZERS, *SEEN], ids=lambda kind: kind.__name__)
def test_the_next_call_computes_with_the_new_values(kind: Write) -> None:
    model = decoder()
    with prepared(kind, model) as write:
        compiled = torch.compile(model, backend="lnfold")
        before = model(IDS)
        torch.testing.assert_close(compiled(IDS), before, **TOLERANCE)
        assert folded(compiled) == FOLDED
        write()
        after = model(IDS)
        assert not torch.allclose(after, before, rtol=1e-3), "the control: it did write"
        for _ in range(2):
            torch.testing.assert_close(compiled(IDS), after, **TOLERANCE)


@pytest.mark.parametrize("kind", [*UNSEEN, *OF_OPTIMIZERS], ids=lambda kind: kind.__name__)
def test_by_versions_alone_the_answer_is_old_until_refresh(kind: Write) -> None:
    """The control of the test above, and what docs/weights.md says of ``lnfold.check="versions"``."""
    model = decoder()
    with prepared(kind, model) as write:
        compiled = torch.compile(model, backend="lnfold", options={"lnfold.check": "versions"})
        compiled(IDS)
        write()
        assert not torch.allclose(compiled(IDS), model(IDS))
        lncompile.refresh()
        torch.testing.assert_close(compiled(IDS), model(IDS), **TOLERANCE)


def folded(compiled: Callable[..., object]) -> int:
    return sum(report.folded for report in lncompile.reports(compiled))


# --- libraries ---


def test_an_average_of_diffusers() -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    model = decoder()
    average = training_utils.EMAModel(model.parameters(), decay=0.5)
    _evaluates_with(model, lambda: average.step(model.parameters()), average)


def test_an_average_of_torch_ema() -> None:
    torch_ema = pytest.importorskip("torch_ema")
    model = decoder()
    average = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.5)
    _evaluates_with(model, average.update, average)


def _evaluates_with(model: nn.Module, update: Callable[[], None], average: Any) -> None:
    """Store the weights, copy the average in, evaluate, and restore them, twice between steps of training."""
    compiled = torch.compile(model, backend="lnfold")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    answers = []
    for _ in range(2):
        with torch.enable_grad():
            model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update()
        answers.append(_check(compiled, model))
        average.store(model.parameters())
        average.copy_to(model.parameters())
        answers.append(_check(compiled, model))
        average.restore(model.parameters())
        torch.testing.assert_close(_check(compiled, model), answers[-2], **TOLERANCE)
    # diffusers' average of one step is the weights themselves.
    assert not torch.allclose(answers[-1], answers[-2], rtol=1e-3), "the control: the average is another model"
    assert folded(compiled) == FOLDED


def _check(compiled: Callable[..., Tensor], model: nn.Module) -> Tensor:
    expected = model(IDS)
    torch.testing.assert_close(compiled(IDS), expected, **TOLERANCE)
    return expected


# --- the warning ---


def test_the_first_time_a_warning_names_a_weight_and_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    model = decoder()
    compiled = torch.compile(model, backend="lnfold")
    compiled(IDS)
    with caplog.at_level(logging.DEBUG, "lncompile"):
        for index in (1, 0):
            change(model.down[index].weight.data)
            compiled(IDS)
        told = [record for record in caplog.records if "does not count" in record.message]
    assert [record.levelno for record in told] == [logging.WARNING, logging.DEBUG]
    assert "weight 'down.1.weight' was" in told[0].message
    assert "lncompile.refresh()" in told[0].message
    assert "last answer" not in told[0].message, "on a CPU the answer was computed with the new values"


def test_after_a_reset_the_next_one_is_a_warning_again(caplog: pytest.LogCaptureFixture) -> None:
    torch.compile(decoder(), backend="lnfold")(IDS)
    renewals.say_written_unseen("a", 2, late=True)
    renewals.say_written_unseen("b", 1, late=True)
    torch._dynamo.reset()
    renewals.say_written_unseen("c", 1, late=True)
    assert ["'a'" in caplog.text, "'b'" in caplog.text, "'c'" in caplog.text] == [True, False, True]
    assert "last answer may have been computed with the old values" in caplog.text


def test_writes_that_torch_counts_are_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = decoder()
    compiled = torch.compile(model, backend="lnfold")
    compiled(IDS)
    change(model.down[0].weight)
    model.load_state_dict({name: changed(value) for name, value in model.state_dict().items()})
    _check(compiled, model)
    assert "does not count" not in caplog.text


# --- what is read by address ---


def test_memory_that_was_given_back_is_an_error() -> None:
    """As with stock torch.compile; the look reads memory by address, and must not read what is not there."""
    model = decoder()
    compiled = torch.compile(model, backend="lnfold")
    before = compiled(IDS)
    storage = model.down[0].weight.untyped_storage()
    values, size = model.down[0].weight.detach().clone(), storage.nbytes()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=r"'down.0.weight' has no memory"):
        compiled(IDS)
    storage.resize_(size)
    model.down[0].weight.data.copy_(values)
    torch.testing.assert_close(compiled(IDS), before, **TOLERANCE)


def test_a_neighbour_in_the_same_word_is_no_write(caplog: pytest.LogCaptureFixture) -> None:
    """Elements of half precision share words of memory with what lies beside them in a flat buffer."""
    flat = torch.randn(7 * 7 + 7 + 1 + 4, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7), nn.Linear(7, 7)).bfloat16().eval()
    start = 1  # so that words begin in the middle of elements' pairs
    for parameter in (model[0].weight, model[0].bias):
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    compiled = torch.compile(model, backend="lnfold")
    value = torch.randn(2, 7, dtype=torch.bfloat16)
    compiled(value)
    counters = torch._dynamo.utils.counters["lnfold"]
    before = counters["materialized"]
    flat[0] += 1
    flat[start:] += 1
    compiled(value)
    assert counters["materialized"] == before
    flat[start - 1] += 1  # the control: the last one of the bias
    compiled(value)
    assert counters["materialized"] > before
    assert "does not count" in caplog.text


def test_running_statistics_are_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """torch counts no update of them; they are sources where a batch norm is composed into a layer."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    randomise(model).eval()
    compiled, value = torch.compile(model, backend="lnfold"), torch.randn(5, 6, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
        assert folded(compiled) == 1
        model.train()(value)
        model.eval()
    torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_values_that_are_no_numbers_do_not_look_written() -> None:
    model, value = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double(), torch.randn(2, 4, dtype=torch.float64)
    model[0].bias[1] = float("nan")
    graphs = [torch.compile(model, backend="lnfold", options=o) for o in (None, {"lnfold.nonfoldable": "eager"})]
    counters = torch._dynamo.utils.counters["lnfold"]
    for compiled in graphs:
        compiled(value)
    before = counters["materialized"]
    for _ in range(3):
        for compiled in graphs:
            assert compiled(value).isnan().all()
    assert counters["materialized"] == before


def test_weights_without_elements() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.none, self.norm = nn.Linear(4, 6), nn.Parameter(torch.zeros(0, 6)), nn.LayerNorm(6)

        def forward(self, value: Tensor) -> Tensor:
            return self.norm(torch.cat([self.inner(value), self.none]))

    model, value = Joined().double(), torch.randn(3, 4, dtype=torch.float64)
    model.norm.weight.copy_(torch.rand(6) + 0.5)
    model.norm.bias.copy_(torch.randn(6))
    compiled = torch.compile(model, backend="lnfold")
    torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
    assert folded(compiled) == 1


def test_a_look_by_numpy_holds_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """While memory is read by address its storage is held: another thread may exchange a parameter's meanwhile."""
    from lncompile.runtime import parameter_state
    from lncompile.runtime.parameter_state import ParameterState

    monkeypatch.setattr(parameter_state, "look_at", lambda *_: None)
    weight = nn.Parameter(torch.zeros(4, 4))
    state = ParameterState((weight,), values=True)
    held = []
    samples = state._samples
    assert samples is not None

    def exchanged_meanwhile() -> bool:
        storage = weakref.ref(weight.untyped_storage())
        weight.data = torch.ones(4, 4)
        held.append(storage() is not None)
        return False

    samples.differ = exchanged_meanwhile  # type: ignore[method-assign]
    assert state.is_current((weight,))
    assert held == [True]
    assert not state.is_current((weight,)), "and not any longer"
