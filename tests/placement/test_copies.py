"""What a budget counts is what the rewrite makes: of parts, of views, of scales that compose, of what is shared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES, randomise
from graphs import Captured, capture, capture_all
from test_streams import CASES, Parts
from torch import Tensor, nn

from lncompile.options import Options
from lncompile.passes.placement.budget import copy_bytes, place_within
from lncompile.passes.placement.copies import Way, supplies_of
from lncompile.transform import transform

#: Centering alone.
ALONE = Options(absorb_affine="off", defer="off")
ENOUGH = 1 << 40


def counted_and_made(captured: Captured) -> tuple[int, int]:
    """Bytes of the copies that a budget counts, and of the copies that the rewritten graph takes."""
    analysis = captured.analyse(ALONE)
    if analysis.placement is None:
        return 0, 0
    budgeted = place_within(ENOUGH, analysis.sites, analysis.variables, True, analysis.costs)
    transformed = transform(analysis, ALONE)
    inputs = captured.example_inputs
    copies = {
        (expression.code, expression.leaves): expression.evaluate([inputs[leaf] for leaf in expression.leaves]).nbytes
        for expression in transformed.expressions
    }
    return budgeted.used, sum(copies.values())


class Composed(nn.Module):
    """A LayerScale, a batch norm without and with a bias in front of it, a token that is expanded, a shared table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.plain, self.biased = nn.Conv1d(8, 8, 1, bias=False), nn.Conv1d(8, 8, 1)
        self.batch_norm, self.other = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
        self.scale, self.token = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(1, 1, 8))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(5))

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        first, second, third, fourth, fifth = self.norms
        table, scaled = self.table(ids), self.scale * self.linear(x)
        images = self.batch_norm(self.plain(x.mT)).mT, self.other(self.biased(x.mT)).mT
        with_token = torch.cat((self.token.expand(x.shape[0], -1, -1), self.table(ids)), 1)
        return first(table + scaled) + second(images[0]) + third(images[1]) + fourth(table) + fifth(with_token)[:, 1:]


@pytest.mark.parametrize("function", [f for f, (folded, _) in CASES.items() if folded], ids=lambda f: f.__name__)
def test_parts(function: Callable[[Parts, Tensor], Tensor]) -> None:
    model = randomise(Parts(function)).double().eval()
    counted, made = counted_and_made(capture(model, torch.randn(2, 5, 7, dtype=torch.float64)))
    assert counted == made


def test_scales_views_and_what_is_shared() -> None:
    model = randomise(Composed()).double().eval()
    captured = capture(model, torch.arange(6).reshape(2, 3), torch.randn(2, 3, 8, dtype=torch.float64))
    assert all(verdict.folded for verdict in captured.analyse(ALONE).verdicts)
    counted, made = counted_and_made(captured)
    # The table, the token, three products of 8 by 8 with a bias each.
    assert counted == made == 8 * (9 * 8 + 8 + 3 * (8 * 8 + 8))


@pytest.mark.parametrize("name", ["gpt2", "opt", "vit"])
def test_architectures(name: str) -> None:
    architecture = next(one for one in ARCHITECTURES if one.name == name)
    graphs = capture_all(randomise(architecture.build()).eval(), **architecture.inputs(torch.float32)).graphs
    pairs = [counted_and_made(graph) for graph in graphs]
    assert any(counted for counted, _ in pairs)
    assert all(counted == made for counted, made in pairs)


def test_one_copy_for_the_parts_that_a_reader_wants_together() -> None:
    def queries_and_keys(m: Parts, u: Tensor) -> Tensor:
        q, k, v = m.joint(u).chunk(3, -1)
        return m.norm(q) * m.other(k) + torch.relu(v)

    captured = capture(randomise(Parts(queries_and_keys)).double().eval(), torch.randn(2, 5, 7, dtype=torch.float64))
    analysis = captured.analyse(ALONE)
    assert analysis.placement is not None
    supplies = supplies_of(analysis.placement, analysis.variables)
    copies = [supply for supply in supplies.made() if supply.way is Way.COPY]
    assert [len(supply.axes) for supply in copies] == [2, 2], "the weight and the bias, each along two sets of axes"
    # For one site alone it is one of them.
    alone = supplies_of(analysis.placement, analysis.variables, analysis.placement.folded[:1])
    assert [len(supply.axes) for supply in alone.made()] == [1, 1]


def test_bytes_of_what_needs_no_copy() -> None:
    parameter = torch.fx.Graph().placeholder("weight")
    assert copy_bytes(parameter, torch.zeros(3), [parameter]) == 0
    assert copy_bytes(parameter, torch.zeros(3), []) == 12
