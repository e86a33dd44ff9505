"""A decoder for several processes, and how what they compute is compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from architectures import randomise
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional

from lncompile.compiled_graphs import compiled_graphs
from lncompile.passes.graph import expressions

WORLD = 2
#: Centering in the graph wherever it is possible, where this version can: gradients must be the same.
TRAINING = {"lnfold.training": "on"}
WIDTH, HEADS, VOCABULARY, LENGTH = 16, 4, 31, 6
Found = dict[str, Any]


class Block(nn.Module):
    """A pre-norm block of GPT-2's kind, with norms on the heads of queries and keys where wanted."""

    def __init__(self, norm_heads: bool = False) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm_heads = norm_heads
        if norm_heads:
            self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)

    def forward(self, stream: Tensor) -> Tensor:
        normed = self.attention_norm(stream)
        # As many heads as this process has.
        q, k, v = (layer(normed).unflatten(-1, (-1, WIDTH // HEADS)) for layer in (self.q, self.k, self.v))
        if self.norm_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        stream = stream + self.o(mixed.transpose(1, 2).flatten(2))
        return stream + self.down(functional.gelu(self.up(self.mlp_norm(stream))))


class Decoder(nn.Module):
    def __init__(self, layers: int = 2, norm_heads: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(norm_heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream))


def decoder(**arguments: Any) -> Decoder:
    model = Decoder(**arguments).double().eval()
    randomise(model)
    return model


def token_ids(seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def plan(**changes: ParallelStyle) -> dict[str, ParallelStyle]:
    columns = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
    return {**columns, "o": RowwiseParallel(), "down": RowwiseParallel(), **changes}


def parameters_by_kind(model: nn.Module) -> list[list[nn.Parameter]]:
    """Plain and sharded ones apart: one foreach step does not take both."""
    kinds: dict[type, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        kinds.setdefault(type(parameter.data), []).append(parameter)
    return list(kinds.values())


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def summary() -> Found:
    """Counts, reasons and words of what was compiled since the last reset."""
    reports = [record.report for record in compiled_graphs]
    sites = [site for report in reports for site in report.sites]
    return {
        "sites": len(sites),
        "folded": sum(site.folded for site in sites),
        "reasons": [site.reason.value for site in sites if site.reason is not None],
        "details": [site.detail for site in sites if not site.folded],
        "bytes": sum(weight.bytes for report in reports for weight in report.weights),
        "centerings": sum(len(report.centerings) for report in reports),
    }


def collectives_of_materialising() -> Any:
    """Count, in ``.counts``, the collectives that computing centered weights makes."""
    evaluate = expressions.Expression.evaluate
    counts: list[int] = []

    def counted(expression: Any, leaves: Any) -> Any:
        with CommDebugMode() as mode:
            value = evaluate(expression, leaves)
        counts.append(mode.get_total_counts())
        return value

    patch = mock.patch.object(expressions.Expression, "evaluate", counted)
    patch.counts = counts  # type: ignore[attr-defined]
    return patch


def collectives(function: Callable[..., Any], *arguments: Any) -> int:
    """Count the collectives of a call."""
    with CommDebugMode() as mode:
        function(*arguments)
    return mode.get_total_counts()


def compare(model: nn.Module, expected: Tensor, assist: str = "off") -> Found:
    """A model that was parallelised, compiled, next to what the whole model gave in eager."""
    ids = token_ids()
    # `compile` in place: a module around it would have the hooks that count collectives fire twice.
    compiled = copy.copy(model)
    compiled.compile(backend="lnfold", options={"lnfold.assist": assist})
    counting = collectives_of_materialising()
    with counting:
        actual = compiled(ids)
    return {
        "error": relative(actual, expected),
        **summary(),
        "materialised": len(counting.counts),
        "collectives_of_materialising": sum(counting.counts),
        "collectives": (collectives(compiled, ids), collectives(model, ids)),
    }


def in_parallel(mesh: DeviceMesh, styles: dict[str, ParallelStyle], **arguments: Any) -> Found:
    """A decoder whose blocks follow a plan."""
    model = decoder(**arguments)
    expected = model(token_ids())
    for block in model.blocks:
        parallelize_module(block, mesh, styles)
    return compare(model, expected)
