"""Values kept in a narrow dtype and used in a wider one: centered there, or not at all, and computed ones as ever."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from torch_versions import unless_old

import lncompile

D, ROWS = 8, 6
WIDE = torch.float64


class Mixed(nn.Module):
    """A stream in double precision that something in single precision joins."""

    def __init__(self, function: Callable[[Mixed, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(D, D, dtype=WIDE), nn.Linear(D, D)
        self.norm, self.second, self.third = (nn.LayerNorm(D, dtype=WIDE) for _ in range(3))
        self.position, self.table = nn.Parameter(torch.randn(ROWS, D)), nn.Embedding(ROWS, D)
        self.function = function

    def forward(self, value: Tensor, index: Tensor) -> Tensor:
        return self.function(self, value, index)


def computed(m: Mixed, value: Tensor, index: Tensor) -> Tensor:
    return m.norm(m.wide(value) + m.narrow(value.float()))


def computed_and_cast(m: Mixed, value: Tensor, index: Tensor) -> Tensor:
    return m.norm(m.wide(value) + m.narrow(value.float())[index].double())


def cast_parameter(m: Mixed, value: Tensor, index: Tensor) -> Tensor:
    return m.norm(m.wide(value) + m.position.double())


def promoted_parameter(m: Mixed, value: Tensor, index: Tensor) -> Tensor:
    return m.norm(m.wide(value) + m.position)


def promoted_view(m: Mixed, value: Tensor, index: Tensor) -> Tensor:
    return m.norm(torch.cat((m.wide(value)[None], m.position.expand(2, -1, -1))))


def promoted_table(m: Mixed, value: Tensor, index: Tensor) -> Tensor:
    return m.norm(m.wide(value) + m.table(index))


def cast_table(m: Mixed, value: Tensor, index: Tensor) -> Tensor:
    return m.norm(m.wide(value) + m.table(index).double())


def promoted_activation(m: Mixed, value: Tensor, index: Tensor) -> Tensor:
    # Three norms of one activation: to center it once would pay.
    narrow = torch.tanh(value).float()
    stream = m.wide(value) + narrow
    return m.norm(stream) + m.second(stream) + m.third(stream)


def promoted_view_of_an_activation(m: Mixed, value: Tensor, index: Tensor) -> Tensor:
    stream = torch.where(value > 0, m.wide(value), torch.tanh(value).float().flip(0))
    return m.norm(stream) + m.second(stream) + m.third(stream)


# How many sites fold, and how exact the result is: what is computed in single precision is rounded to it.
CASES = [
    (computed, 1, 1e-6),
    (computed_and_cast, 1, 1e-6),
    (cast_parameter, 1, 1e-12),
    (promoted_parameter, 0, 1e-12),
    (promoted_view, 0, 1e-12),
    (promoted_table, 0, 1e-12),
    (cast_table, 0, 1e-12),
    pytest.param(
        promoted_activation, 3, 1e-12, marks=unless_old("stock torch.compile rounds the result to float32 too")
    ),
    (promoted_view_of_an_activation, 3, 1e-12),
]


@pytest.mark.parametrize(("function", "folded", "tolerance"), CASES, ids=lambda case: getattr(case, "__name__", None))
def test_precision_is_kept(function: Callable[[Mixed, Tensor, Tensor], Tensor], folded: int, tolerance: float) -> None:
    model = randomise(Mixed(function)).eval()
    value, index = torch.randn(ROWS, D, dtype=WIDE), torch.randint(ROWS, (ROWS,))
    with torch.no_grad():
        report = lncompile.explain(model, value, index)
        assert report.folded == folded, report
        compiled = torch.compile(model, backend="lnfold", fullgraph=True)
        torch.testing.assert_close(compiled(value, index), model(value, index), rtol=tolerance, atol=tolerance)


def test_reason_names_the_parameter_and_its_dtype() -> None:
    model = randomise(Mixed(promoted_parameter)).eval()
    report = lncompile.explain(model, torch.randn(ROWS, D, dtype=WIDE), torch.zeros(ROWS, dtype=torch.int64))
    assert "torch.float32" in report.sites[0].detail
