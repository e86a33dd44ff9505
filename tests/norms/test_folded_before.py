"""Norms that came folded (``lncompile.nn.RMSNorm``): found, lowered as sites folded in a graph are, and counted."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from architectures import randomise
from graphs import capture
from hand_folded import IDS, MODELS, Decoder
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lncompile
from lncompile import Reason
from lncompile.lowering import FOLDED_STATISTIC, stored_scale_of, torch_private_inductor
from lncompile.lowering.target import compiled_for
from lncompile.nn import CenteredEmbedding, RMSNorm
from lncompile.passes.graph.canonical import tensor_of
from lncompile.verification import floating_outputs

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
WORDS = "folded before (lncompile.nn.RMSNorm)"


def outputs_of(value: object) -> list[Tensor]:
    return list(floating_outputs(value).values())


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that go to Inductor; they are run as they are."""
    graphs: list[torch.fx.GraphModule] = []

    def run(graph_module: torch.fx.GraphModule, example_inputs: object, config: object) -> object:
        graph_module.graph.lint()
        graphs.append(graph_module)
        return lambda *arguments: graph_module(*arguments)

    monkeypatch.setattr(torch_private_inductor, "inductor_compile", run)
    return graphs


@pytest.mark.parametrize("name", MODELS)
def test_models_folded_by_hand(name: str, handed_over: list[torch.fx.GraphModule]) -> None:
    case = MODELS[name]
    model, folded = case.models()
    expected = outputs_of(model(**case.inputs))
    for actual, reference in zip(outputs_of(folded(**case.inputs)), expected, strict=True):
        torch.testing.assert_close(actual, reference, **TOLERANCE)
    compiled = torch.compile(folded, backend="lnfold", fullgraph=True)
    for actual, reference in zip(outputs_of(compiled(**case.inputs)), expected, strict=True):
        torch.testing.assert_close(actual, reference, **TOLERANCE)
    report = lncompile.explain(folded, **case.inputs)
    assert (report.total, report.folded) == case.sites
    before = [site for site in report.sites if site.folded_before]
    assert len(before) == case.sites[1]
    assert {site.detail for site in before} == {WORDS}
    assert not report.weights
    assert not report.differences
    (graph,) = handed_over
    roots = [node for node in graph.graph.nodes if "rsqrt" in node.name]
    assert len(roots) == case.sites[1], "each is written out"
    assert all(FOLDED_STATISTIC.items() <= node.meta["custom"].items() for node in roots)
    assert not [node for node in graph.graph.nodes if getattr(node.target, "__module__", "").startswith("lncompile")]


@pytest.mark.parametrize("name", MODELS)
def test_the_control_uncentered_weights_make_another_model(name: str) -> None:
    case = MODELS[name]
    model, _ = case.models()
    expected = outputs_of(model(**case.inputs))
    wrong = copy.deepcopy(model)
    for name, module in list(wrong.named_modules()):
        if isinstance(module, nn.LayerNorm):
            wrong.set_submodule(name, RMSNorm.in_place_of(module))
    assert not torch.allclose(outputs_of(wrong(**case.inputs))[0], expected[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["decoder", "gpt2"])
@pytest.mark.parametrize("options", [{"lnfold.defer": "on"}, {"lnfold.absorb_affine": "on"}], ids=str)
@pytest.mark.usefixtures("without_inductor")
def test_what_is_done_to_sites_folded_in_the_graph_is_done_to_them(name: str, options: dict[str, object]) -> None:
    case = MODELS[name]
    model, folded = case.models()
    expected, described = outputs_of(model(**case.inputs)), []
    for candidate in (model, folded):
        torch._dynamo.reset()
        compiled = torch.compile(candidate, backend="lnfold", options=options)
        for actual, reference in zip(outputs_of(compiled(**case.inputs)), expected, strict=True):
            torch.testing.assert_close(actual, reference, **TOLERANCE)
        (report,) = lncompile.reports(compiled)
        described.append([(site.name, site.lowering, site.affine_absorbed_by) for site in report.sites])
    assert described[0] == described[1]
    assert any(lowering == "rms_norm_deferred" for _, lowering, _ in described[1]) == ("lnfold.defer" in options)
    assert any(absorbed for *_, absorbed in described[1])


@pytest.mark.usefixtures("without_inductor")
def test_one_row_goes_into_the_products() -> None:
    case = MODELS["decoder"]
    model, folded = case.models()
    inputs = {"ids": IDS[:1, :1]}
    reports = []
    for candidate in (model, folded):
        torch._dynamo.reset()
        compiled = torch.compile(candidate, backend="lnfold", options={"lnfold.matrix_vector": "on"})
        with compiled_for(torch.device("cuda")):
            torch.testing.assert_close(compiled(**inputs), model(**inputs), **TOLERANCE)
        reports.append([site.lowering for site in lncompile.reports(compiled)[0].sites])
    assert reports[0] == reports[1]
    assert set(reports[1]) == {"rms_norm_deferred"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_every_way_the_module_is_written_out(
    bias: bool, dynamic: bool, dtype: torch.dtype, autocast: bool, handed_over: list[torch.fx.GraphModule]
) -> None:
    norm = randomise(RMSNorm(8, eps=0.03, bias=bias)).to(dtype)
    norm = norm.float() if autocast and dtype != torch.float64 else norm
    model = nn.Sequential(norm, nn.Identity()).eval()
    x = torch.randn(3, 8, dtype=dtype) + 1
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = model(x)
        actual = torch.compile(model, backend="lnfold", dynamic=dynamic, fullgraph=True)(x)
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(actual, expected, **tolerance)
    (graph,) = handed_over
    names = {node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"}
    assert "rms_norm" not in names
    assert "rsqrt" in names
    (report,) = lncompile.reports(model)
    assert (report.total, report.folded) == (1, 1)


@pytest.mark.usefixtures("without_inductor")
def test_the_same_module_called_twice_and_its_own_output() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = RMSNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x)) + self.norm(self.linear(self.norm(x)).add_(x))

    model, x = randomise(Twice().double()).eval(), torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    torch.testing.assert_close(compiled(x.clone()), model(x.clone()), **TOLERANCE)
    assert lncompile.explain(model, x).folded == 4


@pytest.mark.usefixtures("without_inductor")
def test_several_axes() -> None:
    model = nn.Sequential(randomise(RMSNorm((4, 8)).double()), nn.Flatten())
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, backend="lnfold")(x), model(x), **TOLERANCE)
    assert lncompile.explain(model, x).folded == 1


