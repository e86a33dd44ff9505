"""Races in processes of their own, and through Inductor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from racing import Lab, compiled, selection
from residual import TOLERANCE, model, value
from torch._dynamo.utils import counters

import lncompile
from lncompile.selection import contestants, kept

PROCESS = """
import json, sys, pathlib
import pytest, torch
from racing import compiled, in_a_lab, selection
from residual import model, value

with torch.no_grad():
    lab = in_a_lab(pytest.MonkeyPatch(), pathlib.Path(sys.argv[1]))
    lab.seconds = {"affine absorbed": 0.5}
    torch.manual_seed(0)
    net, x = model(), value()
    fast = compiled(net)
    right = torch.allclose(fast(x), net(x), rtol=1e-10, atol=1e-10)
print(json.dumps({
    "chosen": selection(fast).chosen, "compiled": len(lab.compiled), "raced": bool(lab.calls), "right": right,
}))
"""


def start(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")}
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def test_two_processes_at_a_time_and_one_behind_them(tmp_path: Path) -> None:
    first, second = start(tmp_path), start(tmp_path)
    for process in (first, second):
        found = result(process)
        assert (found["chosen"], found["right"]) == ("affine absorbed", True)
    assert len(list((tmp_path / "selections").iterdir())) == 1, "both keep it under one name, and nothing lies about"
    behind = result(start(tmp_path))
    assert behind == {"chosen": "affine absorbed", "compiled": 1, "raced": False, "right": True}


@pytest.fixture
def timed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Times of the test's own, with Inductor."""
    from lncompile.lowering import torch_private_inductor

    monkeypatch.undo()
    monkeypatch.setenv(kept.FOLDER_VARIABLE, str(lab.folder))
    monkeypatch.setattr(contestants, "stopwatch_for", lambda device: lab.stopwatch)
    plain = torch_private_inductor.inductor_compile

    def counted(graph_module: Any, example_inputs: Any, config: Any) -> Any:
        lab.compiled.append(graph_module.code)
        return plain(graph_module, example_inputs, config)

    monkeypatch.setattr(torch_private_inductor, "inductor_compile", counted)
    return lab


def test_through_inductor(timed: Lab) -> None:
    timed.seconds = {"affine absorbed": 0.5}
    net = model(width=24)
    counters.clear()
    fast = compiled(net)
    torch.testing.assert_close(fast(x := value(3, 24)), net(x), **TOLERANCE)
    assert selection(fast).chosen == "affine absorbed"
    ways = len(timed.calls)
    assert len(timed.compiled) == ways + 1
    found = counters["aot_autograd"]
    # The graph that won is compiled as it will be called: the caches know it from the race, sizes and all.
    assert found["autograd_cache_hit"] >= 1
    assert found["autograd_cache_hit"] + found["autograd_cache_miss"] == ways + 1
    net.first.weight.mul_(2)
    torch.testing.assert_close(fast(x), net(x), **TOLERANCE)
    assert sum(report.folded for report in lncompile.reports(fast)) == 2


def test_stock_through_inductor(timed: Lab) -> None:
    timed.seconds = {"stock": 0.5}
    net = model(width=24)
    fast = compiled(net)
    torch.testing.assert_close(fast(x := value(3, 24)), net(x), **TOLERANCE)
    assert selection(fast).chosen == "stock"
    x = value(4, 24)  # compiled anew, with dynamic sizes
    torch.testing.assert_close(fast(x), net(x), **TOLERANCE)
    assert [report.folded for report in lncompile.reports(fast)] == [0, 2]


def test_a_mode_that_tunes_races(timed: Lab) -> None:
    net = model(width=24)
    fast = torch.compile(net, backend="lnfold", mode="max-autotune")
    torch.testing.assert_close(fast(x := value(3, 24)), net(x), **TOLERANCE)
    assert selection(fast).chosen == "model"
    assert timed.calls
