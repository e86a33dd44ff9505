"""Weights centered in place: the same function, the memory the report says, undone, and right after every update."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, randomise
from test_ownership import CENTERED, IDS, IN_PLACE, TOLERANCE, Stream, compiled, made
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lncompile
from lncompile.passes.graph.axes import Axes, Factor
from lncompile.passes.rewrites import arithmetic
from lncompile.reporting.report import merge
from lncompile.runtime import in_place, materialize, renewals

without_inductor = pytest.mark.usefixtures("without_inductor")


def storages(function: Any) -> dict[str, str]:
    return {weight.name: weight.storage for report in lncompile.reports(function) for weight in report.weights}


def centered_in(model: nn.Module) -> set[str]:
    """The names of those that hold a centered weight, whoever centered them."""
    axes = {name: Axes.of(value.shape, [value.dim() - 1 if "table" in name else 0]) for name, value in weights(model)}
    return {name for name, value in weights(model) if arithmetic.is_centered(value, axes[name])}


def weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in model.named_parameters() if name in CENTERED]


def kept_in_place(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if in_place.written(value) is not None}


# --- the arithmetic ---

SETS_OF_AXES = {
    "rows": Axes.of((8, 6), [0]),
    "columns": Axes.of((8, 6), [1]),
    "heads": Axes(((Factor(2, False), Factor(4, True)), (Factor(6, False),))),
    "a part": Axes(((Factor(2, False, (1,)), Factor(4, True)), (Factor(6, False),))),
    "everything": Axes.of((8, 6), [0, 1]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SETS_OF_AXES)
def test_means_are_what_centering_takes_out(kind: str, dtype: torch.dtype) -> None:
    axes = SETS_OF_AXES[kind]
    weight = (torch.randn(8, 6, dtype=torch.float64) + 0.3).to(dtype)
    centered = arithmetic.center_weight(weight, axes)
    means = arithmetic.means_of(weight, axes)
    assert means.numel() < weight.numel()
    restored = arithmetic.add_means(centered, means, axes)
    # Half a unit in the last place of the centered weight: the one rounding there is.
    eps = torch.finfo(dtype).eps
    assert ((restored - weight.double()).abs() <= 0.5 * eps * centered.double().abs() + 4e-16).all()
    assert not arithmetic.is_centered(weight, axes)
    assert arithmetic.is_centered(centered, axes)
    assert not arithmetic.is_centered(centered + (4 * eps * centered.abs().max()), axes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_bits(dtype: torch.dtype) -> None:
    weight = nn.Parameter((torch.randn(768, 64) * 0.02 + 0.001).to(dtype), requires_grad=False)
    original = weight.clone()
    record = in_place.write(weight, [Axes.of(weight.shape, [0])])
    assert record is not None
    assert record.nbytes == 64 * 8
    assert in_place.restore(weight)
    assert not in_place.restore(weight), "only once"
    same = (weight == original).float().mean()
    assert 0.9 < same < 1, "most are the original bits"
    assert ((weight - original).abs() <= torch.finfo(dtype).eps * (original.abs() + 0.01)).all()


# --- the same function ---


@without_inductor
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_eager_compiled_and_loaded_elsewhere(dtype: torch.dtype) -> None:
    model = made().to(dtype)
    exact = copy.deepcopy(model).double()(IDS)
    before = copy.deepcopy(model.state_dict())
    function = compiled(model)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]

    def close(logits: Tensor) -> None:
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.double(), exact, rtol=tolerance, atol=tolerance)

    close(function(IDS))
    assert storages(function) == dict.fromkeys(CENTERED, "inplace")
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == CENTERED
    close(model(IDS))
    close(function(IDS))
    fresh = made().to(dtype)
    fresh.load_state_dict(model.state_dict())
    close(fresh(IDS))
    for options in ({}, IN_PLACE):
        torch._dynamo.reset()
        again = torch.compile(fresh, backend="lnfold", options=options)
        close(again(IDS))
        assert storages(again) == dict.fromkeys(CENTERED, "centered")
        assert lncompile.reports(again)[0].extra_bytes == 0
        assert "3 centered before" in lncompile.reports(again)[0].summary()
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_models_through_inductor(name: str) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model = architecture.model().float()
    inputs = architecture.inputs(torch.float32)
    exact = copy.deepcopy(model).double()
    wide = architecture.inputs(torch.float64)
    first = lambda outputs: outputs[0]  # noqa: E731
    function = compiled(model)
    expected = first(exact(**wide, return_dict=False))
    for _ in range(2):
        torch.testing.assert_close(
            first(function(**inputs, return_dict=False)).double(), expected, rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(first(model(**inputs, return_dict=False)).double(), expected, rtol=1e-4, atol=1e-4)
    (report,) = lncompile.reports(function)
    assert report.folded == architecture.folded
    kinds = [weight.storage for weight in report.weights]
    assert kinds.count("inplace") >= len(kinds) - 2


@without_inductor
def test_nothing_is_written_twice() -> None:
    model = made()
    function = compiled(model)
    function(IDS)
    bits, versions = copy.deepcopy(model.state_dict()), [p._version for p in model.parameters()]
    for again in (lambda: None, lncompile.refresh, torch._dynamo.reset):
        again()
        function(IDS)
    assert versions == [p._version for p in model.parameters()]
    torch.testing.assert_close(model.state_dict(), bits, rtol=0, atol=0)
    assert kept_in_place(model) == CENTERED


# --- undone ---


@without_inductor
def test_restore() -> None:
    model = made()
    before, expected = copy.deepcopy(model.state_dict()), model(IDS)
    function = compiled(model)
    function(IDS)
    assert set(lncompile.restore(function)) == CENTERED
    torch.testing.assert_close(model.state_dict(), before, rtol=1e-15, atol=1e-15)
    assert lncompile.restore(model) == ()
    for _ in range(2):
        torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
    torch.testing.assert_close(model.state_dict(), before, rtol=1e-15, atol=1e-15)
    assert kept_in_place(model) == set()
    lncompile.refresh()
    torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
    assert kept_in_place(model) == CENTERED


@without_inductor
def test_restore_leaves_alone_what_was_written_since() -> None:
    model = made()
    function = compiled(model)
    function(IDS)
    model.branch.bias.mul_(2)
    model.table.weight.data.mul_(2)  # not counted
    values = copy.deepcopy(model.state_dict())
    assert lncompile.restore(model) == ("branch.weight",)
    for name in ("branch.bias", "table.weight"):
        assert torch.equal(model.state_dict()[name], values[name])
    torch.testing.assert_close(function(IDS), model(IDS), **TOLERANCE)


def test_restore_takes_a_module() -> None:
    with pytest.raises(TypeError, match="module"):
        lncompile.restore(lambda value: value)


# --- memory ---


class Deep(nn.Module):
    """Many linear layers in front of one norm, and a head that is tied to the first of them."""

    def __init__(self, layers: int = 40, width: int = 64, tied: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.tied = tied

    def forward(self, value: Tensor) -> Tensor:
        stream = self.layers[0](value)
        for layer in self.layers[1:]:
            stream = stream + layer(value)
        normed: Tensor = self.norm(stream)
        return self.layers[0](normed) if self.tied else normed


def living_bytes(known: set[int] = frozenset()) -> dict[int, int]:  # type: ignore[assignment]
    """Bytes of every storage of the process with values, by its identity, without those that are known."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter)]
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return {identity: size for identity, size in sizes.items() if identity not in known}


