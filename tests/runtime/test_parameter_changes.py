"""Parameters between two calls: steps, loading, conversion, ties, parametrizations. Never a stale answer."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES, randomise, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch_versions import unless_old

import lncompile
from lncompile.passes.graph import expressions
from lncompile.runtime import parameter_state

pytestmark = pytest.mark.usefixtures("without_inductor")

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


class Tied(nn.Module):
    """An embedding, a residual branch, and a head that may be the embedding's table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm, self.branch = nn.LayerNorm(8), nn.Linear(8, 8)
        self.final, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.table(ids)
        stream = stream + self.branch(torch.relu(self.norm(stream)))
        return self.head(self.final(stream))


IDS = torch.arange(10).reshape(2, 5)


def tied() -> Tied:
    return randomise(Tied().double()).eval()  # type: ignore[return-value]


def folds(compiled: Callable[..., object]) -> set[tuple[int, int]]:
    return {(report.folded, report.total) for report in lncompile.reports(compiled)}


def check(compiled: Callable[..., Tensor], model: nn.Module, folded: int = 2) -> Tensor:
    """Compare with eager; returns the answer, for controls that it did change."""
    expected = model(IDS)
    torch.testing.assert_close(compiled(IDS), expected, **TOLERANCE)
    assert folds(compiled) == {(folded, 2)}
    return expected


def test_optimizer_steps_between_evaluations() -> None:
    model = tied()
    compiled = torch.compile(model, backend="lnfold")
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False),
        torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True),
        torch.optim.Adam(model.parameters(), lr=0.1, fused=True),
    ]
    answers = [check(compiled, model)]
    for optimizer in optimizers:
        for _ in range(2):
            with torch.enable_grad():
                model(IDS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            answers.append(check(compiled, model))
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(answers))


def test_a_step_without_the_check_changes_nothing_until_refresh() -> None:
    model = tied()
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.check": "off"})
    check(compiled, model)
    optimizer = torch.optim.SGD([model.branch.bias], lr=0.1, fused=True)
    before = [value.clone() for value in materialized(compiled)]
    model.branch.bias.grad = torch.ones(8, dtype=torch.float64).cumsum(0)
    optimizer.step()
    compiled(IDS)
    assert all(torch.equal(old, new) for old, new in zip(before, materialized(compiled), strict=True))
    lncompile.refresh()
    check(compiled, model)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_while_compiled(assign: bool) -> None:
    model, other = tied(), randomise(Tied().double(), seed=3)
    compiled = torch.compile(model, backend="lnfold")
    check(compiled, model)
    compiled.load_state_dict({f"_orig_mod.{name}": value for name, value in other.state_dict().items()}, assign=assign)
    torch.testing.assert_close(check(compiled, model), other(IDS), **TOLERANCE)


def test_a_swapped_module() -> None:
    model = tied()
    compiled = torch.compile(model, backend="lnfold")
    check(compiled, model)
    model.branch = randomise(nn.Linear(8, 8).double(), seed=4)
    check(compiled, model)


# --- conversions: the same Parameter objects, other storages, versions as they were ---


@unless_old("stock torch.compile fails too, by tensors of two dtypes")
def test_to_dtype_and_back() -> None:
    model = tied()
    compiled = torch.compile(model, backend="lnfold")
    exact = check(compiled, model)
    model.float()
    single = compiled(IDS)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, model(IDS), rtol=1e-5, atol=1e-5)
    rounded = check(compiled, model.double())
    assert not torch.equal(rounded, exact), "the control: rounded on the way"


@pytest.mark.parametrize("kept", [False, True])
def test_to_dtype_and_back_between_two_calls(kept: bool) -> None:
    model = tied()
    compiled = torch.compile(model, backend="lnfold")
    state = model.state_dict() if kept else {}  # not a copy: it keeps the old storages
    version = model.table.weight._version
    exact = check(compiled, model)
    rounded = check(compiled, model.bfloat16().double())
    assert (rounded - exact).abs().max() > 1e-3
    assert model.table.weight._version == version, "the control: torch does not count it"
    del state


def test_to_device_that_has_no_values_and_back() -> None:
    model = tied()
    state = copy.deepcopy(model.state_dict())
    compiled = torch.compile(model, backend="lnfold")
    expected = check(compiled, model)
    model.to("meta")
    assert compiled(IDS.to("meta")).device.type == "meta"
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    torch.testing.assert_close(compiled(IDS), expected, **TOLERANCE)
    # The graph for meta tensors is left alone, and the one for the CPU serves again.
    assert folds(compiled) == {(2, 2)} | folds(compiled)
    reasons = {site.reason for report in lncompile.reports(compiled) for site in report.sites if not site.folded}
    assert reasons <= {lncompile.Reason.UNSUPPORTED_WEIGHT}


def test_meta_parameters_are_left_alone_with_a_reason() -> None:
    compiled = torch.compile(Tied().to("meta"), backend="lnfold")
    compiled(IDS.to("meta"))
    (report,) = lncompile.reports(compiled)
    assert report.folded == 0
    assert {site.reason for site in report.sites} == {lncompile.Reason.UNSUPPORTED_WEIGHT}
    assert "meta" in report.sites[0].detail


