"""`lncompile.fold`: what comes out of a folded module, and under which names it holds its weights."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import randomise
from fuzzing import centering_left_out
from graphs import capture
from torch import Tensor, fx, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

import lncompile
from lncompile.held_weights import Weight, hold_weights
from lncompile.passes.rewrites.uses import remove_unread
from lncompile.verification import relative_error

WIDTH = 16
TOLERANCE = 1e-10


def value(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module) -> nn.Module:
    return randomise(model.double()).eval()


def tensors(result: Any) -> list[Tensor]:
    """Every tensor in a result, objects of the test's own included."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Cache):
        return [*result.keys, result.last]
    items = result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


def check(model: nn.Module, folded: int, total: int, *others: tuple[Any, ...], x: Tensor | None = None) -> Any:
    """Fold a model with one example, compare with eager for that and for others, and return the module."""
    x = value(2, 5) if x is None else x
    module = lncompile.fold(model, x)
    assert (module.report.folded, module.report.total) == (folded, total), str(module.report)
    for arguments in ((x,), (value(2, 5, seed=1),), *others):
        expected, actual = tensors(model(*arguments)), tensors(module(*arguments))
        assert len(actual) == len(expected) > 0
        for one, other in zip(actual, expected, strict=True):
            assert relative_error(one, other) <= TOLERANCE
    return module


# --- weights that are read in several ways ---


class QueriesAndKeysNormed(nn.Module):
    """Queries and keys are normed head by head, values are not: a part of the joint projection is centered."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // heads), nn.LayerNorm(WIDTH // heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(attended.transpose(1, 2).flatten(2))


class ReadRawAsWell(nn.Module):
    """One weight and one bias read by a norm, and as they are by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) + torch.tanh(self.linear(0.5 * x)) + self.linear.bias.square()


class CalledTwice(nn.Module):
    """One layer, called twice in the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(torch.relu(self.norm(self.linear(x)))))


class RawProductFirst(nn.Module):
    """The graph begins with a product that becomes a layer, and reads other weights behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(torch.relu(self.first(x)))) * self.scale


def test_a_part_of_a_joint_projection() -> None:
    module = check(randomised(QueriesAndKeysNormed()), 2, 2)
    # One weight is held once, and the raw one, which nothing reads any more, is not.
    assert sorted(name for name, _ in module.named_parameters() if "qkv" in name) == [
        "folded.qkv.bias",
        "folded.qkv.weight",
    ]


def test_a_weight_that_is_read_raw_as_well_is_held_under_two_names() -> None:
    model = randomised(ReadRawAsWell())
    module = check(model, 1, 1)
    state = module.folded.state_dict()
    raw = [name for name, tensor in state.items() if torch.equal(tensor, model.linear.weight)]
    means = {name: float(tensor.mean(0).abs().max()) for name, tensor in state.items() if tensor.shape == (16, 16)}
    assert len(raw) == 1
    assert len(means) == 2
    assert all((mean < 1e-12) == (name not in raw) for name, mean in means.items())
    assert torch.equal(state["linear.bias"], model.linear.bias)


def test_a_layer_that_is_called_twice_is_one_layer() -> None:
    module = check(randomised(CalledTwice()), 2, 2)
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    assert layers == ["folded.linear"]
    assert sum(node.op == "call_module" for node in module.folded.graph.nodes) == 2


def test_a_graph_that_begins_with_a_layer() -> None:
    module = check(randomised(RawProductFirst()), 1, 1)
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    assert layers == ["folded.first", "folded.linear"]


@pytest.mark.parametrize("model", [QueriesAndKeysNormed, ReadRawAsWell, CalledTwice, RawProductFirst])
def test_control_without_centering(model: Callable[[], nn.Module]) -> None:
    net, x = randomised(model()), value(2, 5)
    with centering_left_out():
        module = lncompile.fold(net, x)
    assert relative_error(module(x), net(x)) > 1e-4


# --- results ---


class Cache:
    """An object that torch's containers do not know."""

    def __init__(self, last: Tensor, keys: list[Tensor], name: str = "cache") -> None:
        self.last, self.keys, self.name = last, keys, name


@dataclass
class Kept:
    """A plain object without a tensor."""

    name: str


KEPT = Kept("constant")


class Returns(nn.Module):
    """A norm, and a result made by a function of the module, its input and the norm's output."""

    def __init__(self, make: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.norm, self.make = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self, x, self.norm(self.linear(x)))


