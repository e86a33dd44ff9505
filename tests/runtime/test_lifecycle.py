"""Weights come from the call's actual arguments: never a stale answer, never a shared storage damaged."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from architectures import ARCHITECTURES, randomise, tokens
from torch import Tensor, nn

import lncompile
from lncompile.runtime.shared_values import shared_values

pytestmark = pytest.mark.usefixtures("without_inductor")

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


class Block(nn.Module):
    """A pre-norm residual block whose stream starts in the block: its norm folds into `inner`."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.outer = nn.Linear(width, width)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.outer(self.norm(self.inner(value)))


def gpt2() -> nn.Module:
    return next(a for a in ARCHITECTURES if a.name == "gpt2").model()


def logits(model: Callable[..., object]) -> Tensor:
    return model(input_ids=tokens(), use_cache=False).logits  # type: ignore[attr-defined]


def test_one_graph_serves_three_parameter_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = nn.ModuleList([Block() for _ in range(3)]).double()
    randomise(blocks)
    value = torch.randn(5, 16, dtype=torch.float64)
    expected = value
    for block in blocks:
        expected = block(expected)
    for block in blocks:
        block.compile(backend="lnfold")
    for _ in range(2):
        actual = value
        for block in blocks:
            actual = block(actual)
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert len({id(report) for block in blocks for report in lncompile.reports(block)}) == 1, "Dynamo made one graph"


def test_in_place_update_is_seen_at_the_next_call() -> None:
    model = gpt2()
    compiled = torch.compile(model, backend="lnfold")
    before = logits(compiled)
    weight = model.get_parameter("transformer.h.0.mlp.c_proj.weight")
    weight.mul_(1.5).add_(0.25)
    after = logits(compiled)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, logits(model), **TOLERANCE)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign: bool) -> None:
    model, other = gpt2(), randomise(gpt2(), seed=5)
    compiled = torch.compile(model, backend="lnfold")
    logits(compiled)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    if assign:
        model.tie_weights()  # type: ignore[operator]
    torch.testing.assert_close(logits(compiled), logits(other), **TOLERANCE)


def test_swapped_parameter() -> None:
    model = gpt2()
    compiled = torch.compile(model, backend="lnfold")
    logits(compiled)
    projection = model.get_submodule("transformer.h.1.attn.c_proj")
    projection.weight = nn.Parameter(torch.randn_like(projection.weight) + 0.5)
    torch.testing.assert_close(logits(compiled), logits(model), **TOLERANCE)


def test_without_the_check_weights_are_those_of_the_first_call() -> None:
    model = gpt2()
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.check": "off"})
    before = logits(compiled)
    model.get_parameter("transformer.h.0.mlp.c_proj.weight").mul_(1.5).add_(0.25)
    torch.testing.assert_close(logits(compiled), before, **TOLERANCE)
    lncompile.refresh()
    torch.testing.assert_close(logits(compiled), logits(model), **TOLERANCE)


def test_without_the_check_each_set_of_parameters_has_its_own_weights() -> None:
    blocks = [randomise(gpt2(), seed=seed) for seed in (1, 2)]
    options = {"lnfold.check": "off"}
    compiled = [torch.compile(block, backend="lnfold", options=options) for block in blocks]
    for _ in range(2):
        for each, block in zip(compiled, blocks, strict=True):
            torch.testing.assert_close(logits(each), logits(block), **TOLERANCE)


def test_write_through_data_needs_refresh() -> None:
    model = gpt2()
    compiled = torch.compile(model, backend="lnfold")
    logits(compiled)
    model.get_parameter("transformer.h.0.mlp.c_proj.bias").data.add_(torch.arange(32.0, dtype=torch.float64))
    lncompile.refresh()
    torch.testing.assert_close(logits(compiled), logits(model), **TOLERANCE)