# --- writes that torch does not count ---


def test_data_exchanged() -> None:
    model = tied()
    compiled = torch.compile(model, backend="lnfold")
    before = check(compiled, model)
    model.branch.weight.data = torch.randn(8, 8, dtype=torch.float64)
    assert not torch.equal(check(compiled, model), before)


def test_uncounted_writes_are_noticed_when_another_graph_is_compiled() -> None:
    model = tied()
    first, second = (torch.compile(model, backend="lnfold", options=o) for o in (None, {"lnfold.assist": "off"}))
    check(first, model)
    model.branch.weight.data.mul_(2)
    check(second, model)
    check(first, model)
    assert len({id(value) for value in materialized(first) + materialized(second)}) == 3, "shared again"


def materialized(compiled: Callable[..., object]) -> list[Tensor]:
    from lncompile.compiled_graphs import compiled_graphs

    reports = lncompile.reports(compiled)
    records = [record for record in compiled_graphs if record.report in reports]
    return [
        value
        for record in records
        if record.materializer is not None
        for known in record.materializer._sets.values()
        for value in known.values
    ]


# --- ties and parametrizations that come and go ---


def test_tied_later_and_untied_again() -> None:
    model = tied()
    compiled = torch.compile(model, backend="lnfold")
    answers = [check(compiled, model)]
    model.head.weight = model.table.weight
    answers.append(check(compiled, model))
    model.table.weight.mul_(1.5).add_(0.25)
    answers.append(check(compiled, model))
    model.head.weight = nn.Parameter(model.table.weight.detach().clone())
    answers.append(check(compiled, model))
    model.table.weight.mul_(1.5).add_(0.25)
    answers.append(check(compiled, model))
    torch.testing.assert_close(answers[2], answers[3], **TOLERANCE)
    assert [(a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(answers)] == [1, 1, 0, 1]


def test_parametrized_later_and_made_plain_again() -> None:
    model = tied()
    compiled = torch.compile(model, backend="lnfold")
    check(compiled, model)
    nn.utils.parametrizations.weight_norm(model.branch)
    check(compiled, model)
    model.branch.parametrizations.weight.original0.mul_(1.5)
    check(compiled, model)
    parametrize.remove_parametrizations(model.branch, "weight")
    check(compiled, model)


def test_pruned_later_and_made_plain_again() -> None:
    model = tied()
    compiled = torch.compile(model, backend="lnfold")
    check(compiled, model)
    prune.l1_unstructured(model.branch, "weight", 0.5)
    check(compiled, model)
    prune.remove(model.branch, "weight")
    check(compiled, model)


# --- races, and what is kept alive ---


def test_a_write_while_a_value_is_computed_is_noticed_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tied()
    evaluate = expressions.Expression.evaluate
    pending = [True]

    def evaluate_and_write(self: expressions.Expression, leaves: tuple[Tensor, ...]) -> Tensor:
        value = evaluate(self, leaves)
        if pending and leaves[0] is model.branch.weight:
            pending.clear()
            leaves[0].mul_(2)  # as another thread would
        return value

    monkeypatch.setattr(expressions.Expression, "evaluate", evaluate_and_write)
    compiled = torch.compile(model, backend="lnfold")
    compiled(IDS)
    assert not pending
    check(compiled, model)


def test_a_state_keeps_nothing_alive_and_ends_with_what_it_saw() -> None:
    ended: list[parameter_state.ParameterState] = []
    first, second = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    state = parameter_state.ParameterState((first, second), ended.append)
    assert state.is_current((first, second))
    assert not state.is_current((second, first))
    assert not state.is_current((first,))
    assert state.has_storages_of((first, second))
    alive = weakref.ref(second)
    del second
    assert alive() is None
    assert ended == [state]
    assert state.living() == {id(first)}
    assert not state.is_current((first, first))


def test_identities_are_those_of_id() -> None:
    for objects in ((), (object(),), tuple(object() for _ in range(300))):
        assert parameter_state.addresses_of(objects) == parameter_state._number_addresses(objects)


def test_centered_weights_are_freed_without_the_garbage_collector() -> None:
    model = tied()
    compiled = torch.compile(model, backend="lnfold")
    check(compiled, model)
    values = [weakref.ref(value) for value in materialized(compiled)]
    assert len(values) == 3
    gc.disable()
    try:
        model.branch.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
        assert all(value() is None for value in values), "those of the old weights go with the old weights"
    finally:
        gc.enable()
    check(compiled, model)


def test_gpt2_through_it_all() -> None:
    model = next(a for a in ARCHITECTURES if a.name == "gpt2").model()
    compiled = torch.compile(model, backend="lnfold")
    ids = tokens()

    def same() -> None:
        actual, expected = (m(input_ids=ids, use_cache=False).logits for m in (compiled, model))
        torch.testing.assert_close(actual, expected, **TOLERANCE)
        assert folds(compiled) == {(5, 5)}

    same()
    model.load_state_dict(randomise(copy.deepcopy(model), seed=8).state_dict())
    same()
    model.bfloat16().double()
    same()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))
    same()
    for parameter in model.parameters():
        parameter.add_(0.01)
    same()
