"""The backend as users call it: modes, options, dynamic shapes, graph breaks, failures, reports, logs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, TEXT, randomise, tokens
from residual import TOLERANCE, Residual, model, value
from torch import Tensor, nn

import lncompile
from lncompile import backend, pipeline, safety_net
from lncompile.lowering import torch_private_inductor

# --- ways of calling ---


def test_found_by_name_without_an_import() -> None:
    script = (
        "import torch; m = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)); "
        "assert 'lnfold' in torch._dynamo.list_backends(); x = torch.randn(3, 4); "
        "import contextlib\nwith torch.no_grad(): y = torch.compile(m, backend='lnfold')(x); "
        "assert torch.allclose(y, m(x), atol=1e-5); import torch._dynamo.utils as u; "
        "assert u.counters['lnfold']['folded'] == 1, u.counters['lnfold']"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=dict(os.environ))


def test_dynamic_batch_and_sequence() -> None:
    net = model()
    compiled = torch.compile(net, backend="lnfold", dynamic=True)
    for shape in ((2, 3, 16), (4, 7, 16), (1, 9, 16)):
        torch.testing.assert_close(compiled(x := value(*shape)), net(x), **TOLERANCE)
    reports = lncompile.reports(compiled)
    assert [report.folded for report in reports] == [2, 2], "one graph for any size, one for the batch of 1"


def test_dynamic_shapes_on_gpt2(without_inductor: None) -> None:
    net = next(a for a in ARCHITECTURES if a.name == "gpt2").model()
    compiled = torch.compile(net, backend="lnfold", dynamic=True)
    for batch, length in ((2, 5), (3, 9), (4, 12)):
        ids = tokens(batch, length)
        actual, expected = compiled(input_ids=ids, use_cache=False).logits, net(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert all(report.folded == report.total == 5 for report in lncompile.reports(compiled))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode: str) -> None:
    net = model()
    compiled = torch.compile(net, backend="lnfold", mode=mode)
    for _ in range(2):
        torch.testing.assert_close(compiled(x := value()), net(x), **TOLERANCE)
    assert lncompile.reports(compiled)[0].folded == 2


def test_inference_mode() -> None:
    net, x = model(), value()
    compiled = torch.compile(net, backend="lnfold")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), net(x), **TOLERANCE)
        net.first.weight.mul_(2)
        torch.testing.assert_close(compiled(x), net(x), **TOLERANCE)
    assert lncompile.reports(compiled)[0].folded == 2


def test_graph_breaks() -> None:
    net, x = model(breaks=True), value()
    compiled = torch.compile(net, backend="lnfold")
    torch.testing.assert_close(compiled(x), net(x), **TOLERANCE)
    reports = lncompile.reports(compiled)
    assert len(reports) == 2
    # The stream leaves the first graph as its output, so it may not be centered; the second gets it from outside.
    assert [report.folded for report in reports] == [0, 0]
    reasons = {site.reason for report in reports for site in report.sites}
    assert reasons == {lncompile.Reason.GRAPH_OUTPUT, lncompile.Reason.USER_TENSOR}
    assert lncompile.explain(net, x).graphs == 2


def test_a_compiled_function() -> None:
    net = model()

    def function(x: Tensor) -> Tensor:
        return net(x) * 2

    compiled = torch.compile(function, backend="lnfold")
    torch.testing.assert_close(compiled(x := value()), function(x), **TOLERANCE)
    assert [report.folded for report in lncompile.reports(compiled)] == [2]


def test_generate_with_a_static_cache_is_token_identical() -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **TEXT)
    net = randomise(transformers.GPT2LMHeadModel(config).eval())
    ids = tokens(2, 5)
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = net.generate(ids, cache_implementation="static", disable_compile=True, **arguments)
    compiled = transformers.CompileConfig(backend="lnfold", fullgraph=False, mode=None)
    compiled._compile_all_devices = True  # generate() compiles on accelerators only unless told otherwise
    actual = net.generate(ids, cache_implementation="static", compile_config=compiled, **arguments)
    assert torch.equal(actual, expected)
    assert actual.shape == (2, 17)
    reports = lncompile.reports(net)
    assert reports, "generate() did not compile"
    assert all(report.folded == report.total == 5 for report in reports)


class AutocastInside(nn.Module):
    """Part of the model runs under autocast, as mixed-precision code in the wild does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, value: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.inner(value)
        return out.float()


@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast(where: str) -> None:
    from lncompile.verification import relative_error

    inner = randomise(Residual())
    net = AutocastInside() if where == "inside" else inner
    if isinstance(net, AutocastInside):
        net.inner = inner
    x = torch.randn(64, 16)
    expected = randomise(Residual().double())(x.double())
    errors = {}
    for name in ("inductor", "lnfold"):
        compiled = torch.compile(net, backend=name)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "around"):
            output = compiled(x)
        errors[name] = relative_error(output, expected)
        assert output.dtype == (torch.float32 if where == "inside" else torch.bfloat16)
    assert lncompile.reports(compiled)[0].folded == 2
    assert errors["inductor"] > 1e-4, "the control: autocast did round"
    assert errors["lnfold"] <= 1.25 * errors["inductor"]


# --- nothing to fold, training, failures ---


