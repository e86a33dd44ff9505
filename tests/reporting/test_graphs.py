"""Graphs that people asked to see: in a folder, in the log, in torch's structured trace."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import randomise
from command_line import answer, assert_refused
from torch import Tensor, nn

import lncompile
from lncompile import graph_observers, safety_net
from lncompile.graph_observers import watched_by
from lncompile.lowering import torch_private_logs
from lncompile.passes.pipeline.order import PIPELINE
from lncompile.reporting.graphs import GraphDirectory


def net() -> nn.Module:
    return randomise(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.LayerNorm(8))).eval()


def make_net() -> tuple[nn.Module, Tensor]:
    return net(), torch.randn(3, 8)


def written(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


#: What is written for a net of two norms, of which one folds.
FILES = [
    "00-captured.py", "06-facts.txt", "08-sites.txt", "09-streams.txt", "10-place.txt", "13-absorptions.txt",
    "15-verdicts.txt", "16-center.py", "20-hoist.py", "23-lower.py",
]  # fmt: skip


def test_a_folder_of_graphs(tmp_path: Path) -> None:
    with watched_by(GraphDirectory(tmp_path / "new" / "graphs")):
        report = lncompile.explain(net(), torch.randn(3, 8))
    assert (report.folded, report.total) == (1, 2)
    path = tmp_path / "new" / "graphs"
    assert written(path) == [f"graph-1/{name}" for name in FILES] + ["index.txt"]
    captured, centered, lowered = (
        (path / "graph-1" / name).read_text() for name in ("00-captured.py", "16-center.py", "23-lower.py")
    )
    assert "_centered_" not in captured
    assert "torch.mean(" in centered
    assert centered.count("functional.layer_norm") == captured.count("functional.layer_norm") == 2
    assert lowered.count("functional.layer_norm") == 1
    assert " folds: that saves 96 bytes a call" in (path / "graph-1" / "10-place.txt").read_text()
    lines = (path / "index.txt").read_text().splitlines()
    rows = [line for line in lines if re.search(r" (?:decides|rewrites) +\d+\.\d\d  ", line)]
    assert len(rows) == len(PIPELINE)
    assert re.match(r"16-center\.py +center +rewrites +\d+\.\d\d  Centered weights .* \(\+\d+ -1 lines\)$", rows[15])
    assert rows[21].split()[:2] == ["matrix_vector", "rewrites"], "no file of a pass that changed nothing"
    # Again into the same folder, with less to write.
    compiled = torch.compile(net(), backend="lnfold", options={"lnfold.disable_passes": "center"})
    with watched_by(GraphDirectory(path)):
        lncompile.explain(compiled, torch.randn(3, 8))
    assert "graph-1/16-center.py" not in written(path)
    assert "switched off" in (path / "index.txt").read_text()


def test_a_folder_for_each_graph(tmp_path: Path) -> None:
    first, second = net(), net()

    def function(x: Tensor) -> Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    with watched_by(GraphDirectory(tmp_path)):
        lncompile.explain(function, torch.randn(3, 8))
    assert written(tmp_path) == [f"graph-{n}/{name}" for n in (1, 2) for name in FILES] + ["index.txt"]


def test_passes_that_run_again_are_shown_again(tmp_path: Path) -> None:
    """An encoder layer in which nothing folds is closed again."""
    layer = randomise(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    with watched_by(GraphDirectory(tmp_path)):
        report = lncompile.explain(layer, torch.randn(2, 3, 8))
    assert report.total == 2
    index = (tmp_path / "index.txt").read_text()
    again = "the passes that decide run again, with fewer operators written out" in index
    assert again == (report.folded == 0)
    assert len(re.findall(r"streams\.txt +streams ", index)) == 1 + again


def test_the_watch_ends(tmp_path: Path) -> None:
    with watched_by(GraphDirectory(tmp_path)):
        pass
    lncompile.explain(net(), torch.randn(3, 8))
    assert written(tmp_path) == ["index.txt"]


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty, and what is in it was not written by --graphs"):
        GraphDirectory(tmp_path)
    (tmp_path / "index.txt").write_text("chapters")
    with pytest.raises(ValueError, match="is not empty"):
        GraphDirectory(tmp_path)
    assert written(tmp_path) == ["index.txt", "thesis.txt"]


def test_the_log_shows_graphs_and_decisions(caplog: pytest.LogCaptureFixture, without_inductor: None) -> None:
    with caplog.at_level(logging.INFO, logger="lncompile"):
        torch.compile(net(), backend="lnfold")(torch.randn(3, 8))
    assert "graph after pass" not in caplog.text
    torch._dynamo.reset()
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="lncompile"):
        torch.compile(net(), backend="lnfold")(torch.randn(3, 8))
    said = [record.getMessage() for record in caplog.records if record.name == "lncompile"]
    assert sum(message.startswith("graph after pass") for message in said) == 3
    assert any(re.match(r"graph after pass center \(\d+\.\d ms\)\ndef forward\(\n", message) for message in said)
    assert any("bytes of memory traffic a call" in message for message in said)


def test_the_trace_has_each_graph_that_changed(monkeypatch: pytest.MonkeyPatch, without_inductor: None) -> None:
    found: dict[str, str] = {}
    monkeypatch.setattr(torch_private_logs, "is_traced", lambda: True)
    monkeypatch.setattr(torch_private_logs, "trace_text", lambda name, payload: found.update({name: payload()}))
    torch.compile(net(), backend="lnfold")(torch.randn(3, 8))
    assert [name.removeprefix("lnfold_").replace("_", "-", 1) for name in found] == [n.partition(".")[0] for n in FILES]
    assert "torch.rsqrt" in found["lnfold_23_lower"]


def test_who_cannot_look_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, without_inductor: None
) -> None:
    """A failure of the log's changes nothing of what is compiled."""

    def fail(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(graph_observers.GraphLog, "after", fail)
    with caplog.at_level(logging.DEBUG, logger="lncompile"), pytest.raises(Exception, match="a bug of ours"):
        torch.compile(net(), backend="lnfold")(torch.randn(3, 8))
    torch._dynamo.reset()
    monkeypatch.setattr(safety_net, "enabled", True)
    with caplog.at_level(logging.DEBUG, logger="lncompile"):
        compiled = torch.compile(net(), backend="lnfold")
        compiled(torch.randn(3, 8))
    assert [report.folded for report in lncompile.reports(compiled)] == [1]
    assert "lnfold cannot show a graph, and goes on" in caplog.text


# Inductor takes seconds, and shows nothing of ours.
PROGRAM = """
import torch
from lncompile.lowering import torch_private_inductor
torch_private_inductor.inductor_compile = lambda graph_module, example_inputs, config: graph_module.forward
net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).eval()
with torch.no_grad():
    torch.compile(net, backend="lnfold")(torch.randn(3, 8))
"""


def test_torch_s_own_switches(tmp_path: Path) -> None:
    """``TORCH_LOGS`` and ``TORCH_TRACE``, as they are set before torch is imported."""
    environment = {**os.environ, "TORCH_LOGS": "+lncompile", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"graph after pass center \(", done.stderr)
    assert "graph after pass lower" in done.stderr
    assert "1 of 1 LayerNorms folded" in done.stderr
    traced = "".join(file.read_text() for file in tmp_path.iterdir())
    names = [json.loads(name) for name in re.findall(r'"name": ("lnfold_\w+")', traced)]
    assert "lnfold_16_center" in names
    assert "lnfold_10_place" in names


def test_the_command(tmp_path: Path) -> None:
    target = tmp_path / "graphs"
    found = answer("explain", f"{__file__}:make_net", "--graphs", str(target))
    assert [one["name"] for one in found["explain"]["passes"]] == [one.name for one in PIPELINE]
    assert written(target) == [f"graph-1/{name}" for name in FILES] + ["index.txt"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    arguments = ("explain", f"{__file__}:make_net", "--graphs", str(tmp_path / "other"))
    assert_refused(*arguments, says=("was not written by --graphs",))
