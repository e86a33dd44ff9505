"""A model that is planned or folded is afterwards as it was, and so are the generators of random numbers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from plan_models import IDS, TOLERANCE, Residual, error, randomised
from torch import Tensor

import lncompile


class Counting(Residual):
    """Counts its calls in a buffer, in a buffer that it exchanges and in an attribute, and makes a table once."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running", torch.ones(4, dtype=torch.float64))
        self.register_buffer("last", torch.zeros(1), persistent=False)
        self.number = 0

    def forward(self, ids: Tensor, scale: float = 1.0) -> Any:
        self.calls += 1
        self.running.mul_(0.9)
        self.last = torch.ones(1) * ids.shape[0]
        self.number += 1
        if not hasattr(self, "made"):
            self.branch.register_forward_hook(lambda *_: None)
            self.made = torch.ones(1, dtype=torch.float64)
        noise = torch.rand(1, dtype=torch.float64) * 0
        return {"logits": super().forward(ids, scale)["logits"] * self.made + noise}


@pytest.mark.parametrize("what", ["plan", "fold"])
def test_buffers_attributes_and_generators(what: str) -> None:
    model = randomised(Counting())
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate()
    made = lncompile.plan(model, IDS) if what == "plan" else lncompile.fold(model, IDS)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1]), name
    assert model.number == 0
    assert not hasattr(model, "made")
    assert not model.branch._forward_hooks
    model(IDS)
    assert (model.number, int(model.calls)) == (1, 1), "the control: a call changes them"
    if what == "fold":
        assert (made.number, int(made.calls)) == (0, 0)
        assert error(made, model, IDS) <= TOLERANCE
    else:
        assert (made.folded, made.total) == (2, 2)
        assert made.form.settings[""]["number"] is None
        assert made.apply(randomised(Counting()))
