"""Checkpoints whose layers take γ and β of the norms in front of them: what is written, and how it is loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, randomise
from checkpoints import PROMPT, contents, gpt2, saved
from hand_folded import IDS, Decoder
from safetensors.torch import load_file, save_file
from torch import Tensor

import lncompile
from lncompile.nn import RMSNorm
from lncompile.plans.safetensors_file import CheckpointError

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["bias", "affine"])
def test_the_files_are_the_state_of_the_applied_plan(mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = randomise(Decoder().double()).to(dtype).eval()
    plan = lncompile.plan(model, IDS, absorb=mode)
    assert plan.absorb
    assert any(layer.adds_bias for entry in plan.absorb for layer in entry.layers)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    written = plan.apply_to_checkpoint(tmp_path / "model.safetensors", tmp_path / "folded")
    expected = plan.apply(copy.deepcopy(model)).state_dict()
    found = weights_in(tmp_path / "folded")
    assert found.keys() == expected.keys() != model.state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert set(written.tables) == found.keys() - model.state_dict().keys()
    loaded = plan.replace_modules(Decoder().to(dtype).eval())
    loaded.load_state_dict(found)
    torch.testing.assert_close(loaded(IDS), plan.apply(copy.deepcopy(model))(IDS), **TOLERANCE)
    plan.apply_to_checkpoint(tmp_path / "folded" / "model.safetensors", tmp_path / "again")
    assert contents(tmp_path / "again")["model.safetensors"] == contents(tmp_path / "folded")["model.safetensors"]


@pytest.mark.parametrize("size", ["50GB", "20KB"], ids=["one_file", "sharded"])
@pytest.mark.parametrize("untie", [False, True])
def test_a_checkpoint_of_transformers_is_loaded(untie: bool, size: str, tmp_path: Path) -> None:
    """A tied head: it gets a bias, and takes γ where it has a table of its own."""
    model = gpt2()
    plan = lncompile.plan(model, untie=untie, absorb="affine", **PROMPT)
    heads = [layer for entry in plan.absorb for layer in entry.layers if layer.adds_bias]
    assert [layer.bias for layer in heads] == ["lm_head.bias"]
    plan.apply_to_checkpoint(saved(model, tmp_path / "model", size), tmp_path / "folded")
    loaded = lncompile.load_folded(transformers.GPT2LMHeadModel, tmp_path / "folded", dtype=torch.float64)
    torch.testing.assert_close(loaded(**PROMPT).logits, model(**PROMPT).logits, **TOLERANCE)
    assert isinstance(loaded.transformer.ln_f, RMSNorm)
    assert loaded.transformer.ln_f.bias is None
    assert loaded.lm_head.bias.abs().max() > 1e-3
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == (not untie)
    applied = plan.apply(copy.deepcopy(model)).state_dict()
    assert applied.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, applied[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        loaded.lm_head.bias.zero_()
    assert not torch.allclose(loaded(**PROMPT).logits, model(**PROMPT).logits, atol=1e-3), "the control"


@pytest.mark.parametrize("name", ["opt", "gpt_neox_parallel", "vit"])
def test_real_classes(name: str, tmp_path: Path) -> None:
    row = next(a for a in ARCHITECTURES if a.name == name)
    model, inputs = row.model(), row.inputs(torch.float64)
    plan = lncompile.plan(model, absorb="affine", **inputs)
    assert plan.absorb
    plan.apply_to_checkpoint(saved(model, tmp_path / "model"), tmp_path / "folded")
    loaded = lncompile.load_folded(type(model), tmp_path / "folded", dtype=torch.float64)
    for one, other in zip(loaded(**inputs).to_tuple(), model(**inputs).to_tuple(), strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, **TOLERANCE)


def test_folders_that_are_not_folded(tmp_path: Path) -> None:
    model = gpt2()
    source = saved(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"has no lncompile_fold\.json"):
        lncompile.load_folded(transformers.GPT2LMHeadModel, source)
    plan = lncompile.plan(model, absorb="bias", **PROMPT)
    plan.save(source / "lncompile_fold.json")
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.bias"), pytest.warns(UserWarning, match="not centered"):
        lncompile.load_folded(transformers.GPT2LMHeadModel, source)
