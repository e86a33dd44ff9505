"""What the cases of ``test_rules`` are written with: a graph around one operation, and operations of several lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lncompile import Reason

D = 12
aten = torch.ops.aten


class Around(nn.Module):
    """Two streams ``[2, 5, 12]`` out of linear layers, an operation, and a LayerNorm over the last axes."""

    def __init__(self, operation: Callable[..., Tensor], norm: int | tuple[int, ...] = D) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, D), nn.Linear(7, D)
        self.norm = nn.LayerNorm(norm)
        self.scale = nn.Parameter(torch.zeros(D))
        self.row = nn.Parameter(torch.zeros(1, 5, 1))
        self.table = nn.Embedding(9, D, padding_idx=0)
        self.weight = nn.Parameter(torch.zeros(D, D))
        self.bias = nn.Parameter(torch.zeros(D))
        self.convolution = nn.Conv1d(5, D, 3, padding=1)
        self.image_convolution = nn.Conv2d(3, D, 2, stride=2)
        self.grouped = nn.Conv1d(6, D, 3, padding=1, groups=3)
        self.transposed = nn.ConvTranspose2d(3, D, 2)
        self.cube, self.wide = nn.Parameter(torch.zeros(D, D, 7)), nn.Parameter(torch.zeros(240, 1))
        self.transposed_in_groups = nn.ConvTranspose1d(6, D, 3, groups=3)
        self.batch_norm, self.row_batch_norm = nn.BatchNorm1d(D).eval(), nn.BatchNorm1d(5).eval()
        self.plain_batch_norm = nn.BatchNorm1d(D, affine=False).eval()
        self.training_batch_norm = nn.BatchNorm1d(D).train()
        self.image_batch_norm = nn.BatchNorm2d(D).eval()
        self.attention = nn.MultiheadAttention(D, 3, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))
        self.operation = operation

    def forward(self, value: Tensor, extra: dict[str, Tensor]) -> Tensor:
        return self.norm(self.operation(self, self.one(value), self.two(value), extra))


@dataclass(frozen=True)
class Case:
    rules: str
    operation: Callable[..., Tensor]
    reason: Reason | None = None
    norm: int | tuple[int, ...] = D


def written_mask(mask: Tensor) -> Tensor:
    mask = mask.expand(2, 5, D).clone()
    mask[..., :3] = ~mask[..., :3]
    return mask


def filled(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:] = y[:, 1:]
    return x


def cut_token(m: Around) -> Tensor:
    token = m.scale.expand(5, D).reshape(12, 5)
    return token + torch.relu(token).mean(-1, keepdim=True)


def raw_token(m: Around, x: Tensor) -> Tensor:
    token = m.scale[None, None].expand(2, 1, -1)
    return torch.cat((token, x), 1) + torch.relu(token).mean(-1, keepdim=True)


def with_weights(m: Around, x: Tensor) -> Tensor:
    output, weights = m.attention(torch.relu(x), torch.relu(x), torch.relu(x), need_weights=True)
    return output + weights.sum(-1, keepdim=True)


def iadd(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def folds(rules: str, operation: Callable[..., Tensor], norm: int | tuple[int, ...] = D) -> Case:
    return Case(rules, operation, None, norm)


def stays(rules: str, reason: Reason, operation: Callable[..., Tensor], norm: int | tuple[int, ...] = D) -> Case:
    return Case(rules, operation, reason, norm)


def rows(extra: dict[str, Tensor]) -> Tensor:
    return extra["columns"][None, :, None].expand(2, 3, D)


def overwritten_weight(m: Around) -> Tensor:
    weight = m.weight * 2
    weight[:, 0] = torch.relu(weight[:, 1])
    return weight


def overwritten(x: Tensor, y: Tensor) -> Tensor:
    x[:, 0] = y[:, 1]
    return x


def read_again(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1.0
    z.add_(y)
    return z


def written_through_view(x: Tensor, y: Tensor) -> Tensor:
    view = x.view(10, D)
    view += y.view(10, D)
    return x


def scaler(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return torch.relu(x - mean) * mean + x


def inplace_relu(x: Tensor) -> Tensor:
    functional.relu(x, inplace=True)
    return x
