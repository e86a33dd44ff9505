"""Writes to weights that torch does not count: the next call computes with the new values, as eager and stock do.

Each kind is a generator: what it needs is made before the compiled call, behind its ``yield`` it writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from architectures import randomise
from torch import Tensor, nn

import lncompile
from lncompile.passes import renewals

pytestmark = [pytest.mark.usefixtures("without_inductor"), pytest.mark.filterwarnings("ignore")]

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
IDS = torch.arange(10).reshape(2, 5)
Write = Callable[[nn.Module], Iterator[None]]


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


def change(values: Tensor) -> Tensor:
    """Add something that neither a scale nor a mean takes out."""
    return values.add_(0.3 * torch.sin(torch.arange(values.numel(), dtype=values.dtype)).view_as(values))


def changed(parameter: Tensor) -> Tensor:
    return change(parameter.detach().clone())


# --- through .data ---


def data_copied(model: nn.Module) -> Iterator[None]:
    yield
    for parameter in model.parameters():
        parameter.data.copy_(changed(parameter))


def data_of_one_weight(model: nn.Module) -> Iterator[None]:
    yield
    change(model.down[1].weight.data)


def data_of_one_bias(model: nn.Module) -> Iterator[None]:
    yield
    change(model.down[0].bias.data)


def data_listed(model: nn.Module) -> Iterator[None]:
    yield
    data = [parameter.data for parameter in model.parameters()]
    torch._foreach_add_(data, [change(torch.zeros_like(value)) for value in data])


def tensors_kept(model: nn.Module) -> Iterator[None]:
    kept = [parameter.data for parameter in model.parameters()]
    yield
    for value in kept:
        change(value)


def rows_kept(model: nn.Module) -> Iterator[None]:
    kept = [row for parameter in model.parameters() for row in parameter.data.unbind()]
    yield
    for row in kept:
        change(row)


# --- .data = a part of the same storage, or of another that is kept ---


def rows_of_one_matrix(model: nn.Module) -> Iterator[None]:
    values = nn.utils.parameters_to_vector(model.parameters()).detach()
    candidates = torch.stack([values, changed(values)])
    nn.utils.vector_to_parameters(candidates[0], model.parameters())
    yield
    nn.utils.vector_to_parameters(candidates[1], model.parameters())


def one_row_of_one_matrix(model: nn.Module) -> Iterator[None]:
    """Of one parameter, not the first, which a conversion of all would show."""
    weight = model.down[1].weight
    candidates = torch.stack([weight.detach(), changed(weight)])
    weight.data = candidates[0]
    yield
    weight.data = candidates[1]


def other_data_and_the_old_kept(model: nn.Module) -> Iterator[None]:
    weight = model.down[1].weight
    kept = weight.data
    yield
    weight.data = changed(weight)
    del kept


def data_exchanged_between_two(model: nn.Module) -> Iterator[None]:
    first, second = model.down
    yield
    first.weight.data, second.weight.data = second.weight.data, first.weight.data


# --- one buffer, and other names of the memory ---


def flat_buffer(model: nn.Module) -> Iterator[None]:
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for parameter, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        parameter.data = part.view_as(parameter)
    yield
    change(flat)


def through_numpy(model: nn.Module) -> Iterator[None]:
    arrays = [parameter.detach().numpy() for parameter in model.parameters()]
    yield
    for array in arrays:
        numpy.add(array, 0.3 * numpy.sin(numpy.arange(array.size)).reshape(array.shape), out=array)


def from_numpy(model: nn.Module) -> Iterator[None]:
    arrays = [parameter.detach().numpy().copy() for parameter in model.parameters()]
    for parameter, array in zip(model.parameters(), arrays, strict=True):
        parameter.data = torch.from_numpy(array)
    yield
    for array in arrays:
        array += 0.3 * numpy.sin(numpy.arange(array.size)).reshape(array.shape)


def through_dlpack(model: nn.Module) -> Iterator[None]:
    aliases = [torch.from_dlpack(parameter.detach()) for parameter in model.parameters()]
    yield
    for alias in aliases:
        change(alias)


def through_dlpack_and_numpy(model: nn.Module) -> Iterator[None]:
    aliases = [numpy.from_dlpack(parameter.detach()) for parameter in model.parameters()]
    yield
    for alias in aliases:
        change(torch.from_numpy(alias) if alias.flags.writeable else torch.from_dlpack(alias))


def through_an_address(model: nn.Module) -> Iterator[None]:
    yield
    for parameter in model.parameters():
        values = changed(parameter)
        ctypes.memmove(parameter.data_ptr(), values.data_ptr(), values.nbytes)


def mapped_file(model: nn.Module) -> Iterator[None]:
    with tempfile.TemporaryFile() as file:
        size = 8 * sum(parameter.numel() for parameter in model.parameters())
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
        start = 0
        for parameter in model.parameters():
            mapped = torch.frombuffer(memory, dtype=torch.double, count=parameter.numel(), offset=start)
            parameter.data = mapped.view_as(parameter).copy_(parameter)
            start += parameter.nbytes
        yield
        # By way of the file, as another process would.
        values = torch.cat([changed(parameter).flatten() for parameter in model.parameters()])
        file.seek(0)
        file.write(values.numpy().tobytes())
        file.flush()


def _change_all(values: list[Tensor]) -> None:
    for value in values:
        change(value)


def another_process(model: nn.Module) -> Iterator[None]:
    model.share_memory()
    yield
    process = multiprocessing.get_context("fork").Process(
        target=_change_all, args=([p.data for p in model.parameters()],)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


# --- loads ---


def loaded_in_inference_mode(model: nn.Module) -> Iterator[None]:
    state = {name: changed(value) for name, value in model.state_dict().items()}
    yield
    with torch.inference_mode():
        model.load_state_dict(state)


def assigned_in_inference_mode(model: nn.Module) -> Iterator[None]:
    with torch.inference_mode():
        state = {name: changed(value) for name, value in model.state_dict().items()}
    yield
    with torch.inference_mode():
        model.load_state_dict(state, assign=True)


def loaded_while_frozen(model: nn.Module) -> Iterator[None]:
    model.requires_grad_(False)
    state = {name: changed(value) for name, value in model.state_dict().items()}
    yield
    model.load_state_dict(state)


def data_while_frozen(model: nn.Module) -> Iterator[None]:
    model.requires_grad_(False)
    yield
    for parameter in model.parameters():
        change(parameter.data)


# --- optimizers and averages ---


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


def swa_average(model: nn.Module) -> Iterator[None]:
    average = torch.optim.swa_utils.AveragedModel(model)
    for parameter in average.parameters():
        change(parameter)
    yield
    for parameter, mean in zip(model.parameters(), average.module.parameters(), strict=True):
        parameter.data = mean.data


SEEN: list[Write] = [
    rows_of_one_matrix,
    one_row_of_one_matrix,
    other_data_and_the_old_kept,
    data_exchanged_between_two,
    loaded_in_inference_mode,
    assigned_in_inference_mode,
    loaded_while_frozen,
    swa_average,
]
UNSEEN: list[Write] = [
    data_copied,
    data_of_one_weight,
    data_of_one_bias,
    data_listed,
    tensors_kept,
    rows_kept,
    flat_buffer,
    through_numpy,
    from_numpy,
    through_dlpack,
    through_dlpack_and_numpy,
    through_an_address,
    mapped_file,
    another_process,
    data_while_frozen,
    step_of_a_compiled_optimizer,
    own_optimizer_through_data,
]


@contextlib.contextmanager
def prepared(kind: Write, model: nn.Module) -> Iterator[Callable[[], None]]:
    """What a kind needs, made; and a function that writes. What it made lives until the end."""
    steps = kind(model)
    next(steps)
    yield lambda: next(steps, None)
    steps.close()


@pytest.mark.parametrize("where", ["copy", "inplace"])
@pytest.mark.parametrize("kind", [*UNSEEN, *SEEN], ids=lambda kind: kind.__name__)
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


@pytest.mark.parametrize("kind", UNSEEN, ids=lambda kind: kind.__name__)
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
