"""LayerNorms written out by hand over other axes than the last: images, sequences, groups."""

from __future__ import annotations

import pytest
import torch
from architectures import TEXT, causal, hf, randomise
from handwritten import Image, Model, compiled_and_checked, counts, named
from spelled_means import EPS, D, Norm, scaled_by
from spellings import cohere
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.passes.rewrites.handwritten import variance_of_centered
from lncompile.verification import relative_error


def over(*dimensions: int) -> Norm:
    def norm(x: Tensor) -> Tensor:
        mean = x.mean(dimensions, keepdim=True)
        return (x - mean) / torch.sqrt((x - mean).pow(2).mean(dimensions, keepdim=True) + EPS)

    return norm


def convnext(x: Tensor) -> Tensor:
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    return (x - u) / torch.sqrt(s + 1e-6)


def convnext_squeezed(x: Tensor) -> Tensor:
    u = x.mean(1)
    s = x.var(1, unbiased=False)
    return (x - u.unsqueeze(1)) / torch.sqrt(s + 1e-6)[:, None]


def channels_last(norm: Norm) -> Norm:
    return lambda x: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def grouped(x: Tensor) -> Tensor:
    return over(2)(x.unflatten(1, (3, 4))).flatten(1, 2)


IMAGES: dict[str, tuple[Norm, int | None, int, int]] = {
    "convnext": (convnext, 1, 1, 1),
    "convnext_squeezed": (convnext_squeezed, 1, 1, 1),
    "convnext_without_affine": (convnext, None, 1, 1),
    "channels_last": (channels_last(cohere), 1, 1, 1),
    "groups_of_channels": (grouped, 1, 1, 1),
    # A LayerNorm over channels and pixels is one, but no convolution can make its mean zero.
    "channels_and_pixels": (over(1, 2, 3), 1, 1, 0),
    "instance_norm": (over(2, 3), 1, 0, 0),
    "instance_norm_without_affine": (over(2, 3), None, 0, 0),
    "instance_norm_by_variance": (
        lambda x: (x - x.mean((2, 3), True)) / (x.var((2, 3), unbiased=False, keepdim=True) + EPS).sqrt(), 1, 0, 0),
    "batch_norm": (over(0, 2, 3), 1, 0, 0),
    "batch_norm_without_affine": (over(0, 2, 3), None, 0, 0),
    "batch_and_channels": (over(0, 1), None, 0, 0),
    "rows_of_pixels_with_an_affine_of_channels": (over(3), 1, 0, 0),
    "width_with_its_affine": (over(3), 3, 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_axes_of_images(name: str, without_inductor: None) -> None:
    norm, axis, sites, folded = IMAGES[name]
    model = randomise(Image(norm, axis).double())
    value = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    compiled = compiled_and_checked(model, value, assist="off").compiled
    assert counts(compiled) == (sites, folded, 0), str(lncompile.reports(compiled))


class Sequence(nn.Module):
    """``[2, 5, 12]``: features last, and a norm over the features or over the positions."""

    def __init__(self, norm: Norm, along: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, D), nn.Linear(D, 5)
        self.weight = nn.Parameter(torch.zeros((1, 5, 1) if along == 1 else (D,)))
        self.norm = norm

    def forward(self, value: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(value)) * self.weight)


@pytest.mark.parametrize(
    ("dimension", "along", "sites"), [(-1, 2, 1), (1, 1, 1), (1, 2, 0), (-1, 1, 0)],
    ids=["features", "positions", "instance_norm_of_features_last", "instance_norm_of_positions_first"],
)  # fmt: skip
def test_axes_of_sequences(dimension: int, along: int, sites: int, without_inductor: None) -> None:
    """In three dimensions the axes alone do not tell a LayerNorm from an instance norm; γ does."""
    model, value = randomise(Sequence(over(dimension), along).double()), torch.randn(2, 5, 3, dtype=torch.float64)
    total, *_ = counts(compiled_and_checked(model, value).compiled)
    assert total == sites


def test_shared_variance_and_two_norms() -> None:
    def both(x: Tensor) -> Tensor:
        spread = torch.rsqrt(x.pow(2).mean(-1, True) - x.mean(-1, True) ** 2 + EPS)
        return (x - x.mean(-1, True)) * spread + (x - x.mean(dim=-1, keepdim=True)) / (1 / spread)

    model, value = randomise(Model(both).double()), torch.randn(5, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    assert relative_error(compiled(value), model(value)) <= 1e-10


@pytest.mark.parametrize(("size", "correction"), [(1, 1), (2, 2), (3, 5), (5, 1), (5, 2), (5, 0)])
@pytest.mark.parametrize("root", [False, True])
def test_variance_of_centered_with_a_correction(size: int, correction: int, root: bool) -> None:
    """Where torch divides by zero, so does this."""
    value = torch.randn(4, size, dtype=torch.float64)
    value = value - value.mean(-1, keepdim=True)
    expected = torch.var(value, -1, correction=correction, keepdim=True)
    divisor = float(max(0, size - correction))
    actual = variance_of_centered(value, [-1], True, root, torch.float64, torch.float64, divisor)
    torch.testing.assert_close(actual, expected.sqrt() if root else expected, equal_nan=True)


def test_cohere(without_inductor: None) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = hf("CohereForCausalLM", "CohereConfig", intermediate_size=48, **config, **TEXT)()
    model = randomise(model.eval().double())
    inputs = causal(torch.float64)
    compiled = torch.compile(model, backend="lnfold")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    (report,) = lncompile.reports(compiled)
    assert (report.total, report.folded) == (3, 3)


class MeanByABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, D), nn.Linear(D, 5)
        self.register_buffer("ones", torch.ones(D, 1))

    def forward(self, value: Tensor) -> Tensor:
        stream = self.stem(value)
        return self.head(torch.relu(scaled_by(stream - stream @ self.ones / D)))


def test_a_buffer_of_ones_is_not_known_to_stay_one(without_inductor: None) -> None:
    model, value = randomise(MeanByABuffer().double()), torch.randn(5, 3, dtype=torch.float64)
    model.ones.fill_(1.0)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    assert relative_error(compiled(value), model(value)) <= 1e-12
    model.ones[0] = 3.0
    assert relative_error(compiled(value), model(value)) <= 1e-12
    assert lncompile.explain(model, value).total == 0


def channels_by_a_product(x: Tensor) -> Tensor:
    rows = x.flatten(2)
    mean = torch.full((1, D), 1 / D, dtype=x.dtype) @ rows
    centered = rows - mean
    return (centered / (centered.std(1, keepdim=True) + EPS)).view_as(x)


def channels_by_einsum(x: Tensor) -> Tensor:
    centered = x - torch.einsum("bchw->bhw", x).unsqueeze(1) / D
    return functional.normalize(centered, dim=1)


@named([channels_by_a_product, channels_by_einsum])
def test_channels_of_images(norm: Norm, without_inductor: None) -> None:
    model, value = randomise(Image(norm, 1).double()), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    assert counts(compiled_and_checked(model, value, assist="off").compiled) == (1, 1, 0)