def test_tied_embedding_keeps_its_raw_table_for_the_head() -> None:
    model = gpt2()
    assert model.get_parameter("transformer.wte.weight") is model.lm_head.weight
    torch.testing.assert_close(logits(torch.compile(model, backend="lnfold")), logits(model), **TOLERANCE)


def test_a_weight_that_other_code_also_reads_is_not_damaged() -> None:
    class Shared(nn.Module):
        """One linear layer, called before the norm and beside it."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, value: Tensor) -> Tensor:
            return self.norm(self.linear(value)) + torch.relu(self.linear(value))

    model = randomise(Shared().double())
    value = torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold")
    torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
    assert lncompile.reports(compiled)[0].folded == 1


def test_copies_are_shared_between_graphs_and_freed_with_the_model() -> None:
    gc.collect()
    model = randomise(Block().double())
    first = torch.compile(model, backend="lnfold")
    second = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"})
    first(torch.randn(5, 16, dtype=torch.float64))
    entries = len(shared_values._entries)
    assert entries >= 2  # weight and bias
    second(torch.randn(5, 16, dtype=torch.float64))
    assert len(shared_values._entries) == entries, "a second graph made copies of its own"

    alive = weakref.ref(model.inner.weight)
    del model, first, second
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None
    assert len(shared_values._entries) <= entries - 2


def test_an_update_does_not_grow_memory() -> None:
    model = randomise(Block().double())
    compiled = torch.compile(model, backend="lnfold")
    value = torch.randn(5, 16, dtype=torch.float64)
    compiled(value)
    entries = len(shared_values._entries)
    for _ in range(5):
        model.inner.weight.add_(0.1)
        torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
    assert len(shared_values._entries) == entries


def test_model_made_under_inference_mode_stays_untouched() -> None:
    with torch.inference_mode():
        model = randomise(Block().double())
        value = torch.randn(5, 16, dtype=torch.float64)
        compiled = torch.compile(model, backend="lnfold")
        torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
    (site,) = lncompile.reports(compiled)[0].sites
    assert site.reason is lncompile.Reason.UNSUPPORTED_WEIGHT
    assert "inference_mode" in site.detail


def test_two_parameters_on_one_storage_of_which_one_is_written_to() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.norm = nn.LayerNorm(8)

        def forward(self, value: Tensor) -> Tensor:
            self.alias.mul_(1.25)
            return self.norm(self.inner(value))

    def build() -> nn.Module:
        model = randomise(Written().double())
        model.alias = nn.Parameter(model.inner.weight.detach()[:4])
        return model

    model, reference = build(), build()
    value = torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold")
    for _ in range(2):
        torch.testing.assert_close(compiled(value), reference(value), **TOLERANCE)
    assert lncompile.reports(compiled)[0].folded == 0


def test_two_models_in_one_process() -> None:
    models = [randomise(Block().double(), seed) for seed in (1, 2)]
    compiled = [torch.compile(model, backend="lnfold") for model in models]
    value = torch.randn(5, 16, dtype=torch.float64)
    for _ in range(2):
        for one, model in zip(compiled, models, strict=True):
            torch.testing.assert_close(one(value), model(value), **TOLERANCE)
    for one in compiled:
        assert sum(report.folded for report in lncompile.reports(one)) == 1


def test_values_made_under_inference_mode_serve_calls_with_gradients() -> None:
    model = randomise(Block().double()).requires_grad_(False)
    compiled = torch.compile(model, backend="lnfold")
    value = torch.randn(5, 16, dtype=torch.float64)
    with torch.inference_mode():
        compiled(value)
    with torch.enable_grad():
        leaf = value.clone().requires_grad_()
        (actual,) = torch.autograd.grad(compiled(leaf).square().sum(), leaf)
        (expected,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    torch.testing.assert_close(actual, expected, **TOLERANCE)


# --- what a report says is what the process has ---


def allocated() -> dict[int, torch.UntypedStorage]:
    """Every storage that a tensor in this process holds, by address; held, so that no address is used again."""
    gc.collect()
    held = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            held[storage.data_ptr()] = storage
    return held


def grown_since(before: dict[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for address, storage in allocated().items() if address not in before)


def test_bytes_of_a_tied_model_are_those_allocated() -> None:
    model = gpt2()
    before = allocated()
    compiled = torch.compile(model, backend="lnfold")
    logits(compiled)
    (report,) = lncompile.reports(compiled)
    assert report.folded == 5
    assert report.extra_bytes == grown_since(before) > 0
    assert lncompile.explain(compiled, input_ids=tokens(), use_cache=False).weights == report.weights
    # Nothing more by a change of all weights, which makes new copies in the place of the old ones.
    for parameter in model.parameters():
        parameter.mul_(1.5)
    logits(compiled)
    assert report.extra_bytes == grown_since(before)
    torch._dynamo.reset()
    del compiled
    assert grown_since(before) == 0


def test_bytes_of_three_blocks_under_one_graph() -> None:
    """A report speaks of one set of parameters: each block has as many bytes beside it."""
    blocks = nn.ModuleList([Block() for _ in range(3)]).double()
    randomise(blocks)
    value = torch.randn(5, 16, dtype=torch.float64)
    for block in blocks:
        block.compile(backend="lnfold")
    before = allocated()
    for number, block in enumerate(blocks, 1):
        block(value)
        (report,) = lncompile.reports(block)
        assert report.extra_bytes == 8 * (16 * 16 + 16)
        assert grown_since(before) == number * report.extra_bytes


def test_bytes_of_two_graphs_of_one_model() -> None:
    """One more graph of the same weights makes no further copy; the report of both counts each copy once."""
    model = gpt2()
    compiled = torch.compile(model, backend="lnfold")
    before = allocated()
    for length in (5, 9):
        compiled(input_ids=tokens(2, length), use_cache=False)
    reports = lncompile.reports(compiled)
    assert len(reports) == 2
    assert {report.extra_bytes for report in reports} == {grown_since(before)}
    assert lncompile.reporting.report.merge(reports).extra_bytes == grown_since(before)


class Copied(nn.Module):
    """Copies of all kinds: one weight read along its rows and along its columns, parts of a joint one, one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.joint = nn.Linear(8, 8, bias=False), nn.Linear(8, 24)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(6)])

    def forward(self, value: Tensor) -> Tensor:
        value = self.norms[0](self.square(value))
        value = self.norms[1](torch.relu(value) @ self.square.weight)
        query, key, rest = self.joint(value).chunk(3, -1)
        value = self.norms[2](query) + self.norms[3](key) * rest
        for norm in self.norms[4:]:
            value = norm(self.normed(torch.relu(value)))
        return value


def test_bytes_of_copies_of_all_kinds() -> None:
    model, value = randomise(Copied().double().eval()), torch.randn(5, 8, dtype=torch.float64)
    expected = model(value)
    before = allocated()
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"}, fullgraph=True)
    torch.testing.assert_close(compiled(value), expected, **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    assert report.folded == 6
    assert report.extra_bytes == grown_since(before) == 8 * (2 * 64 + (24 * 8 + 24) + (64 + 8))
    assert lncompile.explain(compiled, value).extra_bytes == report.extra_bytes


def test_bytes_of_calls_from_several_threads() -> None:
    """Threads share the graph's copies, also where all of them find a changed weight at once."""
    model = randomise(Block().double())
    value = torch.randn(5, 16, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold")
    before = allocated()
    compiled(value)
    (report,) = lncompile.reports(compiled)
    barrier = threading.Barrier(3, timeout=60)

    def call() -> None:
        with torch.no_grad():
            barrier.wait()
            compiled(value)

    for _ in range(10):
        model.inner.weight.mul_(0.5)
        with ThreadPoolExecutor(3) as pool:
            for running in [pool.submit(call) for _ in range(3)]:
                running.result()
    assert report.extra_bytes == grown_since(before) == 8 * (16 * 16 + 16)
