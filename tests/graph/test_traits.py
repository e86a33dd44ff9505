"""The table of traits: each trait's sentence holds for each operation that has it, and passes that ask agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import capture
from torch import Tensor, nn

from lncompile.options import Options
from lncompile.passes.graph.canonical import canonicalise
from lncompile.passes.graph.spellings import FUNCTIONS, METHODS
from lncompile.passes.graph.traits import TRAITS, VIEWS, Trait, has, is_pointwise
from lncompile.passes.graph.uniform import uniform_value

X = torch.arange(24.0).reshape(2, 3, 4)
OTHER = torch.zeros(4, 6, dtype=torch.float64)
ROWS = torch.tensor([1, 0, 1])
MEANS = torch.zeros(2, 3, 1)

# One call of each operation that hands on values, on X.
CALLS: dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]] = {
    "identity": lambda x: +x,
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "cast": lambda x: x.double(),
    "to": lambda x: x.to(torch.float64),
    "type_as": lambda x: x.type_as(OTHER),
    "view": lambda x: x.view(6, 4),
    "reshape": lambda x: x.reshape(4, 6),
    "view_as": lambda x: x.view_as(OTHER),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "squeeze": lambda x: x.squeeze(),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(0, 1),
    "t": lambda x: x.flatten(1).t(),
    "mT": lambda x: x.mT,
    "movedim": lambda x: torch.movedim(x, 0, 2),
    "expand": lambda x: x[:, None].expand(-1, 5, -1, -1),
    "expand_as": lambda x: x.expand_as(torch.zeros(5, 2, 3, 4)),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "getitem": lambda x: x[:, 1],
    "narrow": lambda x: x.narrow(1, 0, 2),
    "slice": lambda x: torch.ops.aten.slice.Tensor(x, 1, 0, 2),
    "select": lambda x: x.select(1, 0),
    "split": lambda x: x.split(2, 1),
    "chunk": lambda x: x.chunk(2, 2),
    "unbind": lambda x: x.unbind(0),
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "index_select": lambda x: x.index_select(1, ROWS),
    "gather": lambda x: x.gather(1, ROWS.view(1, 3, 1).expand(2, 3, 4)),
    "take_along_dim": lambda x: torch.take_along_dim(x, ROWS.view(1, 3, 1), 1),
    "index": lambda x: torch.ops.aten.index.Tensor(x, [None, ROWS]),
    "embedding": lambda x: nn.functional.embedding(ROWS, x.flatten(1)),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x]),
    "where": lambda x: torch.where(x > 3, x, -x),
    "masked_fill": lambda x: x.masked_fill(x > 3, 0.0),
}
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "neg"}


def results(name: str) -> list[Tensor]:
    found = CALLS[name](X)
    return list(found) if isinstance(found, tuple) else [found]


def with_trait(trait: Trait) -> set[str]:
    return {name for name, traits in TRAITS.items() if traits & trait}


def operations(function: Callable[[Tensor], object]) -> set[str]:
    nodes = capture(function, X).graph_module.graph.nodes
    return {operation.name for node in nodes if (operation := canonicalise(node)) is not None}


def test_every_name_is_that_of_an_operation() -> None:
    known = {spelling.name for spelling in (*FUNCTIONS.values(), *METHODS.values())}
    assert set(TRAITS) <= known
    assert set(TRAITS) == set(CALLS) | ARITHMETIC


@pytest.mark.parametrize("name", CALLS)
def test_the_call_is_that_operation(name: str) -> None:
    # `mT` is an attribute; all others are nodes of their own.
    assert name in operations(CALLS[name])


@pytest.mark.parametrize("name", sorted(with_trait(Trait.PASSES | Trait.DROPS | Trait.CASTS | Trait.RESHAPES)))
def test_same_elements_in_the_same_order(name: str) -> None:
    (result,) = results(name)
    assert torch.equal(result.flatten().float(), X.flatten())
    if name not in with_trait(Trait.RESHAPES):
        assert result.shape == X.shape


@pytest.mark.parametrize("name", sorted(with_trait(Trait.PERMUTES | Trait.ROTATES)))
def test_same_elements_elsewhere(name: str) -> None:
    (result,) = results(name)
    assert torch.equal(result.flatten().sort().values, X.flatten())
    assert not torch.equal(result.flatten(), X.flatten()), "a call that tells"


@pytest.mark.parametrize("name", sorted(with_trait(Trait.EXPANDS | Trait.TILES | Trait.JOINS)))
def test_every_element_equally_often(name: str) -> None:
    (result,) = results(name)
    counts = torch.unique(result, return_counts=True)[1]
    assert len(counts) == X.numel()
    assert counts.unique().tolist() == [result.numel() // X.numel()]
    assert result.numel() > X.numel()


@pytest.mark.parametrize("name", sorted(with_trait(Trait.CUTS | Trait.SPLITS)))
def test_some_of_the_elements_once(name: str) -> None:
    values = torch.cat([result.flatten() for result in results(name)])
    assert set(values.tolist()) <= set(X.flatten().tolist())
    assert len(values) == len(values.unique())
    assert (len(values) == X.numel()) == bool(TRAITS[name] & Trait.SPLITS)


@pytest.mark.parametrize("name", sorted(with_trait(Trait.SELECTS | Trait.LOOKS_UP | Trait.DUPLICATES)))
def test_elements_perhaps_several_times(name: str) -> None:
    (result,) = results(name)
    assert set(result.flatten().tolist()) <= set(X.flatten().tolist())
    assert result.numel() > len(result.unique())


def test_like_another_reads_no_value_of_it() -> None:
    for name in with_trait(Trait.RESEMBLES):
        like = torch.full((5, 2, 3, 4) if name == "expand_as" else (4, 6), torch.nan, dtype=torch.float64)
        assert not getattr(X, name)(like).isnan().any()


def test_asking() -> None:
    graph = capture(lambda x: torch.relu(x.transpose(0, 1)).sqrt_() + torch.linalg.norm(x), X).graph_module.graph
    transposed, activated, rooted, norm, _ = [node for node in graph.nodes if node.op.startswith("call")]
    assert has(canonicalise(transposed), VIEWS)
    assert not has(canonicalise(transposed), Trait.RESHAPES | Trait.CASTS)
    assert not has(canonicalise(activated), VIEWS)
    assert not has(None, VIEWS)
    assert [is_pointwise(node) for node in (transposed, activated, rooted, norm)] == [False, True, True, False]


# --- where tables differed by accident ---


def numbers(function: Callable[[Tensor], Tensor]) -> object:
    graph = capture(function, X).graph_module.graph
    product = next(node for node in graph.nodes if node.target is torch.ops.aten.matmul.default)
    return uniform_value(product.args[1])


def test_a_slice_hands_on_a_uniform_number() -> None:
    aten = torch.ops.aten

    def sliced(x: Tensor) -> Tensor:
        return aten.matmul.default(x, aten.slice.Tensor(torch.full((8, 1), 0.25), 0, 0, 4))

    def of_another(x: Tensor) -> Tensor:
        return aten.matmul.default(x, aten.slice.Tensor(x[0].t(), 0, 0, 4))

    assert numbers(sliced) == 0.25
    assert numbers(of_another) is None


class Chain(nn.Module):
    def __init__(self, mean: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer, self.mean = nn.Linear(4, 4), nn.Linear(4, 4), mean

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        difference = x - self.mean(x)
        return self.outer(difference * torch.rsqrt(difference.pow(2).mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize(
    ("mean", "folded"),
    [
        (lambda x: x.mean(-1).view_as(MEANS), 1),
        (lambda x: x.mean(-1, keepdim=True).type_as(x), 1),
        (lambda x: x.mean(-1).view_as(MEANS).sin(), 0),
    ],
    ids=["view_as", "type_as", "no view"],
)
def test_views_of_a_mean(mean: Callable[[Tensor], Tensor], folded: int) -> None:
    analysis = capture(Chain(mean), X).analyse(Options(assist="off"))
    assert sum(verdict.folded for verdict in analysis.verdicts) == folded
