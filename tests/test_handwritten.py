"""LayerNorms written out by hand, in the usual spellings; and their false friends, which stay alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import TEXT, causal, hf, randomise
from torch import Tensor, nn

import lncompile

pytestmark = pytest.mark.usefixtures("without_inductor")
EPS = 1e-5


def cohere(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + EPS)


def deberta(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS)


def one_difference(x: Tensor) -> Tensor:
    centered = x - torch.mean(x, dim=-1, keepdim=True)
    return centered * (torch.mean(centered * centered, dim=-1, keepdim=True) + EPS).rsqrt()


def powers(x: Tensor) -> Tensor:
    centered = x - x.mean(dim=(-1,), keepdim=True)
    return centered / ((centered**2).mean(-1, keepdim=True) + EPS) ** 0.5


def variance(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)


def variance_with_correction(x: Tensor) -> Tensor:
    return (x - x.mean(-1, True)) * torch.rsqrt(torch.var(x, dim=-1, correction=0, keepdim=True) + EPS)


def unbiased(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + EPS)


def l2(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def scaler(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    centered = x - mean
    return centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + EPS) + mean


def centered_only(x: Tensor) -> Tensor:
    return torch.relu(x - x.mean(-1, keepdim=True))


class Model(nn.Module):
    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.weight, self.bias = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(12))
        self.norm = norm

    def forward(self, value: Tensor) -> Tensor:
        stream = self.first(value)
        stream = stream + self.second(torch.relu(self.norm(stream) * self.weight + self.bias))
        return self.head(self.norm(stream) * self.weight)


@pytest.mark.parametrize(
    "norm", [cohere, deberta, one_difference, powers, variance, variance_with_correction], ids=lambda f: f.__name__
)
def test_usual_spellings_fold(norm: Callable[[Tensor], Tensor]) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, 12, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    torch.testing.assert_close(compiled(value), model(value), rtol=1e-10, atol=1e-10)
    (report,) = lncompile.reports(compiled)
    assert (report.total, report.folded) == (2, 2)


@pytest.mark.parametrize("norm", [unbiased, l2, scaler, centered_only], ids=lambda f: f.__name__)
def test_false_friends_are_no_sites(norm: Callable[[Tensor], Tensor]) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, 12, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    torch.testing.assert_close(compiled(value), model(value), rtol=1e-10, atol=1e-10)
    assert lncompile.explain(model, value).total == 0


def test_one_that_cannot_fold_stays_as_it_is() -> None:
    model, value = randomise(Model(cohere).double()), torch.randn(5, 12, dtype=torch.float64)
    net = nn.Sequential(nn.GELU(), model)
    model.first = nn.Identity()
    compiled = torch.compile(net, backend="lnfold", fullgraph=True)
    torch.testing.assert_close(compiled(value), net(value), rtol=1e-10, atol=1e-10)
    (report,) = lncompile.reports(compiled)
    # One centering after the GELU pays for both norms.
    assert (report.total, report.folded, len(report.centerings)) == (2, 2, 1)
    alone = torch.compile(net, backend="lnfold", options={"lnfold.assist": False})
    torch.testing.assert_close(alone(value), net(value), rtol=1e-10, atol=1e-10)
    assert [site.lowering for site in lncompile.reports(alone)[0].sites] == ["layer_norm"] * 2


def test_cohere() -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = hf("CohereForCausalLM", "CohereConfig", intermediate_size=48, **config, **TEXT)()
    model = randomise(model.eval().double())
    inputs = causal(torch.float64)
    compiled = torch.compile(model, backend="lnfold")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    (report,) = lncompile.reports(compiled)
    assert (report.total, report.folded) == (3, 3)
