"""Writes to weights that torch does not count: the next call computes with the new values, as eager and stock do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from weight_writes import SEEN, UNSEEN, Write, change, changed, prepared

import lncompile
from lncompile.passes import renewals

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


@pytest.mark.parametrize("where", ["copy", "inplace"])
@pytest.mark.parametrize("kind", [*UNSEEN, *OF_OPTIMIZERS, *SEEN], ids=lambda kind: kind.__name__)
def test_the_next_call_computes_with_the_new_values(kind: Write, where: str) -> None:
    model = decoder()
    with prepared(kind, model) as write:
        compiled = torch.compile(model, backend="lnfold", options={"lnfold.weights": where})
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