@pytest.mark.usefixtures("without_inductor")
def test_a_class_of_ones_own() -> None:
    class Doubled(RMSNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input * 2).detach() + input

    model = nn.Sequential(randomise(Doubled(8).double()), nn.Identity())
    x = torch.randn(8, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, backend="lnfold")(x), model(x), **TOLERANCE)
    assert lncompile.explain(model, x).folded == 1


@pytest.mark.parametrize("make", [lambda: nn.RMSNorm(8), lambda: LlamaRMSNorm(8)], ids=["torch", "llama"])
def test_other_rms_norms_stay_as_they_are(
    make: object, handed_over: list[torch.fx.GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = nn.Sequential(make(), nn.Linear(8, 8)).double(), torch.randn(3, 8, dtype=torch.float64)
    with caplog.at_level(logging.INFO, "lncompile"):
        torch.compile(model, backend="lnfold")(x)
    report = lncompile.explain(model, x)
    assert (report.total, report.rms_norms) == (0, 1)
    assert not [record for record in caplog.records if record.name == "lncompile"]
    (graph,) = handed_over
    assert not [node for node in graph.graph.nodes if FOLDED_STATISTIC.items() <= node.meta.get("custom", {}).items()]


class Mixed(nn.Module):
    """A folded norm and a LayerNorm on one stream, and a second stream with two LayerNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = nn.Embedding(29, 8), nn.Linear(8, 8)
        self.folded, self.layer = RMSNorm(8), nn.LayerNorm(8)
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.table(ids)
        branch = self.other(torch.relu(self.folded(stream)))
        return self.layer(stream) + self.first(branch) + self.second(branch)


@pytest.mark.parametrize("options", [{}, {"lnfold.memory_budget": 1 << 20}, {"lnfold.memory_budget": 0}], ids=str)
@pytest.mark.usefixtures("without_inductor")
def test_beside_norms_that_fold_and_that_stay(options: dict[str, object]) -> None:
    model = randomise(Mixed().double()).eval()
    compiled = torch.compile(model, backend="lnfold", options=options)
    torch.testing.assert_close(compiled(IDS), model(IDS), **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    sites = {site.name: site for site in report.sites}
    # Without copies the branch is centered at each call, for both of its norms.
    assert [sites[name].folded for name in ("folded", "layer", "first", "second")] == [True, False, True, True]
    assert sites["layer"].reason is Reason.VISIBLE, "an RMSNorm reads its stream, and would see it centered"
    assert "RMSNorm" in sites["layer"].detail
    weights = 0 if options == {"lnfold.memory_budget": 0} else 2
    words = f"3 of 4 LayerNorms folded, 1 of them before (lncompile.nn.RMSNorm), with {weights} centered weights"
    assert words in report.summary()


@pytest.mark.usefixtures("without_inductor")
def test_the_stream_of_a_folded_norm_is_not_centered_for_others() -> None:
    """RMSNorm of a tensor with a mean is not RMSNorm of the centered tensor, whatever else would fold."""
    model = randomise(Mixed().double()).eval()
    model.layer, before = nn.Identity(), model(IDS)
    model.first = nn.LayerNorm(8, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, backend="lnfold")(IDS), model(IDS), **TOLERANCE)
    assert not torch.equal(before, model(IDS))


@pytest.mark.usefixtures("without_inductor")
def test_a_mean_taken_out_by_hand_before_it_is_a_layer_norm() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), RMSNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            stream = self.linear(x)
            return self.norm(stream - stream.mean(-1, keepdim=True))

    model, x = randomise(ByHand().double()).eval(), torch.randn(3, 8, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold")
    torch.testing.assert_close(compiled(x), model(x), **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    assert (report.total, report.folded, report.differences) == (1, 1, ())
    assert not report.sites[0].folded_before


@pytest.mark.usefixtures("without_inductor")
def test_a_centered_table_is_no_difference_to_speak_of() -> None:
    model = nn.Sequential(CenteredEmbedding(29, 8), RMSNorm(8), nn.Linear(8, 8))
    model = randomise(model.double()).eval()
    compiled = torch.compile(model, backend="lnfold")
    torch.testing.assert_close(compiled(IDS), model(IDS), **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    assert (report.total, report.folded, report.differences) == (1, 1, ())
    assert report.sites[0].folded_before


@pytest.mark.parametrize("training", ["auto", "off", "on"])
@pytest.mark.usefixtures("without_inductor")
def test_trained(training: str) -> None:
    model = randomise(nn.Sequential(RMSNorm(8), nn.Linear(8, 8)).double())
    x, gradients = torch.randn(3, 8, dtype=torch.float64), []
    with torch.enable_grad():
        for candidate in (model, torch.compile(model, backend="lnfold", options={"lnfold.training": training})):
            model.zero_grad()
            candidate(x).pow(3).sum().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    (report,) = lncompile.reports(model)
    assert (report.total, report.folded) == (1, 1)


@pytest.mark.parametrize("training", ["auto", "off"])
def test_left_to_eager_are_only_those_that_do_not_fold(training: str) -> None:
    model, x = randomise(nn.Sequential(RMSNorm(8), nn.Linear(8, 8)).double()), torch.randn(3, 8, dtype=torch.float64)
    options = {"lnfold.nonfoldable": "eager", "lnfold.training": training}
    with torch.enable_grad():
        compiled = torch.compile(model, backend="lnfold", options=options)
        torch.testing.assert_close(compiled(x + 1), model(x + 1), **TOLERANCE)


@pytest.mark.usefixtures("without_inductor")
def test_in_a_checkpointed_part() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(RMSNorm(8), nn.Linear(8, 8), nn.LayerNorm(8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=False)

    model, x = randomise(Checkpointed().double()), torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, backend="lnfold")(x), model(x), **TOLERANCE)
    report = lncompile.explain(model, x)
    assert [(site.folded, site.folded_before) for site in report.sites] == [(True, True), (False, False)]


@pytest.mark.usefixtures("without_inductor")
def test_what_is_said(caplog: pytest.LogCaptureFixture) -> None:
    case = MODELS["decoder"]
    _, folded = case.models()
    with caplog.at_level(logging.INFO, "lncompile"):
        compiled = torch.compile(folded, backend="lnfold")
        compiled(**case.inputs)
    (record,) = [record for record in caplog.records if record.name == "lncompile"]
    assert record.levelno == logging.INFO
    assert record.getMessage().endswith("7 of 7 LayerNorms folded before (lncompile.nn.RMSNorm).")
    for report in (lncompile.explain(folded, **case.inputs), lncompile.reports(compiled)[0]):
        assert WORDS in report.table(width=200)
        assert WORDS in report.to_html()
        assert "nothing" not in str(report)
        assert all(site["folded_before"] for site in report.to_dict()["sites"])
        assert report.extra_bytes == 0


def test_a_failure_of_ours_leaves_them_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    from lncompile import pipeline, safety_net

    monkeypatch.setattr(safety_net, "enabled", True)
    monkeypatch.setattr(pipeline, "prepare", lambda *args: 1 / 0)
    model, x = randomise(nn.Sequential(RMSNorm(8), nn.LayerNorm(8)).double()), torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(model, backend="lnfold")(x), model(x), **TOLERANCE)
    (report,) = lncompile.reports(model)
    assert [(site.folded, site.reason) for site in report.sites] == [(True, None), (False, Reason.INTERNAL_ERROR)]


def test_folded_once_more_nothing_changes() -> None:
    case = MODELS["decoder"]
    _, folded = case.models()
    assert lncompile.plan(folded, **case.inputs).is_empty
    again = lncompile.fold(folded, **case.inputs)
    assert torch.equal(again(**case.inputs), folded(**case.inputs))
    assert type(again.norm) is RMSNorm


def test_functional_calls_by_others_are_not_ours() -> None:
    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.rms_norm(x, (8,), None, 1e-5)

    report = lncompile.explain(Functional(), torch.randn(3, 8))
    assert (report.total, report.rms_norms) == (0, 1)


def test_the_decoder_is_a_decoder() -> None:
    model = randomise(Decoder().double())
    assert not torch.allclose(model(IDS), model(IDS.flip(1)))


def test_a_width_that_is_a_symbol_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3, 8, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 1)
    captured = capture(lambda value: value * 2, x)
    value = next(tensor for node in captured.graph_module.graph.nodes if (tensor := tensor_of(node)) is not None)
    assert not isinstance(value.shape[-1], int)
    compared: list[object] = []
    monkeypatch.setattr(torch.SymInt, "__eq__", lambda left, right: bool(compared.append(right)))
    assert stored_scale_of(value) is None
    assert not compared