@without_inductor
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, IN_PLACE])
def test_the_bytes_of_the_report_are_those_that_were_allocated(options: dict[str, str], tied: bool) -> None:
    model = randomise(Deep(layers=6, tied=tied)).eval()
    value = torch.randn(3, 64)
    before = set(living_bytes())
    function = torch.compile(model, backend="lnfold", options=options)
    function(value)
    function(value)
    new = living_bytes(before)
    report = merge(lncompile.reports(function))
    copies = sum(p.nbytes for p in model.layers.parameters()) if not options else tied * 65 * 64 * 4
    means = (65 * 8 * (6 - tied)) if options else 0
    assert report.extra_bytes == copies + means
    assert sum(new.values()) == report.extra_bytes


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it had at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        read = {value.untyped_storage()._cdata for value in args if type(value) in (Tensor, nn.Parameter)}
        for tensor in made if isinstance(made, tuple | list) else [made]:
            # An alias of what there was is no memory.
            if type(tensor) is Tensor and tensor.untyped_storage()._cdata not in self._seen | read:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        identity, size = storage._cdata, storage.nbytes()
        self._seen.add(identity)
        self.now += size
        self.most = max(self.most, self.now)

        def freed() -> None:
            self._seen.discard(identity)
            self.now -= size

        weakref.finalize(storage, freed)


