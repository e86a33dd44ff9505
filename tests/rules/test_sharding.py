"""What is decided about sharded tensors, on one process that plays the first of two (torch's fake process group)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import randomise
from graphs import capture
from rule_cases import OF_SEVERAL_PROCESSES
from torch import Tensor, distributed, fx, nn
from torch_versions import IS_OLD

from lncompile import Reason
from lncompile.options import Options
from lncompile.passes.graph import sharding
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import canonicalise
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.passes.graph.factors import Factor

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")

D = 12


@pytest.fixture(autouse=True)
def first_of_two() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


class Sharded(nn.Module):
    """A linear layer whose weight is sharded, an operation on its result, and a LayerNorm over the last axis."""

    def __init__(self, cut: int, operation: Callable[..., Tensor], norm: int = D) -> None:
        super().__init__()
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        self.mesh = init_device_mesh("cpu", (2,))
        linear = randomise(nn.Linear(8, D, bias=False).double())
        self.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), self.mesh, [Shard(cut)]))
        self.plain = randomise(nn.Linear(8, D).double())
        self.norm = nn.LayerNorm(norm).double()
        self.operation = operation

    def forward(self, value: Tensor) -> Tensor:
        return self.norm(self.operation(self, value))


def placed(kind: str, dimension: int = 0) -> object:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return {"shard": Shard(dimension), "partial": Partial(), "maximum": Partial("max"), "replicate": Replicate()}[kind]


def whole(model: Sharded, value: Tensor, kind: str = "replicate") -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(value, model.mesh, [placed(kind, -1)])  # type: ignore[list-item]


def product(model: Sharded, value: Tensor) -> Tensor:
    return nn.functional.linear(whole(model, value), model.weight)


def gathered(value: Tensor) -> Tensor:
    return value.redistribute(placements=[placed("replicate")]).to_local()  # type: ignore[attr-defined]


def in_heads(model: Sharded, value: Tensor) -> Tensor:
    return product(model, value).to_local().unflatten(-1, (-1, model.norm.normalized_shape[0]))  # type: ignore[attr-defined]


def row(model: Sharded, value: Tensor) -> Tensor:
    return nn.functional.linear(whole(model, value[..., :4], "shard"), model.weight)


def summed(model: Sharded, value: Tensor, by: str) -> Tensor:
    from torch.distributed._functional_collectives import all_reduce

    return all_reduce(model.plain(value), by, model.mesh)


CASES: dict[str, tuple[int, int, Callable[..., Tensor], Reason | None]] = {
    "row-wise, summed": (1, D, lambda m, x: gathered(row(m, x)), None),
    "row-wise, one addend": (1, D, lambda m, x: row(m, x).to_local(), Reason.UNKNOWN_OPERATION),
    "column-wise, gathered": (0, D, lambda m, x: gathered(product(m, x)), Reason.UNSUPPORTED_WEIGHT),
    # Each process norms its own half of the features: two groups, both of which lie in one shard.
    "column-wise, a norm of the shard": (0, D // 2, lambda m, x: product(m, x).to_local(), None),
    "column-wise, norms of heads": (0, 3, in_heads, None),
    "column-wise, norms of heads that were gathered": (
        0, 3, lambda m, x: gathered(product(m, x)).unflatten(-1, (-1, 3)), None),
    # Three heads on two processes: the second lies on both.
    "column-wise, a head on two processes": (
        0, 4, lambda m, x: gathered(product(m, x)).unflatten(-1, (-1, 4)), Reason.UNSUPPORTED_WEIGHT),
    "joined pieces": (0, 2 * D, lambda m, x: gathered(whole(m, m.plain(x), "shard")), Reason.DIFFERENT_AXES),
    "joined pieces, norms of heads": (
        0, 3, lambda m, x: gathered(whole(m, m.plain(x), "shard")).unflatten(-1, (-1, 3)), None),
    "a sum of plain ones": (0, D, lambda m, x: gathered(whole(m, m.plain(x), "partial")), None),
    "a maximum of plain ones": (
        0, D, lambda m, x: gathered(whole(m, m.plain(x), "maximum")), Reason.UNKNOWN_OPERATION),
    "all_reduce": (0, D, lambda m, x: summed(m, x, "sum"), None),
    "all_reduce by maximum": (0, D, lambda m, x: summed(m, x, "max"), Reason.NON_COMMUTING),
}  # fmt: skip


def in_closures(graph: fx.Graph) -> int:
    """Spell borders as Dynamo does on torch 2.11: functions of its own that close over all but the tensor."""
    from torch.distributed.tensor import DTensor

    calls = {"to_local": "prim_to_local", "redistribute": "prim_redistribute", DTensor.from_local: "prim from_local"}
    borders = [node for node in graph.nodes if node.target in calls]
    for node in borders:
        node.target = closure(node.target, calls[node.target], node.args[1:], dict(node.kwargs))
        node.op, node.args, node.kwargs = "call_function", node.args[:1], {}
    return len(borders)


def closure(
    target: Any, name: str, args_as_value: tuple[Any, ...], kwargs_as_value: dict[str, Any]
) -> Callable[[Any], Any]:
    def function(value: Any) -> Any:
        return target, value, args_as_value, kwargs_as_value

    function.__name__, function.__module__ = name, "torch._dynamo.variables.tensor"
    return function


@pytest.mark.parametrize("spelled", ["as here", "in closures"])
@pytest.mark.parametrize("name", CASES)
def test_decision(name: str, spelled: str) -> None:
    cut, norm, operation, reason = CASES[name]
    model = Sharded(cut, operation, norm)
    captured = capture(model, torch.randn(2, 5, 8, dtype=torch.float64))
    if spelled == "in closures" and not in_closures(captured.graph_module.graph):
        assert name.startswith("all_reduce") or IS_OLD
    (site,) = captured.analyse(Options(assist="off")).verdicts
    assert site.reason is reason, site.detail


@pytest.mark.parametrize("run_check", [False, True])
def test_what_a_closure_holds_counts(run_check: bool) -> None:
    cut, norm, operation, _ = CASES["a sum of plain ones"]
    captured = capture(Sharded(cut, operation, norm), torch.randn(2, 5, 8, dtype=torch.float64))
    border = next(n for n in captured.graph_module.graph.nodes if "from_local" in getattr(n.target, "__name__", ""))
    if IS_OLD:  # it is in a closure already
        inspect.getclosurevars(border.target).nonlocals["kwargs_as_value"]["run_check"] = run_check
    else:
        border.kwargs = {**border.kwargs, "run_check": run_check}
        in_closures(captured.graph_module.graph)
    (site,) = captured.analyse(Options(assist="off")).verdicts
    assert site.folded is not run_check
    assert ("run_check" in site.detail) is run_check


def test_every_rule_has_a_case() -> None:
    found = set()
    for cut, norm, operation, reason in CASES.values():
        if reason is None:
            captured = capture(Sharded(cut, operation, norm), torch.randn(2, 5, 8, dtype=torch.float64))
            graph = copy_graph_module(captured.graph_module).graph  # in which operators have their overloads
            found |= {operation.name for node in graph.nodes if (operation := canonicalise(node)) is not None}
    assert found >= OF_SEVERAL_PROCESSES


def test_local_factors() -> None:
    value = Sharded(0, product).weight
    groups = Axes(((Factor(4, False), Factor(3, True)), (Factor(8, False),)))
    assert sharding.local_factors(value, 0, groups) == (Factor(2, False), Factor(3, True))
    assert sharding.centering_obstacle(value, groups) is None
    assert sharding.centering_obstacle(value, Axes.of(value.shape, [1])) is None
    assert "communication" in (sharding.centering_obstacle(value, Axes.of(value.shape, [0])) or "")
    assert sharding.local_bytes(value) == value.nbytes // 2


def test_sharded_weights_are_not_centered_at_every_step() -> None:
    model, value = Sharded(1, lambda m, x: gathered(product(m, x))), torch.randn(3, 8, dtype=torch.float64)
    with torch.enable_grad():
        (site,) = capture(model, value).analyse(Options(training="on")).verdicts
    assert site.reason is Reason.UNSUPPORTED_WEIGHT
    assert "sharded and trained" in site.detail
    (site,) = capture(model, value).analyse(Options(training="on")).verdicts
    assert site.folded
