"""Placement within a budget of memory: against brute force, on a tied GPT-2, and as users meet it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from architectures import randomise
from graphs import capture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import lncompile
from lncompile.options import OptionError, Options, parse_options
from lncompile.passes.decisions import Blocker, MemoryBudget, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.placement import cut
from lncompile.passes.placement.budget import Budgeted, limit_in_bytes, place_within
from lncompile.passes.placement.costs import Bytes, CostModel
from lncompile.passes.placement.cut import place
from lncompile.passes.placement.variables import Variable, VariableKey

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
AXES = Axes.trailing((2, 8), 1)


# --- against brute force ---


@dataclass(frozen=True)
class FakeSite:
    """All that placement reads of a site."""

    node: fx.Node
    input: fx.Node
    worth: int
    axes: Axes = AXES
    folded_before: bool = False


Problem = tuple[dict[VariableKey, Variable], list[FakeSite]]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A few weights, and tensors made of them and of each other; some can be centered explicitly, at a cost."""
    weights, tensors = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    graph = fx.Graph()
    variables: dict[VariableKey, Variable] = {}
    nodes = []
    for index in range(weights + tensors):
        node = graph.placeholder(f"v{index}")
        variable = Variable(node, AXES)
        if index < weights:
            # Whole bytes, several of one size: ties are the rule in models.
            node.meta["example_value"] = torch.empty(draw(st.integers(1, 5)), dtype=torch.uint8)
            variable.parameter, variable.centering_cost = node, Bytes(0, 0)
            variable.source_blocker = Blocker(Reason.UNSUPPORTED_WEIGHT, "a parameter", node)
        else:
            cost = draw(st.one_of(st.none(), st.integers(0, 8)))
            variable.centering_cost = None if cost is None else Bytes(cost, cost)
            operands = draw(st.lists(st.integers(0, index - 1), min_size=1, max_size=3, unique=True))
            variable.needs = {nodes[operand]: AXES for operand in operands}
        nodes.append(node)
        variables[variable.key] = variable
    sites = [
        FakeSite(node, node, draw(st.integers(1, 8)))
        for node in draw(st.lists(st.sampled_from(nodes[weights:]), min_size=1, max_size=4))
    ]
    return variables, sites


def frontier(variables: dict[VariableKey, Variable], sites: list[FakeSite]) -> dict[int, int]:
    """The most that can be saved with copies of each number of bytes."""
    weights = [v for v in variables.values() if v.parameter is not None]
    tensors = [v for v in variables.values() if v.parameter is None]
    best: dict[int, int] = {}
    for copied in itertools.product((False, True), repeat=len(weights)):
        size = sum(
            v.node.meta["example_value"].nbytes for v, is_copied in zip(weights, copied, strict=True) if is_copied
        )
        for explicit in itertools.product((False, True), repeat=len(tensors)):
            available = {v.key: is_copied for v, is_copied in zip(weights, copied, strict=True)}
            saved = 0
            for variable, is_explicit in zip(tensors, explicit, strict=True):
                is_stream = all(available[need] for need in variable.needs.items())
                available[variable.key] = is_stream or (is_explicit and variable.centering_cost is not None)
                if is_explicit and not is_stream and variable.centering_cost is not None:
                    saved -= variable.centering_cost.hint
            saved += sum(site.worth for site in sites if available[(site.input, site.axes)])
            best[size] = max(best.get(size, 0), saved)
    return best


def within(problem: Problem, limit: int) -> Budgeted:
    variables, sites = problem
    return place_within(limit, sites, variables, True, CostModel())  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_placement_with_as_many_bytes_saves_more(problem: Problem) -> None:
    """At every budget: what is chosen fits and is optimal for the bytes that are proven."""
    variables, sites = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "benefit", lambda site, costs: Bytes(site.worth, site.worth))
        best = frontier(variables, sites)
        everything = sum(v.node.meta["example_value"].nbytes for v in variables.values() if v.parameter is not None)
        for limit in range(everything + 1):
            chosen = within(problem, limit)
            saved = chosen.placement.saved.hint
            assert chosen.proven <= chosen.used <= limit
            assert saved >= max(value for size, value in best.items() if size <= chosen.proven)
            assert saved <= max(value for size, value in best.items() if size <= limit)
            if limit == 0:
                assert chosen.used == 0
                assert saved == best[0]
        # Everything fits: what is chosen without a limit.
        assert chosen.placement == place(sites, variables)  # type: ignore[arg-type]
        assert saved == max(best.values())


