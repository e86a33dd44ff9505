"""Modules of a folded model: what they compute, and what they take over from the modules they replace."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lncompile.models.random_weights import randomise
from lncompile.nn import CenteredEmbedding, RMSNorm

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
IDS = torch.tensor([[0, 3, 5], [7, 1, 3]])


def pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def centered(x: Tensor, axes: tuple[int, ...] = (-1,)) -> Tensor:
    return x - x.mean(axes, keepdim=True)


def layer_norm(shape: int | tuple[int, ...] = 8, **options: object) -> nn.LayerNorm:
    return randomise(nn.LayerNorm(shape, eps=0.03, **options).double())


@pytest.mark.parametrize("shape", [8, (4, 8)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_it_is_the_layer_norm_of_a_centered_input(shape: int | tuple[int, ...], options: dict[str, bool]) -> None:
    norm = layer_norm(shape, **options)
    folded = RMSNorm.in_place_of(norm)
    axes = (-1,) if shape == 8 else (-2, -1)
    x = centered(torch.randn(3, 4, 8, dtype=torch.float64), axes)
    torch.testing.assert_close(folded(x), norm(x), **TOLERANCE)
    assert not torch.allclose(folded(x + 1), norm(x + 1)), "it subtracts no mean"
    assert folded.normalized_shape == norm.normalized_shape
    assert folded.eps == norm.eps
    assert folded.elementwise_affine == norm.elementwise_affine


def test_the_equation() -> None:
    folded = randomise(RMSNorm(8, eps=0.5).double())
    x = torch.randn(3, 8, dtype=torch.float64) + 2
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * folded.weight + folded.bias
    torch.testing.assert_close(folded(x), expected, **TOLERANCE)


def test_parameters_are_those_of_a_layer_norm() -> None:
    for options in ({}, {"bias": False}, {"elementwise_affine": False}):
        expected, actual = nn.LayerNorm((4, 8), **options), RMSNorm((4, 8), **options)
        assert list(actual.state_dict()) == list(expected.state_dict())
        assert all(torch.equal(actual.state_dict()[k], v) for k, v in expected.state_dict().items())
    assert RMSNorm(8, device="meta", dtype=torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("narrow_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_narrow_inputs_are_rounded_once(dtype: torch.dtype, narrow_weights: bool, bias: bool) -> None:
    folded = randomise(RMSNorm(64, bias=bias))
    folded = folded.to(dtype) if narrow_weights else folded
    x = (torch.randn(50, 64) * 30).to(dtype)
    exact = copy.deepcopy(folded).double()(x.double())
    actual = folded(x)
    assert actual.dtype == dtype
    # As near as the dtype allows, up to what float32 sums differ by: a sum rounded twice is off in a fifth of them.
    assert (actual == exact.to(dtype)).double().mean() > 0.99


def test_large_narrow_inputs_do_not_overflow() -> None:
    x = torch.full((1, 64), 3000.0, dtype=torch.float16)
    torch.testing.assert_close(RMSNorm(64, dtype=torch.float16)(x), torch.ones(1, 64, dtype=torch.float16))


def test_result_is_contiguous() -> None:
    x = torch.randn(8, 5, 3).permute(2, 1, 0)
    for bias in (True, False):
        assert RMSNorm(8, bias=bias)(x).is_contiguous()


def test_eager_calls_the_fused_kernel_of_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    original = functional.rms_norm

    def counted(x: Tensor, *args: object) -> Tensor:
        calls.append(x.dtype)
        return original(x, *args)

    monkeypatch.setattr(functional, "rms_norm", counted)
    RMSNorm(8)(torch.randn(2, 8))
    RMSNorm(8, bias=False, dtype=torch.bfloat16)(torch.randn(2, 8).bfloat16())
    RMSNorm(8, dtype=torch.bfloat16)(torch.randn(2, 8).bfloat16())
    assert calls == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_dtypes_are_those_of_layer_norm(bias: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 8, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert RMSNorm(8, bias=bias)(x).dtype == nn.LayerNorm(8, bias=bias)(x).dtype


def test_exported_it_is_one_operator() -> None:
    exported = torch.export.export(randomise(RMSNorm(8, bias=False)), (torch.randn(2, 8),))
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert calls[0] == "aten.rms_norm.default"
    assert set(calls[1:]) <= {"aten.contiguous.default"}


def test_in_place_of_takes_over_the_very_parameters() -> None:
    norm = layer_norm().train()
    norm.bias.requires_grad_(False)
    folded = RMSNorm.in_place_of(norm)
    assert folded.weight is norm.weight
    assert folded.bias is norm.bias
    assert folded.training
    assert not RMSNorm.in_place_of(norm.eval()).training
    folded.weight = nn.Parameter(torch.zeros(8))
    assert norm.weight.abs().min() > 0, "the other norm stays as it is"


class Handwritten(nn.Module):
    """A LayerNorm by another author, with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(8, dtype=torch.float64))
        self.register_buffer("beta", torch.rand(8, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (8,), self.gamma, self.beta, 0.03)


def test_in_place_of_a_norm_with_other_names() -> None:
    norm = Handwritten()
    folded = RMSNorm.in_place_of(norm, normalized_shape=8, eps=0.03, weight="gamma", bias="beta")
    x = centered(torch.randn(3, 8, dtype=torch.float64))
    torch.testing.assert_close(folded(x), norm(x), **TOLERANCE)
    assert list(folded.state_dict()) == list(norm.state_dict()) == ["gamma"]
    assert dict(folded.named_buffers()).keys() == {"beta"}
    assert "weight=True, bias=True" in repr(folded)
    assert folded.elementwise_affine
    for copied in (copy.deepcopy(folded), pickled(folded)):
        torch.testing.assert_close(copied(x), norm(x), **TOLERANCE)
        assert copied.gamma is not norm.gamma


def with_hook(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda module, args, output: output + 1)


def with_pre_hook(norm: nn.Module) -> None:
    norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def with_submodule(norm: nn.Module) -> None:
    norm.after = nn.Linear(8, 8)


def with_parameter(norm: nn.Module) -> None:
    norm.gate = nn.Parameter(torch.ones(8))


def with_forward(norm: nn.Module) -> None:
    norm.forward = lambda x: x


def parametrised(norm: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())


@pytest.mark.parametrize(
    "change", [with_hook, with_pre_hook, with_submodule, with_parameter, with_forward, parametrised]
)
def test_in_place_of_refuses_what_would_be_lost(change: Callable[[nn.Module], None]) -> None:
    norm = layer_norm()
    change(norm)
    with pytest.raises(ValueError, match="LayerNorm"):
        RMSNorm.in_place_of(norm)
    embedding = nn.Embedding(9, 8)
    if change is not with_parameter:
        change(embedding)
        with pytest.raises(ValueError, match="Embedding"):
            CenteredEmbedding.in_place_of(embedding)


def test_in_place_of_refuses_weights_of_another_shape() -> None:
    norm = Handwritten()
    norm.gamma = nn.Parameter(torch.rand(1, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"gamma of Handwritten is of shape \(1, 8\)"):
        RMSNorm.in_place_of(norm, normalized_shape=8, eps=0.03, weight="gamma", bias="beta")


def test_gradients_are_those_of_the_layer_norm() -> None:
    norm = layer_norm()
    norms = (norm, RMSNorm.in_place_of(copy.deepcopy(norm)))
    x = torch.randn(3, 8, dtype=torch.float64)
    gradients = []
    for module in norms:
        leaf = x.clone().requires_grad_()
        with torch.enable_grad():
            module(centered(leaf)).pow(3).sum().backward()
        gradients.append((leaf.grad, module.weight.grad, module.bias.grad))
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCE)


class Scaled(nn.Embedding):
    """As models with scaled embeddings define them."""

    def __init__(self, *args: int, scale: float = 3.0) -> None:
        super().__init__(*args, padding_idx=1)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


@pytest.mark.parametrize("make", [nn.Embedding, Scaled])
def test_centered_embedding(make: Callable[..., nn.Embedding]) -> None:
    embedding = randomise(make(9, 8).double()).eval()
    before = embedding.weight.clone()
    ours = CenteredEmbedding.in_place_of(embedding)
    assert ours.weight is embedding.weight
    assert not ours.training
    assert (ours.num_embeddings, ours.padding_idx) == (9, embedding.padding_idx)
    assert isinstance(ours, CenteredEmbedding)
    assert isinstance(ours, make)
    assert list(ours.state_dict()) == ["weight"]
    expected = embedding(IDS)
    torch.testing.assert_close(ours(IDS), expected - expected.mean(-1, keepdim=True), **TOLERANCE)
    assert torch.equal(ours.weight, before)
    for copied in (copy.deepcopy(ours), pickled(ours), CenteredEmbedding.in_place_of(ours)):
        assert type(copied) is type(ours)
        assert torch.equal(copied(IDS), ours(IDS))
    assert copy.deepcopy(ours).weight is not ours.weight
    both = copy.deepcopy(nn.ModuleList([ours, embedding]))
    assert both[0].weight is both[1].weight, "tied as before"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_rows_are_centered_in_float32(dtype: torch.dtype) -> None:
    embedding = nn.Embedding(9, 64).to(dtype)
    with torch.no_grad():
        embedding.weight += 20
    rows = embedding(IDS).double()
    expected = (rows - rows.mean(-1, keepdim=True)).to(dtype)
    actual = CenteredEmbedding.in_place_of(embedding)(IDS)
    assert actual.dtype == dtype
    assert (actual == expected).double().mean() > 0.99


def test_gradients_reach_a_tied_table() -> None:
    embedding = nn.Embedding(9, 8).double()
    ours = CenteredEmbedding.in_place_of(embedding)
    with torch.enable_grad():
        ours(IDS).pow(3).sum().backward()
        gradient, embedding.weight.grad = embedding.weight.grad, None
        centered(embedding(IDS)).pow(3).sum().backward()
    torch.testing.assert_close(gradient, embedding.weight.grad, **TOLERANCE)