RESULTS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "none_and_tuples": lambda m, x, y: {"last": y, "states": (y, None), "cache": None},
    "nested": lambda m, x, y: [(y, [y.sum(-1), {"a": (y + 1,), "b": []}]), None, (), 3, "name", 0.5, True],
    "model_output": lambda m, x, y: BaseModelOutput(last_hidden_state=y, hidden_states=(x, y), attentions=None),
    "argument": lambda m, x, y: (x, y, x),
    "argument_alone": lambda m, x, y: x,
    "parameter": lambda m, x, y: (m.linear.weight, y, m.norm.bias),
    "view": lambda m, x, y: (y, y.flatten(), y[0]),
    "object": lambda m, x, y: (y, Cache(y.relu(), [x, y, y.sum(-1)]), KEPT),
    "twice_in_an_object": lambda m, x, y: (y, Cache(y, [y])),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results(name: str) -> None:
    model, x = randomised(Returns(RESULTS[name])), value(2, 5)
    module = check(model, 1, 1)
    expected, actual = model(x), module(x)
    assert type(actual) is type(expected)
    form, actual_form = (torch.utils._pytree.tree_flatten(result)[1] for result in (expected, actual))
    assert str(form) == str(actual_form)
    for one, other in zip(*(torch.utils._pytree.tree_leaves(r) for r in (actual, expected)), strict=True):
        assert type(one) is type(other) or isinstance(one, Tensor)
        assert not isinstance(one, int | str | float | Kept) or one == other


def test_what_is_one_object_stays_one() -> None:
    module = check(randomised(Returns(RESULTS["twice_in_an_object"])), 1, 1)
    result, cache = module(value(2, 5))
    assert cache.last is result
    assert cache.keys[0] is result
    assert cache.name == "cache"
    x = value(2, 5)
    assert check(randomised(Returns(RESULTS["argument"])), 1, 1)(x)[0] is x


def test_objects_survive_copies_and_files() -> None:
    model, x = randomised(Returns(RESULTS["object"])), value(2, 5, seed=3)
    module = check(model, 1, 1)
    expected = tensors(model(x))
    copied = tensors(copy.deepcopy(module)(x))
    form = pickle.loads(pickle.dumps(module._signature))
    outputs = module.folded(*module._signature.inputs((x,), {}))
    for actual in (copied, tensors(form.outputs(outputs, (x,), {}))):
        assert max(relative_error(a, b) for a, b in zip(actual, expected, strict=True)) <= TOLERANCE


def test_an_array_is_refused() -> None:
    """It would be the example's at every call."""
    model = randomised(Returns(lambda m, x, y: (y, y.numpy())))
    with pytest.raises(TypeError, match="ndarray of NumPy"):
        lncompile.fold(model, value(2, 5))


def test_a_size_in_the_result_is_the_call_s() -> None:
    model = randomised(Returns(lambda m, x, y: (y, x.shape[1], x.shape[1] * 2, 5)))
    x = value(2, 5)
    torch._dynamo.mark_dynamic(x, 1)
    module = lncompile.fold(model, x)
    for length in (5, 9):
        result, *numbers = module(value(2, length))
        assert numbers == [length, 2 * length, 5]
        assert relative_error(result, model(value(2, length))[0]) <= TOLERANCE


def test_models_without_a_graph_and_of_torch() -> None:
    x = value(2, 5)
    assert lncompile.fold(nn.Identity().eval(), x)(x) is x
    layer = randomised(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)))
    check(layer, 1, 1)


def test_sizes_compiled_for_before_do_not_matter() -> None:
    model = randomised(Returns(RESULTS["argument"]))
    for length in (3, 4):
        torch.compile(model, backend="eager")(value(2, length))
    module = lncompile.fold(model, value(2, 5))
    with pytest.raises(lncompile.CallError, match=r"shape \[2, 5, 16\], not \[2, 6, 16\]"):
        module(value(2, 6))


def test_what_dynamo_gave_up_on_before_is_captured_all_the_same() -> None:
    """Dynamo leaves code alone that it could not compile once. As an eager result its outputs would be constants."""

    class GivenUp(Returns):
        def forward(self, x: Tensor) -> Any:
            return self.make(self, x, self.norm(self.linear(x)))

    model = randomised(GivenUp(RESULTS["nested"]))
    torch._dynamo.eval_frame.skip_code(GivenUp.forward.__code__)
    check(model, 1, 1)


def test_without_dynamo_nothing_is_taken_for_a_constant() -> None:
    model = randomised(Returns(RESULTS["nested"]))
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="made 0 graphs"):
        lncompile.fold(model, value(2, 5))


# --- what a model keeps beside its parameters ---


class TableByDevice(nn.Module):
    """Keeps a dictionary of tensors by device, which a first call fills, and a tensor that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.bias: nn.Parameter = nn.Parameter(torch.empty(WIDTH))
        self.by_device: dict[str, Tensor] = {}
        self.tables = {"forward": torch.arange(1.0, WIDTH + 1), "a b.c": [torch.ones(WIDTH) / 3]}

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if key not in self.by_device:
            self.by_device[key] = self.bias[torch.arange(x.shape[-1])]
        constant = torch.tensor([0.5, 1.5] * (WIDTH // 2), dtype=x.dtype)
        tables = self.tables["forward"] * self.tables["a b.c"][0] * constant
        return self.norm(self.linear(x)) + self.by_device[key] + tables


class Remembers(nn.Module):
    """Keeps its last stream, which the caller does not get."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x))
        self.last = self.head(y)
        return y