def test_room_that_the_last_corner_leaves_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that needs two weights of 20 bytes is worth more for its bytes than one of 6, but does not fit."""
    monkeypatch.setattr(cut, "benefit", lambda site, costs: Bytes(site.worth, site.worth))
    graph = fx.Graph()
    variables: dict[VariableKey, Variable] = {}

    def add(size: int, *needs: fx.Node) -> fx.Node:
        node = graph.placeholder(f"v{len(variables)}")
        variable = Variable(node, AXES, needs=dict.fromkeys(needs, AXES))
        if size:
            node.meta["example_value"] = torch.empty(size, dtype=torch.uint8)
            variable.parameter, variable.centering_cost = node, Bytes(0, 0)
            variable.source_blocker = Blocker(Reason.UNSUPPORTED_WEIGHT, "a parameter", node)
        variables[variable.key] = variable
        return node

    large, small = add(0, add(20), add(20)), add(0, add(6))
    sites = [FakeSite(large, large, 1000), FakeSite(small, small, 6)]
    for limit, used, saved in ((5, 0, 0), (6, 6, 6), (39, 6, 6), (40, 40, 1000), (45, 40, 1000), (46, 46, 1006)):
        chosen = within((variables, sites), limit)
        assert (chosen.used, chosen.placement.saved.hint) == (used, saved)
        assert list(chosen.left) == [site.node for site in sites if site not in chosen.placement.folded]


# --- on a model whose table is tied to its head ---

VOCABULARY = 500


def tied_gpt2() -> nn.Module:
    """Its table (128000 bytes) is far larger than the copies of all other weights together (82944)."""
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
    )
    return randomise(transformers.GPT2LMHeadModel(config).double().eval())


def call(model: Callable[..., Any], length: int = 7) -> Tensor:
    ids = torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def compiled_within(model: nn.Module, budget: Any, **options: Any) -> tuple[Callable[..., Any], lncompile.FoldReport]:
    """The model compiled within a budget, called once, and its one report."""
    ours = {"lnfold.memory_budget": budget, **{f"lnfold.{name}": value for name, value in options.items()}}
    compiled = torch.compile(model, backend="lnfold", options=ours)
    torch.testing.assert_close(call(compiled), call(model), **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    return compiled, report


def test_instead_of_a_copy_of_a_tied_table_the_stream_is_centered_behind_the_look_up(without_inductor: None) -> None:
    model = tied_gpt2()
    table = model.get_parameter("transformer.wte.weight").nbytes
    _, free = compiled_within(model, None)
    assert (free.folded, len(free.centerings)) == (5, 0)
    compiled, report = compiled_within(model, table - 1)
    assert report.folded == report.total == 5
    (centering,) = report.centerings
    assert "do not fit within lnfold.memory_budget" in centering.detail
    names = {weight.name for weight in report.weights}
    assert names == {w.name for w in free.weights} - {"transformer.wte.weight", "transformer.wpe.weight"}
    assert report.extra_bytes < table
    # The same without compiling, and in words.
    assert lncompile.explain(compiled, input_ids=torch.ones(2, 7, dtype=torch.int64)).weights == report.weights
    limit, without = f"{table - 1} bytes", f"{free.extra_bytes} bytes"
    assert f"within a memory budget of {limit} (without: {without})" in report.summary()


def test_less_memory_never_saves_more_and_never_takes_more(without_inductor: None) -> None:
    model = tied_gpt2()
    total = sum(parameter.nbytes for parameter in model.parameters())
    (_, free), saved = compiled_within(model, None), []
    for budget in (0, 9000, 0.1, free.extra_bytes - 1, 1.0):
        _, report = compiled_within(model, budget)
        limit = budget if isinstance(budget, int) else int(budget * total)
        assert report.memory_budget is not None
        assert report.extra_bytes <= report.memory_budget.limit == limit
        assert report.memory_budget.wanted == free.extra_bytes
        saved.append(report.folded - len(report.centerings))  # each is one pass over the stream
        left = [site for site in report.sites if not site.folded]
        assert all(site.reason is Reason.MEMORY_BUDGET for site in left)
    assert saved == sorted(saved)
    assert (saved[0], saved[-1], len(set(saved))) == (0, 5, 5)
    assert report.weights == free.weights


def test_a_norm_that_stays_says_what_does_not_fit(without_inductor: None) -> None:
    model = tied_gpt2()
    _, report = compiled_within(model, 50_000, assist="off")
    assert report.folded == 0
    assert {site.reason for site in report.sites} == {Reason.MEMORY_BUDGET}
    first = report.sites[0]
    assert "2 more weights (132096 bytes, 128000 bytes of it 'transformer.wte.weight')" in first.detail
    assert "50000 bytes, 0 bytes of it used" in first.detail
    assert "lnfold.memory_budget" in str(first.remedy)
    assert "left: 5 memory_budget" in report.summary()
    assert "memory_budget (5): set a larger lnfold.memory_budget" in str(report)


def test_sizes_that_are_dynamic(without_inductor: None) -> None:
    """Decided at the sizes that were traced, right at all."""
    model = tied_gpt2()
    compiled = torch.compile(model, backend="lnfold", dynamic=True, options={"lnfold.memory_budget": 100_000})
    for length in (5, 9, 12):
        torch.testing.assert_close(call(compiled, length), call(model, length), **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    assert (report.folded, len(report.centerings)) == (5, 1)


# --- what counts as a copy ---


class Shared(nn.Module):
    """One linear layer in front of two norms; a norm of the queries and one of the keys of a joint projection."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.joint = nn.Linear(8, 8), nn.Linear(8, 24)
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(4)])

    def forward(self, value: Tensor) -> Tensor:
        first = self.norms[0](self.linear(value))
        second = self.norms[1](self.linear(torch.relu(first)))
        query, key, rest = self.joint(second).chunk(3, -1)
        return torch.cat([self.norms[2](query), self.norms[3](key), rest], -1)


