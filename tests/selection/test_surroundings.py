"""Races where the call is not a plain one: inference mode, frozen weights, code that is saved, CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from racing import Lab, compiled, selection
from residual import TOLERANCE, model, value

import lncompile
from lncompile import backend
from lncompile.folded_graph import Saved
from lncompile.options import parse_options
from lncompile.selection.cuda_graphs import recorded


def test_inference_mode(lab: Lab) -> None:
    net, x = model(), value()
    with torch.inference_mode():
        fast = compiled(net)
        torch.testing.assert_close(fast(x), net(x), **TOLERANCE)
    assert lab.calls
    assert selection(fast).chosen == "model"


def test_autocast(lab: Lab) -> None:
    net, x = model().float(), value().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = compiled(net)
        torch.testing.assert_close(fast(x), net(x), rtol=0.05, atol=0.05)
    assert lab.calls


def test_a_race_for_another_process_is_saved_under_the_options_that_were_asked_for() -> None:
    """What a mode turns on is an option of the graph: whoever loads it asks for it by the mode again."""
    ours, _ = parse_options("max-autotune", None)
    (report,) = [lncompile.explain(model(), value())]
    asked = {"mode": "max-autotune", "options": {}}
    saved = Saved(lncompile.__version__, ours, asked, (), (), report)
    saved.check_arguments(asked)
    with pytest.raises(RuntimeError, match="under another mode or other options"):
        saved.check_arguments({"mode": "max-autotune", "options": {"lnfold.select": "model"}})


@torch._dynamo.config.patch(enable_aot_compile=True)
def test_ahead_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lab: Lab) -> None:
    """What is saved is the graph that won, or the model's where nothing could be raced."""
    monkeypatch.undo()
    monkeypatch.setenv("LNCOMPILE_SELECTION_DIR", str(lab.folder))
    monkeypatch.setattr("lncompile.selection.contestants.stopwatch_for", lambda device: lab.stopwatch)
    net, x = model(), value()
    fast: Any = torch.compile(net, backend="lnfold", fullgraph=True, options={"lnfold.select": "measure"})
    fast.forward.aot_compile(((x,), {})).save_compiled_function(tmp_path / "compiled.bin")
    with (tmp_path / "compiled.bin").open("rb") as file:
        loaded = torch.compiler.load_compiled_function(file)
    torch.testing.assert_close(loaded(net, x), net(x), **TOLERANCE)
    net.first.weight.mul_(2)
    torch.testing.assert_close(loaded(net, x), net(x), **TOLERANCE)


def test_configurations_are_reset_with_dynamo(lab: Lab) -> None:
    compiled(model())(value())
    assert backend._used_configurations
    torch._dynamo.reset()
    assert not backend._used_configurations


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_recorded_call_reads_and_writes_where_the_call_does() -> None:
    value, total = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    before = torch.cuda.memory_allocated()

    def restore() -> None:
        total.zero_()

    replay = recorded(lambda: total.add_(value * 2), restore, value.device)
    restore()
    value.fill_(3)
    replay()
    assert total.tolist() == [6.0] * 4
    del replay
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_race_under_cuda_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LNCOMPILE_SELECTION_DIR", str(tmp_path))
    net, x = model().cuda().float(), value().cuda().float()
    fast = torch.compile(net, backend="lnfold", options={"lnfold.select": "measure", "triton.cudagraphs": True})
    for _ in range(3):
        torch.testing.assert_close(fast(x), net(x), rtol=1e-3, atol=1e-3)
    assert selection(fast).is_race
