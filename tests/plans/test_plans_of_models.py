"""Plans of real models: as many norms as the backend folds with weights alone, the same outputs, also from shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from plan_models import error
from torch import Tensor

import lncompile

#: Norms that the backend folds and a plan does not, with the reason.
FEWER: dict[str, tuple[int, str]] = {
    "bloom": (0, "its stream starts from a norm's output, which only a centering at each call would center"),
    "bert": (0, "one norm behind a tied table: centering what is looked up costs as much as it saves"),
    "whisper": (7, "the stream of its encoder starts from an activation, which would be centered at each call"),
}
#: Those with a tied table, which is centered behind its look-up.
TIED = {"gpt2", "gpt_neo", "opt", "falcon_7b", "falcon_new", "falcon_rw", "whisper"}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_counts_and_exactness_in_float64(architecture: Architecture) -> None:
    model, inputs = architecture.model(), architecture.inputs(torch.float64)
    plan = lncompile.plan(model, **inputs)
    expected, _ = FEWER.get(architecture.name, (architecture.folded, ""))
    assert (plan.total, plan.folded) == (architecture.sites, expected), str(plan)
    assert bool(plan.lookups) == (architecture.name in TIED)
    folded = plan.apply(copy.deepcopy(model))
    assert error(folded, model, **inputs) <= 1e-10
    assert list(folded.state_dict()) == list(model.state_dict())
    if plan.center and plan.replace:
        assert error(plan.replace_modules(copy.deepcopy(model)), model, **inputs) > 1e-4, "the control"
    for norm in plan.norms:
        assert norm.detail
    with torch.device("meta"):
        empty = architecture.build().to(torch.float64).eval()
    on_meta = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in inputs.items()}
    assert lncompile.plan(empty, **on_meta) == plan
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())


@pytest.mark.parametrize("name", ["gpt2", "opt", "vit", "dinov2", "clip", "falcon_new"])
def test_a_model_that_dynamo_breaks_in_pieces_has_the_same_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export captures it, in ATen's operators."""
    row = next(a for a in ARCHITECTURES if a.name == name)
    model, inputs = row.model(), row.inputs(torch.float64)
    plan = lncompile.plan(model, **inputs)

    def break_it(*_: object) -> None:
        raise torch._dynamo.exc.Unsupported("a graph break")

    monkeypatch.setattr("lncompile.plans.capture._capture_with_dynamo", break_it)
    exported = lncompile.plan(model, **inputs)
    assert (exported.center, exported.replace, exported.lookups) == (plan.center, plan.replace, plan.lookups)
    assert [norm.becomes for norm in exported.norms] == [norm.becomes for norm in plan.norms]