@pytest.mark.parametrize(
    ("budget", "folded"),
    [
        (8 * (64 + 8) - 1, 0),  # a byte less than the one copy for two norms, and than the other for the other two
        (8 * (64 + 8), 2),
        (8 * (8 * 24 + 24) - 1, 2),
        (8 * (8 * 24 + 24), 2),
        (8 * (64 + 8 + 8 * 24 + 24) - 1, 2),
        (8 * (64 + 8 + 8 * 24 + 24), 4),
    ],
)
def test_a_weight_that_is_read_several_times_is_copied_once(without_inductor: None, budget: int, folded: int) -> None:
    model, value = randomise(Shared().double()), torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(
        model, backend="lnfold", options={"lnfold.memory_budget": budget, "lnfold.assist": "off"}, fullgraph=True
    )
    torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    assert report.folded == folded
    assert report.extra_bytes <= budget


def test_through_inductor() -> None:
    model, value = randomise(Shared().double()), torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.memory_budget": 0.5})
    for _ in range(2):
        torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
        model.linear.weight.mul_(1.5)
    (report,) = lncompile.reports(compiled)
    assert (report.folded, report.extra_bytes) == (2, 8 * (64 + 8))


class Stem(nn.Module):
    """A convolution and a batch norm: one weight and one bias are composed of all of their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.batch_norm, self.norm = (
            nn.Conv2d(3, 8, 2, bias=False),
            nn.BatchNorm2d(8),
            nn.LayerNorm(8),
        )

    def forward(self, value: Tensor) -> Tensor:
        return self.norm(self.batch_norm(self.convolution(value)).flatten(2).mT)


@pytest.mark.parametrize(("missing", "folded"), [(0, 1), (1, 0)])
def test_a_composed_weight_counts_with_its_bias(without_inductor: None, missing: int, folded: int) -> None:
    model, value = randomise(Stem().double().eval()), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    budget = 8 * (8 * 3 * 4 + 8) - missing
    compiled = torch.compile(
        model, backend="lnfold", options={"lnfold.memory_budget": budget, "lnfold.assist": "off"}, fullgraph=True
    )
    torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    assert report.folded == folded
    assert report.extra_bytes == budget * folded


def test_trained_weights_are_centered_in_the_graph_and_take_no_room() -> None:
    model, value = randomise(Stem().double().eval()), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.enable_grad():
        options = Options(memory_budget=0, training="on", assist="off")
        assert [site.folded for site in capture(model, value).analyse(options).verdicts] == [True]
        model.requires_grad_(False)
        value.requires_grad_()
        assert [site.folded for site in capture(model, value).analyse(options).verdicts] == [False]


def test_each_graph_has_a_budget_of_its_own(without_inductor: None) -> None:
    """As a share that is a share of the whole model, graph breaks or not; graphs of one weight share its copy."""

    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pieces = nn.ModuleList([Shared() for _ in range(2)])

        def forward(self, value: Tensor) -> Tensor:
            value = self.pieces[0](value)[..., :8]
            torch._dynamo.graph_break()
            return self.pieces[1](value)

    model = randomise(Pieces().double())
    total = sum(parameter.nbytes for parameter in model.parameters())
    for share in (0.3, 0.7):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="lnfold", options={"lnfold.memory_budget": share})
        for rows in (3, 5):
            value = torch.randn(rows, 8, dtype=torch.float64)
            torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
        reports = lncompile.reports(compiled)
        assert len(reports) == 4, "two pieces, each for three rows and for any number"
        assert all(r.memory_budget is not None and r.extra_bytes <= r.memory_budget.limit for r in reports)
        assert lncompile.explain(compiled, value).extra_bytes <= share * total


def test_an_opaque_layer_that_stays_closed_for_want_of_memory_says_so() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
            self.layer = nn.TransformerEncoderLayer(16, 2, 24, activation="gelu", batch_first=True, norm_first=True)

        def forward(self, ids: Tensor) -> Tensor:
            return self.norm(self.layer(self.embedding(ids)))

    model, ids = randomise(Encoder().double().eval()), torch.randint(20, (2, 5))
    captured = capture(model, ids)
    free = captured.analyse(Options(memory_budget=10**9))
    assert [site.folded for site in free.verdicts] == [True] * 3
    assert free.budgeted is not None
    analysis = captured.analyse(Options(memory_budget=100))
    assert [site.reason for site in analysis.verdicts] == [Reason.MEMORY_BUDGET] * 3
    assert analysis.placement is None
    assert analysis.budgeted is not None
    assert analysis.budgeted.budget == MemoryBudget(100, free.budgeted.used, True)


# --- the option ---


@pytest.mark.parametrize("value", [-1, True, False, "0.5", 1.5, -0.1, float("nan"), float("inf"), (1,), [0.5], "all"])
def test_values_it_does_not_take(value: Any) -> None:
    with pytest.raises(OptionError, match=r"lnfold.memory_budget' takes a number of bytes .* not "):
        parse_options(None, {"lnfold.memory_budget": value})


@pytest.mark.parametrize("value", [None, 0, 1, 10**12, 0.0, 0.25, 1.0])
def test_values_it_takes(value: Any) -> None:
    assert parse_options(None, {"lnfold.memory_budget": value})[0].memory_budget is value


def test_a_share_is_of_the_parameters_bytes() -> None:
    parameters = [torch.zeros(4, 4), torch.zeros(3, dtype=torch.bfloat16)]
    assert limit_in_bytes(7, parameters) == 7
    assert limit_in_bytes(0.5, parameters) == 35
    assert limit_in_bytes(1.0, parameters) == 70
    assert limit_in_bytes(1, parameters) == 1
