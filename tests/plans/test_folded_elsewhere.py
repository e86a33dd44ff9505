"""What a folded model is for: saved and loaded by its library, moved, exported, compiled ahead of time, trained."""

from __future__ import annotations

import collections
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture, tokens
from plan_models import IDS, TOLERANCE, Residual, Tied, error, randomised
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lncompile
from lncompile.nn import CenteredEmbedding, RMSNorm
from lncompile.verification import floating_outputs, relative_error


def architecture(name: str) -> Architecture:
    return next(a for a in ARCHITECTURES if a.name == name)


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_parallel"])
def test_save_pretrained_and_from_pretrained(name: str, untie: bool, tmp_path: Path) -> None:
    """The library makes the original class: it gets the modules of the plan, then the folded values."""
    model, inputs = architecture(name).model(), architecture(name).inputs(torch.float64)
    plan = lncompile.plan(model, untie=untie, **inputs)
    folded = plan.apply(copy.deepcopy(model))
    folded.save_pretrained(tmp_path)
    plan.save(tmp_path / "fold.json")

    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert error(loaded, model, **inputs) <= TOLERANCE, "LayerNorms compute the same of centered streams"
    lncompile.FoldPlan.load(tmp_path / "fold.json").replace_modules(loaded)
    assert error(loaded, model, **inputs) <= TOLERANCE
    norms = [module for module in loaded.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 5
    head, table = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head is table) == (name == "gpt2" and not untie)
    if name == "gpt2" and not untie:
        assert isinstance(loaded.get_input_embeddings(), CenteredEmbedding)
        loaded.tie_weights()
        assert error(loaded, model, **inputs) <= TOLERANCE


def test_generation_with_a_cache() -> None:
    """Planned from a prompt and a step of decoding, and run by the library's own loop."""
    model = architecture("gpt2").model()
    ids = tokens()
    cache = model(input_ids=ids, use_cache=True).past_key_values
    step = lncompile.Call(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    plan = lncompile.plan(model, input_ids=ids, use_cache=True, more_calls=[step])
    assert (plan.folded, plan.total) == (5, 5)
    assert {norm.calls for norm in plan.norms} == {2}
    assert cache.get_seq_length() == ids.shape[1], "the example stays as it was"
    folded = plan.apply(copy.deepcopy(model))
    settings = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, output_scores=True, pad_token_id=0)
    settings.return_dict_in_generate = True
    expected, actual = (each.generate(ids, generation_config=settings) for each in (model, folded))
    assert torch.equal(actual.sequences, expected.sequences)
    for one, other in zip(actual.scores, expected.scores, strict=True):
        assert relative_error(one, other) <= TOLERANCE


def test_moved_and_cast() -> None:
    model = randomised(Tied())
    folded = lncompile.fold(model, IDS)
    expected = model(IDS)["logits"]
    assert relative_error(folded.to(torch.float32)(IDS)["logits"], expected) < 1e-5
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.float32}
    assert folded.head.weight is folded.table.weight
    half = folded.to(torch.bfloat16)(IDS)["logits"]
    assert half.dtype == torch.bfloat16
    stock = model.to(torch.bfloat16)(IDS)["logits"]
    assert relative_error(half, expected) < 2 * relative_error(stock, expected)
    assert folded.to("meta").norm.weight.device.type == "meta"


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_exported(name: str) -> None:
    model, inputs = architecture(name).model(), architecture(name).inputs(torch.float64)
    folded = lncompile.fold(model, **inputs)
    exported = torch.export.export(folded, (), inputs)
    expected, actual = floating_outputs(model(**inputs)), floating_outputs(exported.module()(**inputs))
    assert all(relative_error(actual[key], value) <= TOLERANCE for key, value in expected.items())
    operators = collections.Counter(str(node.target) for node in exported.graph.nodes)
    assert operators["aten.rms_norm.default"] == 5
    assert not operators["aten.layer_norm.default"]


def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    model = Logits(randomised(Residual())).eval()
    exported = torch.export.export(lncompile.fold(model, IDS), (IDS,))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    assert relative_error(loaded(IDS), model(IDS)) <= TOLERANCE


class Logits(nn.Module):
    """Of what a model returns the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids)["logits"]


@pytest.mark.parametrize("name", ["residual", "tied", "gpt_neox"])
def test_onnx(name: str, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if name == "gpt_neox":
        model, ids = Logits(architecture("gpt_neox_parallel").model(torch.float32)).eval(), tokens()
    else:
        model, ids = Logits(randomised(Tied() if name == "tied" else Residual()).float()).eval(), IDS
    wide = copy.deepcopy(model).double()
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(lncompile.fold(model, ids), (ids,), file, dynamo=True, opset_version=23, verbose=False)
    operators = collections.Counter(node.op_type for node in onnx.load(file).graph.node)
    assert not operators["LayerNormalization"]
    assert operators["RMSNormalization"] or operators["ReduceMean"], operators
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    assert relative_error(torch.from_numpy(actual), wide(ids)) < 1e-5


class Checkpointed(Residual):
    """Computes its branch again on the way back, in training as models do."""

    def forward(self, ids: Tensor, scale: float = 1.0) -> Any:
        stream = self.table(ids)

        def branch(x: Tensor) -> Tensor:
            return self.branch(torch.relu(self.norm(x)))

        added = checkpoint(branch, stream, use_reentrant=False) if self.training else branch(stream)
        return {"logits": self.head(self.final(stream + added)) * scale}


def test_gradient_checkpointing() -> None:
    """A folded model that computes activations again has the gradients of one that does not."""
    folded = lncompile.fold(randomised(Checkpointed()), IDS)
    assert isinstance(folded.norm, RMSNorm)
    plain = copy.deepcopy(folded)
    folded.train()
    with torch.enable_grad():
        for each in (folded, plain):
            each(IDS)["logits"].square().sum().backward()
    assert folded.norm.training
    for name, parameter in folded.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-12, atol=1e-12)


def test_gradients_of_what_is_not_centered_are_those_of_the_model() -> None:
    model = randomised(Residual())
    folded = lncompile.fold(model, IDS)
    with torch.enable_grad():
        for each in (model, folded):
            each(IDS)["logits"].square().sum().backward()
    for name in ("norm.weight", "norm.bias", "final.weight", "head.weight"):
        one, other = folded.get_parameter(name).grad, model.get_parameter(name).grad
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