class Counts(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.norm(self.linear(x)) * self.calls


@pytest.mark.parametrize("filled", [False, True])
def test_tables_by_device(filled: bool) -> None:
    model = randomised(TableByDevice())
    if filled:
        model(value(1, 2))
    module = check(model, 1, 1)
    held = dict(module.folded.named_buffers())
    assert torch.equal(held["by_device.cpu_"], model.by_device["cpu"])
    assert torch.equal(held["tables.forward_"], model.tables["forward"])
    assert not {t.untyped_storage().data_ptr() for t in module.state_dict().values()} & {
        t.untyped_storage().data_ptr() for t in [*model.state_dict().values(), *tensors(model.tables)]
    }


def test_what_only_the_model_keeps_is_not_computed() -> None:
    module = check(randomised(Remembers()), 1, 1)
    assert not [name for name, _ in module.named_parameters() if "head" in name]


def test_a_buffer_that_is_written_to_is_the_module_s_own() -> None:
    model = randomised(Counts())
    x = value(2, 5)
    module = lncompile.fold(model, x)
    before = float(model.calls)
    for _ in range(2):
        assert relative_error(module(x), model(x)) <= TOLERANCE
    assert float(module.folded.calls) == float(model.calls) == before + 2


# --- names ---


def held(*weights: tuple[str, str], attributes: tuple[str, ...] = ()) -> list[str]:
    """The paths under which tensors are held that want these names (with a suffix), and are read by a sum."""
    graph = fx.Graph()
    placeholders = [graph.placeholder(f"p{index}") for index in range(len(weights))]
    present = [graph.get_attr(path) for path in attributes]
    total = None
    for node in (*placeholders, *present):
        total = node if total is None else graph.call_function(torch.add, (total, node))
    graph.output(total)
    wanted = [
        Weight(placeholder, torch.full((1,), float(index)), *names)
        for index, (placeholder, names) in enumerate(zip(placeholders, weights, strict=True))
    ]
    paths = hold_weights(graph, wanted, {path: torch.full((1,), 100.0) for path in attributes})
    module = fx.GraphModule(paths, graph)
    graph.lint()
    assert float(module()) == sum(range(len(weights))) + 100.0 * len(attributes)
    assert len(module.state_dict()) == len(weights) + len(attributes)
    return [path for path in paths if path not in attributes]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([("a.weight", ""), ("a.weight", "_centered")], ["a.weight", "a_centered.weight"]),
        (
            [("a.weight", ""), ("a.weight", "_centered"), ("a.weight", "_centered")],
            ["a.weight", "a_centered.weight", "a_centered_2.weight"],
        ),
        ([("a.weight", ""), ("a.weight", "")], ["a.weight", "a_2.weight"]),
        ([("a", ""), ("a.b", ""), ("a.b.c", "")], ["a", "a_2.b", "a_3.b.c"]),
        ([("a.b.c", ""), ("a.b", ""), ("a", "")], ["a.b.c", "a_2.b", "a_3"]),
        ([("cpu", ""), ("graph", ""), ("a.graph", ""), ("a.forward", "")], ["cpu_", "graph_", "a.graph", "a.forward_"]),
        ([("a[0] b", ""), ("x..y", "")], ["a_0__b", "x.y"]),
        ([("weight", ""), ("weight", "_centered")], ["weight", "weight_centered"]),
    ],
)
def test_names(weights: list[tuple[str, str]], expected: list[str]) -> None:
    assert held(*weights) == expected


def test_names_of_a_graph_s_own_attributes_stay() -> None:
    assert held(("a.weight", ""), ("b", ""), attributes=("a.weight", "b.c")) == ["a_2.weight", "b_2"]


def test_no_order_of_names_gives_one_twice() -> None:
    wanted = [("a", ""), ("a.b", ""), ("a.b", "_centered"), ("a_centered", ""), ("a.b.c", "_centered"), ("a_2.b", "")]
    for order in itertools.permutations(wanted):
        held(*order)


# --- what nothing reads ---


def test_unread_nodes_are_taken_out_and_effects_stay() -> None:
    def function(x: Tensor, cache: Tensor, weight: Tensor) -> Tensor:
        cache.add_(1)
        mapped = torch.vmap(lambda row: torch.relu(row))(x)
        with torch.autocast("cpu", torch.bfloat16):
            return mapped + x.matmul(weight).relu()

    captured = capture(function, value(4), value(4), torch.eye(WIDTH, dtype=torch.float64))
    graph = captured.graph_module.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    before = [node.name for node in graph.nodes]
    remove_unread(graph)
    assert [node.name for node in graph.nodes] == before, "everything is read, or has an effect"
    vmap = [node.name for node in graph.nodes if "vmap" in str(node.target)]
    matmul = next(node for node in graph.nodes if node.target == "matmul")
    read = next(node for node in output.args[0] if isinstance(node, fx.Node))
    read.replace_input_with(next(node for node in read.all_input_nodes if node is not read.args[0]), read.args[0])
    remove_unread(graph)
    left = [node.name for node in graph.nodes]
    assert matmul.name not in left
    assert set(vmap) <= set(left)
    assert any("add_" in str(node.target) for node in graph.nodes)
    assert any("autocast" in str(node.target) for node in graph.nodes)
    assert sum(node.op == "placeholder" for node in graph.nodes) == 3
