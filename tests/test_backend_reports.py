"""What is seen of the backend: reports, names, logs, counters, caches."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, randomise
from residual import Residual, model, value
from torch import nn

import lncompile
from lncompile.lowering import torch_private_dynamo, torch_private_inductor
from lncompile.passes.graph import provenance


def test_report_is_printable_and_json(without_inductor: None) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == "bloom")
    report = lncompile.explain(architecture.model(), **architecture.inputs(torch.float64))
    text = str(report)
    assert "transformer.h.0.input_layernorm" in text
    assert "6 of 6 LayerNorms folded" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["folded"] == data["total"] == 6
    assert data["sites"][0]["name"] == "transformer.word_embeddings_layernorm"
    assert data["sites"][0]["centered_by"] == ["transformer.word_embeddings.weight"]
    assert data["weights"][0]["bytes"] > 0
    (centering,) = report.centerings
    assert "5 norms" in centering.detail


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['h']._modules['0']._parameters['weight']", "h.0.weight"),
        ("L['args'][0]._modules['h']._parameters['weight']", "h.weight"),  # a forward that a decorator wraps
        ("L['args'][0].h.0", "h.0"),
        ("L['self'].rwkv.__dict__['_modules']['h'].0", "rwkv.h.0"),
        ("L['args'][0]", "args.0"),
        ("L['kwargs']['input_ids']", "kwargs.input_ids"),
        ("L['model']._modules['h']._buffers['mask']", "model.h.mask"),
    ],
)
def test_names_are_those_of_named_parameters(source: str, name: str) -> None:
    assert provenance.dotted(source) == name


def test_explain_neither_compiles_nor_forgets_compiled_models(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model(), value()
    calls = []
    stock = torch_private_inductor.inductor_compile
    monkeypatch.setattr(torch_private_inductor, "inductor_compile", lambda *a: calls.append(1) or stock(*a))
    compiled = torch.compile(net, backend="lnfold")
    compiled(x)
    for _ in range(10):
        assert lncompile.explain(compiled, x).folded == 2
    compiled(x)
    assert len(calls) == 1


def test_counters_logs_and_trace_artifact(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    artifacts = {}
    monkeypatch.setattr(
        torch_private_dynamo, "trace_artifact", lambda name, payload: artifacts.setdefault(name, payload())
    )
    from torch._dynamo.utils import counters

    counters.clear()
    with caplog.at_level(logging.DEBUG, logger="lncompile"):
        torch.compile(model(), backend="lnfold")(value())
    assert counters["lnfold"]["sites"] == counters["lnfold"]["folded"] == 2
    assert json.loads(artifacts["lnfold_report"])["folded"] == 2
    assert "2 of 2 LayerNorms folded" in caplog.text


def test_untested_torch_gets_one_log_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from lncompile import versions

    versions.warn_if_untested.cache_clear()
    monkeypatch.setattr(torch, "__version__", "9.1.0+cpu")
    with caplog.at_level(logging.WARNING, logger="lncompile"):
        versions.warn_if_untested()
        versions.warn_if_untested()
    versions.warn_if_untested.cache_clear()
    assert caplog.text.count("not tested on torch 9.1.0") == 1


def test_verify_refuses_training_mode() -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        lncompile.verify(nn.Linear(4, 4), torch.randn(2, 4))


def test_verify_notices_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from lncompile.passes.rewrites import center as rewrite

    net = randomise(Residual()).eval()
    monkeypatch.setattr(rewrite, "center_weight", lambda weight, *_: weight.to(torch.float64).to(torch.float32))
    assert not lncompile.verify(net, torch.randn(5, 16)).passed


def test_materialized_weights_have_fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No symbol may stand for the size of a weight: it would have no source to guard on, and slow the kernels."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    sources = []
    stock = ShapeEnv.create_symbol

    def record(self: ShapeEnv, size: int, source: Any, *arguments: Any, **keywords: Any) -> Any:
        sources.append(str(source))
        return stock(self, size, source, *arguments, **keywords)

    monkeypatch.setattr(ShapeEnv, "create_symbol", record)
    net = model()
    torch.compile(net, backend="lnfold", dynamic=True)(value())
    assert sources, "the control: the caller's tensor has symbols"
    assert not [source for source in sources if "unknown" in source]


def test_caches_of_inductor_and_autograd_hit() -> None:
    """A second process, or a second compilation, finds what the first one compiled: as with stock torch.compile."""
    from torch._dynamo.utils import counters

    net, x = randomise(Residual()), torch.randn(5, 16)
    torch.compile(net, backend="lnfold")(x)
    torch._dynamo.reset()
    counters.clear()
    torch.compile(net, backend="lnfold")(x)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1, dict(counters["aot_autograd"])
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
