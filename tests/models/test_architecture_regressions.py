"""What running many architectures brought to light, each in the smallest module that shows it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.verification import BUDGET, ROUNDINGS, relative_error


class EmbeddingCastUp(nn.Module):
    """A residual stream in single precision that starts from an embedding in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 32, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.embedding(ids).to(self.norm.weight.dtype))


class LinearOfWeightsCastUp(nn.Module):
    """Weights kept in half precision and used in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(32, 11, dtype=torch.bfloat16))
        self.bias = nn.Parameter(torch.empty(32, dtype=torch.bfloat16))
        self.norm = nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        dtype = self.norm.weight.dtype
        one_hot = functional.one_hot(ids, 11).to(dtype)
        return self.norm(functional.linear(one_hot, self.weight.to(dtype), self.bias.to(dtype)))


class PositionsCastUp(nn.Module):
    """A table of positions that is no parameter and has a dtype of its own, as in VideoMAE."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 32)
        self.norm = nn.LayerNorm(32)
        generator = torch.Generator().manual_seed(1)
        self.positions = torch.randn(7, 32, generator=generator).add(0.5).to(torch.bfloat16)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embedding(ids)
        return self.norm(embedded + self.positions.type_as(embedded))


@pytest.mark.parametrize("module", [EmbeddingCastUp, LinearOfWeightsCastUp, PositionsCastUp])
def test_parameters_that_are_cast_up_keep_the_precision_they_are_used_in(
    module: Callable[[], nn.Module], without_inductor: None
) -> None:
    model = randomise(module()).eval()
    ids = torch.arange(7)
    # The cast up is exact, so the values kept in half precision are those of the wide model too.
    expected = copy.deepcopy(model).double()(ids)
    eager = relative_error(model(ids), expected)
    compiled = torch.compile(model, backend="lnfold")
    error = relative_error(compiled(ids), expected)
    assert error <= max(BUDGET * eager, ROUNDINGS * torch.finfo(torch.float32).eps)
    # A site may well fold for all that, with a centered copy in the wider dtype.
    assert all(site.detail for report in lncompile.reports(compiled) for site in report.sites)


class QueriesFromZeros(nn.Module):
    """DETR's decoder: the stream starts from zeros, which have no mean."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(5, 32))
        self.attention, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        queries = torch.zeros_like(self.positions)
        return self.norm(queries + self.attention(functional.gelu(queries + self.positions)))


class ExpandedParameterReadTwice(nn.Module):
    """Mask2Former's queries: one expanded parameter starts the stream and is read as it is beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(5, 32))
        self.attention, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        queries = self.queries.unsqueeze(0).repeat(2, 1, 1)
        return self.norm(queries + self.attention(functional.gelu(queries)))


class GatherBehindFlatten(nn.Module):
    """ViT-MAE's embedding: some of the patches of a flattened convolution are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(1, 32, 2, stride=2), nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        pixels = ids.new_ones(1, 1, 8, 8, dtype=self.norm.weight.dtype)
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        kept = (ids % 16)[None, :, None].expand(1, 7, 32)
        return self.norm(torch.gather(patches, 1, kept))


class ImageFeaturesAmongTokens(nn.Module):
    """BLIP-2's decoder: image features are scattered into the embeddings of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.projection, self.norm = nn.Embedding(11, 32), nn.Linear(8, 32), nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embedding(ids)
        features = self.projection(torch.ones(2, 8, dtype=embedded.dtype))
        mask = (ids % 7 < 2).unsqueeze(-1).expand_as(embedded)
        return self.norm(embedded.masked_scatter(mask, features))


class JointProjection(nn.Module):
    """Persimmon's attention: queries, keys and values of one projection, interleaved by head; two of them normed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.projection = nn.Embedding(11, 32), nn.Linear(32, 96)
        self.query_norm, self.key_norm = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        joint = self.projection(self.embedding(ids)).view(7, 4, 3, 8)
        query, key = self.query_norm(joint[..., 0, :]), self.key_norm(joint[..., 1, :])
        return functional.scaled_dot_product_attention(query, key, joint[..., 2, :])


class ShiftTolerantNeighbour(nn.Module):
    """X-CLIP's message token: a stream that is joined to tensors that are not centered, and nobody sees its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.other = nn.Embedding(11, 32), nn.Embedding(11, 32)
        self.norm, self.joint_norm = nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        message, other = self.embedding(ids), torch.tanh(self.other(ids))
        return self.joint_norm(message + other) + self.norm(message)


# Sites that fold, of all.
FOLDS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "queries_from_zeros": (QueriesFromZeros, 1, 1),
    "expanded_parameter_read_twice": (ExpandedParameterReadTwice, 1, 1),
    "gather_behind_flatten": (GatherBehindFlatten, 1, 1),
    "joint_projection": (JointProjection, 2, 2),
    "shift_tolerant_neighbour": (ShiftTolerantNeighbour, 1, 2),
    "image_features_among_tokens": (ImageFeaturesAmongTokens, 1, 1),
}


def check_folds(module: Callable[[], nn.Module], folded: int, sites: int) -> None:
    model = randomise(module().double()).eval()
    ids = torch.arange(7)
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"})
    assert relative_error(compiled(ids), model(ids)) <= 1e-12
    (report,) = lncompile.reports(compiled)
    assert (report.folded, report.total) == (folded, sites), str(report)


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str, without_inductor: None) -> None:
    check_folds(*FOLDS[name])
