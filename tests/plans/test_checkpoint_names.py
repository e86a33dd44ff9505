"""Checkpoints whose names transformers changes as it loads them: folded under the names that they have."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from checkpoints import contents, saved
from command_line import run
from safetensors.torch import load_file, save_file
from torch import Tensor

import lncompile
from lncompile.plans.entries import PlanError

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}

#: What transformers writes of these has other names than the model's state dict.
RENAMED = ("vit", "dinov2")


def architecture(name: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    row = next(a for a in ARCHITECTURES if a.name == name)
    return row.model(), row.inputs(torch.float64)


def outputs(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [value for value in model(**inputs).to_tuple() if isinstance(value, Tensor)]


@pytest.mark.parametrize("name", RENAMED)
@pytest.mark.parametrize("size", ["50GB", "20KB"], ids=["one_file", "sharded"])
def test_names_in_the_files_stay(name: str, size: str, tmp_path: Path) -> None:
    model, inputs = architecture(name)
    source = saved(model, tmp_path / "model", size)
    stored = {key for path in source.glob("*.safetensors") for key in load_file(path)}
    plan = lncompile.plan(model, **inputs)
    assert not {entry.name for entry in plan.center} <= stored, "they differ, or this tests nothing"
    before = contents(source)
    written = plan.apply_to_checkpoint(source, tmp_path / "folded")
    assert contents(source) == before
    assert len(written.centered) == len(plan.center)
    found = {
        key: value for path in (tmp_path / "folded").glob("*.safetensors") for key, value in load_file(path).items()
    }
    assert found.keys() == stored
    loaded = lncompile.load_folded(type(model), tmp_path / "folded", dtype=torch.float64)
    expected = plan.apply(copy.deepcopy(model)).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    for one, other in zip(outputs(loaded, inputs), outputs(model, inputs), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_the_command(tmp_path: Path) -> None:
    model, inputs = architecture("vit")
    source = saved(model, tmp_path / "model")
    result = run("fold", source, tmp_path / "folded")
    assert result.exit_code == 0, result.output
    loaded = lncompile.load_folded(type(model), tmp_path / "folded", dtype=torch.float64)
    for one, other in zip(outputs(loaded, inputs), outputs(model, inputs), strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_a_tensor_that_is_made_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed weight under another name: what is in the file is not what the plan centers."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    model, inputs = architecture("vit")
    plan = lncompile.plan(model, **inputs)
    centered = next(entry.name for entry in plan.center if len(entry.shape) == 2)
    source = tmp_path / "model"
    source.mkdir()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    state["flat"] = state.pop(centered).T.contiguous()
    save_file(state, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(model.config.to_dict()))
    with pytest.raises(PlanError, match="lacks 1 of the"):
        plan.apply_to_checkpoint(source, tmp_path / "folded")
    converter = WeightConverter("^flat$", centered, [Transpose(0, 1)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [converter])
    with pytest.raises(PlanError, match=r"transformers makes '.*' of 'flat' and others"):
        plan.apply_to_checkpoint(source, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
    assert transformers.__version__
