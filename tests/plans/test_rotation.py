"""examples/rotate.py: the stream of a model whose norms are plain RMSNorms can be rotated, by what its plan says."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import rotate
import torch
from architectures import ARCHITECTURES
from plan_models import IDS, TOLERANCE, Residual, error, randomised
from text_architectures import TEXT_DECODERS
from torch import nn

import lncompile

ROWS = {architecture.name: architecture for architecture in (*ARCHITECTURES, *TEXT_DECODERS)}


def model_of(name: str) -> tuple[nn.Module, dict[str, Any]]:
    return ROWS[name].model(), ROWS[name].inputs(torch.float64)


@pytest.mark.parametrize("name", ["opt", "gpt_neox_parallel", "phi", "vit"])
def test_the_stream_can_be_rotated(name: str) -> None:
    model, inputs = model_of(name)
    plan = lncompile.plan(model, absorb="affine", untie=True, **inputs)
    assert plan.folded == plan.total == len(plan.absorb), str(plan)
    folded = plan.apply(copy.deepcopy(model))
    assert error(folded, model, **inputs) <= TOLERANCE
    rotation = rotate.random_rotation(plan.replace[0].normalized_shape[0])
    rotated = rotate.rotate(copy.deepcopy(folded), plan, rotation)
    changed = [n for n, p in rotated.named_parameters() if not torch.equal(p, folded.get_parameter(n))]
    assert len(changed) > 12
    assert error(rotated, model, **inputs) <= TOLERANCE
    as_it_came = rotate.rotate_unfolded(model, plan, rotation)
    assert error(as_it_came, model, **inputs) > 1e-2, "the model as it came"
    plain = lncompile.plan(model, untie=True, **inputs).apply(copy.deepcopy(model))
    assert error(rotate.rotate(plain, plan, rotation), model, **inputs) > 1e-2, "γ and β are in the way"


def test_what_cannot_be_rotated_is_refused_before_anything_is_written() -> None:
    residual = randomised(Residual())
    opt, inputs = model_of("opt")
    # The branch of the first model reads its first norm through an activation, so that the norm keeps γ and β.
    keeps_gamma = lncompile.plan(residual, IDS, absorb="affine")
    tied = lncompile.plan(opt, absorb="affine", **inputs)
    whole = lncompile.plan(opt, absorb="affine", untie=True, **inputs)
    centered = (dataclasses.replace(whole.norms[0], becomes="centered"), *whole.norms[1:])
    keeping_beta = (dataclasses.replace(whole.absorb[0], bias=None), *whole.absorb[1:])
    for model, plan, width, why in (
        (residual, keeps_gamma, residual.head.in_features, "keeps γ or β after the fold"),
        (opt, tied, 32, "keeps γ or β after the fold"),
        (opt, dataclasses.replace(whole, lookups=tied.lookups), 32, "plan with untie=True"),
        (opt, dataclasses.replace(whole, norms=centered), 32, "stays a LayerNorm after the fold"),
        (opt, dataclasses.replace(whole, absorb=keeping_beta), 32, "keeps γ or β after the fold"),
        (opt, whole, 8, "a stream of 32 channels, and Q is of 8"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(rotate.CannotRotateError, match=why):
            rotate.rotate(model, plan, rotate.random_rotation(width))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert rotate.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("9 of 9 norms are plain RMSNorms after the fold.")
    rows = {line[:24].strip(): line[24:].split() for line in out.splitlines()[2:]}
    assert float(rows["folded, then rotated"][0]) < 1e-5
    assert float(rows["rotated without a fold"][0]) > 0.1
    assert float(rows["folded, then rotated"][1]) < 0.5 * float(rows["folded"][1]), "channels are spread"