@without_inductor
def test_one_weight_at_a_time_is_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Deep()).eval()
    value = torch.randn(3, 64)
    function = compiled(model)
    expected = model(value)
    function(value)
    for parameter in model.layers.parameters():
        parameter.add_(0.01)
    peak = Peak()

    def measured(self: Any, arguments: Any) -> Any:
        with peak:  # around the call itself it would keep Dynamo from using what it compiled
            return refresh(self, arguments)

    refresh = materialize.Materializer._refresh
    monkeypatch.setattr(materialize.Materializer, "_refresh", measured)
    function(value)
    assert all(in_place.written(parameter) is not None for parameter in model.layers.parameters())
    weights = sum(p.nbytes for p in model.layers.parameters())
    assert 64 * 64 * 4 < peak.most < weights / 2, "some temporaries of one weight, in float64, of forty"
    assert (model(value) - expected).abs().max() < 1e-4


@without_inductor
def test_what_is_kept_is_freed_with_the_model() -> None:
    model = made()
    before = len(in_place._written)
    function = compiled(model)
    function(IDS)
    assert len(in_place._written) == before + 3
    means = [weakref.ref(value) for record in in_place._written.values() for value in record.means]
    torch._dynamo.reset()
    del model, function
    gc.collect()
    assert len(in_place._written) <= before
    assert sum(value() is None for value in means) >= 3


# --- updates afterwards ---


def step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    with torch.enable_grad():
        model(IDS).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def updates(model: Stream) -> dict[str, Callable[[], object]]:
    """Ways to give a model other weights."""
    other = randomise(Stream().double(), seed=7).eval()
    weight = model.branch.weight
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    fused = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    return {
        "in place": lambda: weight.mul_(2).add_(0.5),
        "a step of SGD": lambda: step(sgd, model),
        "a step of fused AdamW": lambda: step(fused, model),
        "load_state_dict": lambda: model.load_state_dict(other.state_dict()),
        "load_state_dict, assigned": lambda: model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
        "a swapped parameter": lambda: setattr(model.branch, "weight", nn.Parameter(other.branch.weight.clone())),
        "a swapped layer": lambda: setattr(model, "branch", copy.deepcopy(other.branch)),
        "other data": lambda: setattr(weight, "data", other.branch.weight.detach().clone()),
        "rounded": lambda: model.float().double(),
        "through .data, and refresh": lambda: (weight.data.mul_(torch.arange(8.0)), lncompile.refresh()),
    }


@without_inductor
@pytest.mark.parametrize("how", updates(Stream()))
def test_updates_are_centered_in_place_again(how: str) -> None:
    model = made()
    function = compiled(model)
    before = function(IDS)
    changes = updates(model)
    changes[how]()
    changes.clear()
    gc.collect()
    expected = model(IDS)
    for _ in range(2):
        torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
        torch.testing.assert_close(model(IDS), expected, **TOLERANCE)
    assert (expected - before).abs().max() > (1e-9 if how == "rounded" else 1e-2), "the control: it changed"
    assert centered_in(model) == CENTERED


@without_inductor
def test_already_centered_is_decided_anew_when_weights_change() -> None:
    source = made()
    compiled(source)(IDS)
    centered, raw = copy.deepcopy(source.state_dict()), made().state_dict()
    model = made()
    model.load_state_dict(centered)
    function = torch.compile(model, backend="lnfold")
    from lncompile.backend import compiled_graphs

    def copies() -> int:
        gc.collect()
        records = [record.materializer for record in compiled_graphs if record.report in lncompile.reports(function)]
        return sum(len(known.values) for m in records if m is not None for known in m._sets.values())

    counts = []
    for state in (centered, raw, centered, raw):
        model.load_state_dict(state)
        expected = model(IDS)
        for _ in range(2):
            torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)  # copy mode changes nothing
        counts.append(copies())
    assert counts == [0, 3, 0, 3]