def test_a_graph_without_a_layer_norm_goes_to_inductor_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(graph_module: Any, example_inputs: Any, config: Any) -> Any:
        seen.append((graph_module, len(example_inputs)))
        return graph_module.forward

    monkeypatch.setattr(torch_private_inductor, "inductor_compile", record)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double()
    handed: list[Any] = []

    def backend_function(graph_module: Any, example_inputs: Any) -> Any:
        handed.append(graph_module)
        return backend.lnfold(graph_module, example_inputs)

    torch.compile(net, backend=backend_function)(value(3, 4))
    assert seen[0][0] is handed[0]


def test_frozen_weights_fold_with_gradients_enabled() -> None:
    net, x = model().requires_grad_(False), value().requires_grad_()
    compiled = torch.compile(net, backend="lnfold")
    with torch.enable_grad():
        (actual,) = torch.autograd.grad(compiled(x).sum(), x)
        (expected,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert lncompile.reports(compiled)[0].folded == 2


@pytest.mark.parametrize("stage", ["analyse", "transform"])
def test_a_failure_of_ours_is_logged_and_the_graph_compiled_untouched(
    stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(pipeline, stage, fail)
    net, x = model(), value()
    with pytest.raises(Exception, match="a bug of ours"):
        torch.compile(net, backend="lnfold")(x)

    torch._dynamo.reset()
    monkeypatch.setattr(safety_net, "enabled", True)
    compiled = torch.compile(net, backend="lnfold")
    with caplog.at_level(logging.WARNING, logger="lncompile"):
        torch.testing.assert_close(compiled(x), net(x), **TOLERANCE)
    assert len([r for r in caplog.records if r.name == "lncompile" and "a bug of ours" in r.getMessage()]) == 1
    (report,) = lncompile.reports(compiled)
    assert [site.reason for site in report.sites] == [lncompile.Reason.INTERNAL_ERROR] * 2


def test_inductor_refusing_our_graph_compiles_the_untouched_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock = torch_private_inductor.inductor_compile

    def refuse_ours(graph_module: Any, example_inputs: Any, config: Any) -> Any:
        if any("materialized" in node.name for node in graph_module.graph.nodes):
            raise RuntimeError("cannot compile this")
        return stock(graph_module, example_inputs, config)

    monkeypatch.setattr(torch_private_inductor, "inductor_compile", refuse_ours)
    monkeypatch.setattr(safety_net, "enabled", True)
    net, x = model(), value()
    with caplog.at_level(logging.WARNING, logger="lncompile"):
        torch.testing.assert_close(torch.compile(net, backend="lnfold")(x), net(x), **TOLERANCE)
    assert "cannot compile this" in caplog.text


# --- options ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lnfold.check": "nope"}, "option 'lnfold.check' takes 'values' or 'versions' or 'off', not 'nope'"),
        ({"lnfold.nonfoldable": True}, "option 'lnfold.nonfoldable' takes 'inductor' or 'eager', not True"),
        ({"lnfold.asist": "auto"}, "unknown option 'lnfold.asist' (did you mean 'lnfold.assist'?)"),
        ({"lnfold.assist": True}, "option 'lnfold.assist' takes 'auto' or 'off', not True: write 'auto'"),
        ({"max_autotun": True}, "unknown option 'max_autotun' (did you mean 'max_autotune'?)"),
        ({"max_autotune": "yes"}, "max_autotune"),
    ],
)
def test_bad_options_get_one_clear_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Exception) as caught:
        torch.compile(model(), backend="lnfold", options=options)(value())
    assert sentence in str(caught.value)
    with pytest.raises(lncompile.OptionError):
        lncompile.explain(torch.compile(model(), backend="lnfold", options=options), value())


def test_unknown_mode() -> None:
    with pytest.raises(Exception, match="warp-speed"):
        torch.compile(model(), backend="lnfold", mode="warp-speed")(value())


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.linear, self.norm_2 = nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, value: Tensor) -> Tensor:
        value = self.norm_1(torch.relu(value))
        return self.norm_2(value + torch.relu(self.linear(value)))


@pytest.mark.parametrize("choice", ["inductor", "eager"])
def test_nonfoldable_sites(choice: str) -> None:
    from lncompile.lowering.inspect.generated_code import generated_code

    net, x = randomise(PostNorm().double()), value()
    compiled = torch.compile(net, backend="lnfold", options={"lnfold.nonfoldable": choice})
    torch.testing.assert_close(compiled(x), net(x), **TOLERANCE)
    assert lncompile.reports(compiled)[0].folded == 0
    source = "\n".join(generated_code(compiled, x).source)
    assert ("lncompile.layer_norm" in source) == (choice == "eager")


def test_eager_nonfoldable_sites_have_gradients() -> None:
    net, x = randomise(PostNorm().double()), value()
    compiled = torch.compile(net, backend="lnfold", options={"lnfold.nonfoldable": "eager"})
    with torch.enable_grad():
        compiled(x).square().sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
        net.zero_grad()
        net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, **TOLERANCE)


def test_assist_off_makes_no_runtime_centerings(without_inductor: None) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == "bloom")
    net, inputs = architecture.model(), architecture.inputs(torch.float64)
    compiled = torch.compile(net, backend="lnfold", options={"lnfold.assist": "off"})
    torch.testing.assert_close(compiled(**inputs).logits, net(**inputs).logits, **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    assert (report.folded, report.centerings) == (1, ())
