"""`lncompile.fold`: a module of its own, to save, export or quantize."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from architectures import ARCHITECTURES, randomise, tokens
from torch import Tensor, nn

import lncompile
from lncompile.verification import floating_outputs, relative_error

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


class Tied(nn.Module):
    """An embedding, a residual branch, and a head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(48, width)
        self.norm, self.branch = nn.LayerNorm(width), nn.Linear(width, width)
        self.final, self.head = nn.LayerNorm(width), nn.Linear(width, 48, bias=False)

    def forward(self, ids: Tensor, scale: float = 1.0) -> dict[str, Tensor | float]:
        stream = self.table(ids)
        stream = stream + self.branch(torch.relu(self.norm(stream)))
        return {"logits": self.head(self.final(stream)) * scale, "scale": scale}


IDS = torch.arange(10).reshape(2, 5)


@pytest.mark.parametrize(
    "name", ["gpt2", "bloom", "bert", "vit", "whisper", "gpt_neox_parallel", "transformer_encoder_pre_norm"]
)
def test_models(name: str) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, inputs = architecture.model(), architecture.inputs(torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = lncompile.fold(model, **inputs)
    expected, actual = model(**inputs), folded(**inputs)
    assert type(actual) is type(expected)
    expected, actual = floating_outputs(expected), floating_outputs(actual)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, **TOLERANCE)
    assert (folded.report.folded, folded.report.total) == (architecture.folded, architecture.sites)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), "the model itself stays as it is"
    ours = list(folded.state_dict().values())
    assert not {value.untyped_storage().data_ptr() for value in ours} & {
        value.untyped_storage().data_ptr() for value in model.state_dict().values()
    }


def test_weights_are_centered_under_their_names() -> None:
    model = randomise(Tied()).eval()
    folded = lncompile.fold(model, IDS)
    state = folded.state_dict()
    for name in ("table.weight", "branch.weight", "head.weight", "norm.weight", "final.bias"):
        assert f"folded.{name}" in state
    assert state["folded.table.weight"].mean(1).abs().max() < 1e-6
    assert state["folded.branch.weight"].mean(0).abs().max() < 1e-6
    assert torch.equal(state["folded.head.weight"], model.head.weight)
    assert not [parameter for parameter in folded.parameters() if parameter.requires_grad]
    layers = {name: layer for name, layer in folded.named_modules() if isinstance(layer, nn.Linear)}
    assert layers.keys() == {"folded.branch", "folded.head"}
    assert (layers["folded.head"].in_features, layers["folded.head"].out_features) == (32, 48)
    assert not any("layer_norm" in str(node.target) for node in folded.folded.graph.nodes)


def test_a_tied_table_is_held_twice() -> None:
    model = randomise(Tied()).eval()
    model.head.weight = model.table.weight
    state = lncompile.fold(model, IDS).state_dict()
    tables = [name for name, value in state.items() if value.shape == (48, 32)]
    assert len(tables) == 2


def test_saved_and_loaded_and_copied() -> None:
    model = randomise(Tied().double()).eval()
    folded = lncompile.fold(model, IDS)
    expected = model(IDS)["logits"]
    file = io.BytesIO()
    torch.save(folded.state_dict(), file)
    file.seek(0)
    other = lncompile.fold(randomise(Tied().double(), seed=5).eval(), IDS)
    assert not torch.equal(other(IDS)["logits"], expected)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(IDS)["logits"], expected, **TOLERANCE)
    torch.testing.assert_close(copy.deepcopy(folded)(IDS)["logits"], expected, **TOLERANCE)


def test_exported_and_compiled() -> None:
    model = randomise(Tied().double()).eval()
    expected = model(IDS)["logits"]
    exported = torch.export.export(lncompile.fold(model, IDS), (IDS,))
    torch.testing.assert_close(exported.module()(IDS)["logits"], expected, **TOLERANCE)
    compiled = torch.compile(lncompile.fold(model, IDS), backend="inductor")
    torch.testing.assert_close(compiled(IDS)["logits"], expected, **TOLERANCE)


def test_folding_twice_finds_nothing_more() -> None:
    folded = lncompile.fold(randomise(Tied().double()).eval(), IDS)
    again = lncompile.fold(folded, IDS)
    assert again.report.total == 0
    torch.testing.assert_close(again(IDS)["logits"], folded(IDS)["logits"], rtol=0, atol=0)


def test_marked_sizes_are_free_and_others_are_not() -> None:
    model = next(a for a in ARCHITECTURES if a.name == "gpt2").model()
    ids = tokens(2, 6)
    torch._dynamo.mark_dynamic(ids, 1)
    folded = lncompile.fold(model, input_ids=ids, use_cache=False)
    for length in (2, 6, 9, 16):
        ids = tokens(2, length)
        actual, expected = (m(input_ids=ids, use_cache=False).logits for m in (folded, model))
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    with pytest.raises(lncompile.CallError, match=r"shape \[2, s.*\], not \[3, 6\].*mark_dynamic"):
        folded(input_ids=tokens(3, 6), use_cache=False)
    with pytest.raises(lncompile.CallError, match=">= 2"):
        folded(input_ids=tokens(2, 1), use_cache=False)
    with pytest.raises(lncompile.CallError, match="False, not True"):
        folded(input_ids=tokens(2, 6), use_cache=True)
    with pytest.raises(lncompile.CallError, match="form"):
        folded(tokens(2, 6), use_cache=False)


def test_one_tensor_given_twice_in_the_example() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.norm(self.first(left) - self.second(right))

    model = randomise(Two().double()).eval()
    left, right = torch.randn(2, 3, 8, dtype=torch.float64)
    folded = lncompile.fold(model, left, left)
    torch.testing.assert_close(folded(left, right), model(left, right), **TOLERANCE)
    assert folded.report.folded == 1


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        lncompile.fold(Tied().train(), IDS)


# --- weight-only quantization ---


def linear_weights(model: nn.Module) -> list[str]:
    return [type(layer.weight).__name__ for layer in model.modules() if isinstance(layer, nn.Linear)]


def test_fold_first_then_quantize() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = randomise(Tied()).eval()
    reference = copy.deepcopy(model).double()(IDS)["logits"]
    folded = lncompile.fold(model, IDS)
    assert folded.report.folded == folded.report.total == 2
    for each in (model, folded):
        quantization.quantize_(each, quantization.Int8WeightOnlyConfig())
    assert linear_weights(folded) == linear_weights(model) == ["Int8Tensor", "Int8Tensor"]
    stock, ours = (relative_error(each(IDS)["logits"], reference) for each in (model, folded))
    assert 1e-4 < stock < 0.02, "the control: quantization did round"
    assert ours < 1.5 * stock
    compiled = torch.compile(folded, backend="inductor")(IDS)["logits"]
    assert relative_error(compiled, folded(IDS)["logits"]) < 1e-5


def test_quantized_weights_are_left_alone_with_a_reason() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = randomise(Tied()).eval()
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
    model = randomise(Tied()).eval()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    compiled = torch.compile(model, backend="lnfold")
    compiled(IDS)
    model.to("meta")
    assert model.branch.weight.device.type == "meta"
