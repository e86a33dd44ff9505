"""A centered copy never outlives an optimizer's step, whether torch counts the step as a change or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import randomise
from torch import nn

import lncompile

pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}, {}], ids=["fused", "foreach", "plain"])
def test_step_is_seen_at_the_next_call(optimizer: Any, kind: dict[str, bool]) -> None:
    model = randomise(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).double())
    value = torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold")
    compiled(value)
    steps = optimizer(model.parameters(), lr=0.1, **kind)
    for _ in range(2):
        with torch.enable_grad():
            model(value).sin().sum().backward()
        before = model[0].weight.clone()
        steps.step()
        assert not torch.equal(before, model[0].weight)
        torch.testing.assert_close(compiled(value), model(value), rtol=1e-10, atol=1e-10)
    assert lncompile.reports(compiled)[0].folded == 1