@without_inductor
def test_training_and_evaluation_in_turn() -> None:
    model = made()
    function = torch.compile(model, backend="lnfold", options={**IN_PLACE, "lnfold.training": "on"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        expected = model(IDS)
        torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
        assert centered_in(model) == CENTERED
        with torch.enable_grad():
            wanted = torch.autograd.grad(model(IDS).square().mean(), list(model.parameters()))
            function(IDS).square().mean().backward()
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, **TOLERANCE)
        optimizer.step()
        optimizer.zero_grad()


@without_inductor
def test_without_the_check() -> None:
    model = made()
    expected = model(IDS)
    function = torch.compile(model, backend="lnfold", options={**IN_PLACE, "lnfold.check": "off"})
    for _ in range(2):
        torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
    assert kept_in_place(model) == CENTERED
    other = torch.compile(model, backend="lnfold", options={"lnfold.check": "off", "lnfold.assist": False})
    torch.testing.assert_close(other(IDS), expected, **TOLERANCE)


@without_inductor
def test_inference_mode() -> None:
    model = made()
    expected = model(IDS)
    function = compiled(model)
    with torch.inference_mode():
        torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
        model.branch.weight.add_(torch.arange(8))
        torch.testing.assert_close(function(IDS), model(IDS), **TOLERANCE)
    assert kept_in_place(model) == CENTERED


def test_an_unknown_value_is_an_error() -> None:
    with pytest.raises(lncompile.OptionError, match="'copy' or 'inplace'"):
        lncompile.options.parse_options(None, {"lnfold.weights": "in-place"})  # type: ignore[attr-defined]


@without_inductor
def test_fold_of_a_model_in_place() -> None:
    model = made()
    expected = model(IDS)
    compiled(model)(IDS)
    plan = lncompile.plan(model, IDS)
    assert plan.replace
    assert not plan.center, "it is done"
    torch.testing.assert_close(lncompile.fold(model, IDS)(IDS), expected, **TOLERANCE)
    assert kept_in_place(model) == CENTERED


# --- threads ---


def call(function: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return function(IDS)


@without_inductor
def test_two_callers_and_a_reload_between_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewals.Renewals, "are_too_many", lambda *_: False)  # a reload at every call is no use case
    model = made()
    states = [randomise(Stream().double(), seed=seed).state_dict() for seed in range(3)]
    function = compiled(model)
    call(function)
    rounds = 40
    barrier = threading.Barrier(3, timeout=60)

    def keep_calling() -> list[Tensor]:
        results = []
        for _ in range(rounds):
            barrier.wait()
            results.append(call(function))
            barrier.wait()
        return results

    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(keep_calling) for _ in range(2)]
        expected = []
        for state in itertools.islice(itertools.cycle(states), rounds):
            model.load_state_dict(state)
            expected.append(model(IDS))
            barrier.wait()
            barrier.wait()
        for caller in callers:
            torch.testing.assert_close(torch.stack(caller.result()), torch.stack(expected), **TOLERANCE)
    assert kept_in_place(model) == CENTERED


@without_inductor
def test_two_callers_while_a_third_exchanges_a_layer() -> None:
    model = made()
    layers = [randomise(Stream().double(), seed=seed).branch for seed in range(4)]
    answers = []
    for layer in layers:
        model.branch = layer
        answers.append(model(IDS))
    function = compiled(model)
    call(function)
    done = threading.Event()

    def exchange() -> None:
        for number in range(200):
            model.branch = layers[number % 4]
        done.set()

    def keep_calling() -> list[Tensor]:
        results = []
        while not done.is_set() or len(results) < 20:
            results.append(call(function))
        return results

    with ThreadPoolExecutor(3) as pool:
        callers = [pool.submit(keep_calling) for _ in range(2)]
        pool.submit(exchange).result()
        results = [result for caller in callers for result in caller.result()]
    distances = torch.stack([torch.stack([(r - a).abs().max() for a in answers]).min() for r in results])
    assert distances.max() < 1e-10
