"""`lncompile.fold`: a copy of the model with centered weights and RMSNorms, to save, export or quantize."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from architectures import randomise
from plan_models import IDS, TOLERANCE, Residual, Tied, error, randomised
from torch import nn

import lncompile
from lncompile.nn import CenteredEmbedding, RMSNorm
from lncompile.verification import relative_error


def test_a_folded_model_is_a_copy_of_the_same_class() -> None:
    model = randomised(Residual())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = lncompile.fold(model, IDS)
    assert type(folded) is Residual
    assert error(folded, model, IDS) <= TOLERANCE
    assert error(folded, model, IDS[:1, :3], scale=2.0) <= TOLERANCE, "other sizes and arguments"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(folded.state_dict()) == list(before)
    ours = {value.untyped_storage().data_ptr() for value in folded.state_dict().values()}
    assert not ours & {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    assert isinstance(folded.norm, RMSNorm)
    assert folded.table.weight.mean(1).abs().max() < 1e-15
    assert torch.equal(folded.head.weight, model.head.weight)
    assert not folded.training


def test_a_tied_table_stays_tied() -> None:
    model = randomised(Tied())
    folded = lncompile.fold(model, IDS)
    assert folded.head.weight is folded.table.weight
    assert isinstance(folded.table, CenteredEmbedding)
    assert error(folded, model, IDS) <= TOLERANCE


def test_copied_pickled_saved_and_loaded() -> None:
    model = randomised(Tied())
    folded = lncompile.fold(model, IDS)
    assert error(copy.deepcopy(folded), model, IDS) <= TOLERANCE
    assert copy.deepcopy(folded).head.weight is not folded.head.weight
    loaded = pickle.loads(pickle.dumps(folded))
    assert error(loaded, model, IDS) <= TOLERANCE
    assert loaded.head.weight is loaded.table.weight
    file = io.BytesIO()
    torch.save(folded.state_dict(), file)
    file.seek(0)
    other = lncompile.plan(model, IDS).replace_modules(randomised(Tied(), seed=5))
    assert error(other, model, IDS) > 1e-2
    other.load_state_dict(torch.load(file))
    assert error(other, model, IDS) <= TOLERANCE


def test_exported_and_compiled() -> None:
    model = randomised(Tied())
    expected = model(IDS)["logits"]
    exported = torch.export.export(lncompile.fold(model, IDS), (IDS,))
    torch.testing.assert_close(exported.module()(IDS)["logits"], expected, rtol=1e-10, atol=1e-10)
    compiled = torch.compile(lncompile.fold(model, IDS), backend="inductor")
    torch.testing.assert_close(compiled(IDS)["logits"], expected, rtol=1e-10, atol=1e-10)


def test_a_folded_model_is_compiled_by_lnfold(without_inductor: None) -> None:
    model = randomised(Residual())
    folded = lncompile.fold(model, IDS)
    compiled = torch.compile(folded, backend="lnfold")
    torch.testing.assert_close(compiled(IDS)["logits"], model(IDS)["logits"], rtol=1e-10, atol=1e-10)
    (report,) = lncompile.reports(compiled)
    assert [site.folded_before for site in report.sites] == [True, True]
    assert not report.weights


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        lncompile.fold(Residual().train(), IDS)


# --- weight-only quantization ---


def linear_weights(model: nn.Module) -> list[str]:
    return [type(layer.weight).__name__ for layer in model.modules() if isinstance(layer, nn.Linear)]


def test_fold_first_then_quantize() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = randomise(Residual()).eval()
    reference = copy.deepcopy(model).double()(IDS)["logits"]
    folded = lncompile.fold(model, IDS)
    assert lncompile.plan(model, IDS).folded == 2
    for each in (model, folded):
        quantization.quantize_(each, quantization.Int8WeightOnlyConfig())
    assert linear_weights(folded) == linear_weights(model) == ["Int8Tensor", "Int8Tensor"]
    stock, ours = (relative_error(each(IDS)["logits"], reference) for each in (model, folded))
    assert 1e-4 < stock < 0.02, "the control: quantization did round"
    assert ours < 1.5 * stock, "of one model; the next test says it of many"
    compiled = torch.compile(folded, backend="inductor")(IDS)["logits"]
    assert relative_error(compiled, folded(IDS)["logits"]) < 1e-5


EVERY_WORD = torch.arange(48).reshape(4, 12)

#: The error of int8 weights of a folded model, as a multiple of that of the model as it was: a geometric mean over
#: models. int8 steps are as wide as a row's largest number says, and centering takes from each column its mean. If
#: columns have means beyond chance, rows shrink by them. If numbers are drawn evenly up to an edge, as a layer that is
#: not trained has them, their chance means push some beyond it. And the mean of all rounding errors, which a LayerNorm
#: takes away and an RMSNorm does not, reaches layers behind the norm, as far as their rows have means.
INT8_ERRORS = {
    "columns with means": (0.85, 0.93),
    "normal": (0.98, 1.04),
    "uniform": (1.04, 1.10),
    "rows with means behind the norm": (1.1, 1.25),
}


@pytest.mark.parametrize("kind", INT8_ERRORS)
def test_the_error_of_int8_weights_over_many_models(kind: str) -> None:
    """Below that of the unfolded model, the same or above it: that depends on the weights."""
    quantization = pytest.importorskip("torchao.quantization")
    width, logarithms = 64, []
    plan = lncompile.plan(randomise(Residual(width)).eval(), IDS)
    for seed in range(60):
        model = randomise(Residual(width), seed).eval()
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            weight = model.branch.weight
            normal = torch.randn(weight.shape, generator=draw)
            weight.copy_(normal if kind != "uniform" else torch.rand(weight.shape, generator=draw) - 0.5)
            weight.add_(0.5 * torch.randn(width, generator=draw) if kind == "columns with means" else 0)
            weight.div_(weight.std() * width**0.5)
            if "rows" not in kind:
                model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=draw))
        reference = copy.deepcopy(model).double()(EVERY_WORD)["logits"]
        errors = []
        for each in (model, plan.apply(copy.deepcopy(model))):
            quantization.quantize_(
                each, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "branch"
            )
            errors.append(relative_error(each(EVERY_WORD)["logits"], reference))
        assert min(errors) > 1e-4, "the control: quantization did round"
        logarithms.append(math.log(errors[1] / errors[0]))
    lowest, highest = INT8_ERRORS[kind]
    assert lowest < math.exp(sum(logarithms) / len(logarithms)) < highest


def test_quantized_weights_are_left_alone_with_a_reason() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = randomise(Residual()).eval()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"})
    torch.testing.assert_close(compiled(IDS)["logits"], model(IDS)["logits"], rtol=1e-5, atol=1e-5)
    (report,) = lncompile.reports(compiled)
    first, second = report.sites
    assert first.folded, "the first norm's stream comes from a table of floating-point numbers"
    assert second.reason is lncompile.Reason.UNSUPPORTED_WEIGHT
    assert "'branch.weight' is a Int8Tensor" in second.detail
    assert "fold first, then quantize" in str(report)


def test_a_compiled_model_with_quantized_weights_can_be_moved() -> None:
    """`module.to()` swaps the contents of such weights, which torch refuses where anybody holds a weak reference."""
    quantization = pytest.importorskip("torchao.quantization")
    model = randomise(Residual()).eval()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    compiled = torch.compile(model, backend="lnfold")
    compiled(IDS)
    model.to("meta")
    assert model.branch.weight.device.type == "meta"
