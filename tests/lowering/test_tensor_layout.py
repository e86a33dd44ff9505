"""How torch keeps versions and places is found out, or each tensor is asked; either way every change shows."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from weight_writes import SEEN, Write, prepared

import lncompile
from lncompile.lowering import places_of, tensor_layout
from lncompile.lowering.tensor_layout import read
from lncompile.runtime import parameter_counters
from lncompile.runtime.parameter_counters import counters_of


@pytest.fixture(params=["read from memory", "asked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "asked":
        monkeypatch.setattr(parameter_counters, "tensor_layout", lambda: None)
    return str(request.param)


def test_it_is_found_out() -> None:
    """Where it is not, a call takes some 20 µs more for 200 parameters: to be looked at, but nothing else changes."""
    layout = tensor_layout()
    assert layout is not None
    tensor = torch.zeros(40)[7:9].detach()
    tensor.add_(1)
    words, version = read(places_of(tensor, layout))
    assert version == tensor._version
    assert 7 in words
    assert tensor.untyped_storage().data_ptr() in words


def counted() -> nn.Parameter:
    return nn.Parameter(torch.arange(12.0).reshape(3, 4))


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "write": lambda p: p.mul_(2),
    "write to an alias": lambda p: p.detach().mul_(2),
    "write to a row": lambda p: p[1].add_(1),
    "other memory": lambda p: setattr(p, "data", torch.ones(3, 4)),
    "part": lambda p: setattr(p, "data", p.data[1:]),
    "same memory, another part": lambda p: setattr(p, "data", p.data.flatten()[1:].as_strided((2, 4), (4, 1))),
    "swapped": lambda p: torch.utils.swap_tensors(p, counted()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(change: str, way: str) -> None:
    one, other = counted(), counted()
    counters = counters_of((one, other), places=True)
    assert type(counters).__name__ == ("_Read" if way == "read from memory" else "_Asked")
    assert counters.are_same((one, other))
    kept = other.data
    CHANGES[change](other)
    assert not counters.are_same((one, other))
    del kept


def test_what_changes_nothing_does_not_show(way: str) -> None:
    one, other = counted(), counted()
    counters = counters_of((one, other), places=True)
    one.requires_grad_(False)
    (one + other).sum()
    one.data.mul_(2)  # which is what values are for
    other.some_attribute = 3  # type: ignore[attr-defined]
    gc.collect()
    assert counters.are_same((one, other))


def test_a_write_of_ours_is_expected(way: str) -> None:
    one, other = counted(), counted()
    counters = counters_of((one, other), places=True)
    other.mul_(2)
    counters.expect(1, other._version)
    assert counters.are_same((one, other))
    other.mul_(2)
    assert not counters.are_same((one, other))


def test_without_places_another_memory_does_not_count() -> None:
    one = counted()
    counters = counters_of((one,), places=False)
    one.data = torch.ones(3, 4)
    assert counters.are_same((one,))
    one.mul_(2)
    assert not counters.are_same((one,))


class Two(nn.Module):
    """Two layers in front of a norm, so that their weights can be exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm = nn.LayerNorm(6)

    def forward(self, value: Tensor) -> Tensor:
        return self.norm(self.down[0](value) + self.down[1](value.sin()))


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("kind", SEEN, ids=lambda kind: kind.__name__)
def test_in_a_model(kind: Write, way: str) -> None:
    model, value = randomise(Two().double()).eval(), torch.randn(3, 6, dtype=torch.float64)
    with prepared(kind, model) as write:
        compiled = torch.compile(model, backend="lnfold")
        before = compiled(value)
        write()
        torch.testing.assert_close(compiled(value), model(value), rtol=1e-10, atol=1e-10)
        assert not torch.allclose(before, model(value), rtol=1e-3)
        assert any(report.folded for report in lncompile.reports(compiled))
