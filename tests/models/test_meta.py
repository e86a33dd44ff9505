"""A model on the meta device, with shapes and without values: `lncompile.explain` says what it says of its weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture, randomise
from torch import Tensor, nn

import lncompile
from lncompile.models.stand_ins import is_on_meta, stand_ins

# One each of tied embeddings, cached tables, indexing by lists, an opaque encoder layer, and two inputs.
CHOSEN = {"gpt2", "gpt_neo", "falcon_new", "whisper", "clip", "transformer_encoder_pre_norm", "opt_350m_post_norm"}


def decided(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return dataclasses.replace(lncompile.explain(model, **inputs), seconds=0.0, passes=()).to_dict()


def on_meta(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in inputs.items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="fake tensors stand on the GPU there, and the model on the CPU")
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name in CHOSEN], ids=lambda a: a.name)
def test_the_report_is_that_of_the_model_with_weights(architecture: Architecture) -> None:
    inputs = architecture.inputs(torch.float32)
    with torch.device("meta"):
        empty = architecture.build().eval()
    found = decided(empty, on_meta(inputs))
    assert (found["total"], found["folded"]) == (architecture.sites, architecture.folded)
    assert found == decided(architecture.model(torch.float32), inputs)
    assert is_on_meta(empty), "it has its own tensors back"


class Shared(nn.Module):
    """Two parameters on one storage, one in two places, a buffer and an attribute; `branch` reads a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.empty(16, 8)
        self.upper, self.lower = nn.Parameter(whole[:8]), nn.Parameter(whole[8:])
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.register_buffer("scale", torch.ones(8))
        self.offset = torch.ones(8)
        self.branch = False

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and x.sum() > 0:
            return x
        inner = self.first(x * self.scale + self.offset) @ self.upper.T @ self.lower.T
        return self.last(self.norm(inner))


def shared_on_meta() -> Shared:
    with torch.device("meta"):
        return Shared().eval()


def test_what_was_one_tensor_or_one_storage_stays_one() -> None:
    model, value = shared_on_meta(), torch.empty(3, 8, device="meta")
    before = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with stand_ins(model, ((value,), {"again": [value]})) as ((fake,), named):
        assert named["again"][0] is fake
        assert fake.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert model.first.weight is model.last.weight
        assert isinstance(model.first.weight, nn.Parameter)
        assert model.upper.untyped_storage()._cdata == model.lower.untyped_storage()._cdata
        assert model.upper.untyped_storage()._cdata != model.first.weight.untyped_storage()._cdata
        assert model.scale.device == model.offset.device == fake.device
        assert model(fake).shape == (3, 8)
    after = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert all(after[name] is tensor for name, tensor in before.items())
    assert model.offset.device.type == "meta"


def test_a_model_that_fails_gets_its_tensors_back() -> None:
    model = shared_on_meta()
    with pytest.raises(RuntimeError):
        lncompile.explain(model, torch.empty(3, 9, device="meta"))
    assert is_on_meta(model)
    assert model.scale.device.type == "meta"


def test_values_that_decide_are_missed_in_a_sentence() -> None:
    model = shared_on_meta()
    assert lncompile.explain(model, torch.empty(3, 8, device="meta")).folded == 1
    model.branch = True
    with pytest.raises(ValueError, match="depends on the values of its tensors"):
        lncompile.explain(model, torch.empty(3, 8, device="meta"))


def test_parameters_made_under_inference_mode_do_not_fold_either() -> None:
    with torch.inference_mode(), torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval()
    (site,) = lncompile.explain(model, torch.empty(3, 8, device="meta")).sites
    assert (site.folded, site.reason) == (False, lncompile.Reason.UNSUPPORTED_WEIGHT)
    assert "inference_mode" in site.detail


def test_with_gradients_wanted_the_answer_is_that_for_training() -> None:
    model, value = shared_on_meta(), torch.empty(3, 8)
    real = randomise(Shared().eval())
    with torch.enable_grad():
        assert decided(model, {"x": value.to("meta")}) == decided(real, {"x": value})


def test_a_model_only_a_part_of_which_is_on_meta_is_no_model_on_meta() -> None:
    """Such as one whose weights are kept elsewhere and put in at each call."""
    model = shared_on_meta()
    model.first = nn.Linear(8, 8)
    assert not is_on_meta(model)
    assert not is_on_meta(lambda x: x)
    assert not is_on_meta(nn.ReLU())


def test_what_needs_values_says_so() -> None:
    with pytest.raises(ValueError, match="meta device, where there are no values"):
        lncompile.verify(shared_on_meta(), torch.empty(3, 8, device="meta"))


def test_a_model_of_66_billion_parameters() -> None:
    """OPT-66B as it is published: the capture of 64 layers takes seconds and the memory of none."""
    config = transformers.OPTConfig(
        hidden_size=9216, ffn_dim=36864, num_hidden_layers=64, num_attention_heads=72, word_embed_proj_dim=9216
    )
    started = time.perf_counter()
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(config).eval()
        input_ids = torch.zeros(1, 64, dtype=torch.int64)
    report = lncompile.explain(model, input_ids=input_ids, use_cache=False)
    print(f"{time.perf_counter() - started:.1f} s")
    assert sum(parameter.numel() for parameter in model.parameters()) > 65e9
    assert (report.total, report.folded) == (129, 129)
