"""Compiled by one process, run by another: aot_compile, and caching_precompile with saved artifacts."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import randomise
from reported import IDS, Decoder
from torch import Tensor, nn

import lncompile
from lncompile import folded_graph
from lncompile.lowering import can_compare, torch_private_compiler
from lncompile.lowering import torch_private_precompile as precompile
from lncompile.passes.graph.expressions import Expression

PROGRAM = Path(__file__).parent / "support" / "ahead_of_time.py"
FOLDED = 3


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.relu(self.linear(self.embedding(ids)))


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Decoder(layers=1).double()).eval()


def worst_error(compiled: Any, net: nn.Module, ids: Tensor = IDS) -> float:
    return (compiled(net, ids) - net(ids)).abs().max().item()


def saved(net: nn.Module, path: Path, ids: Tensor = IDS) -> Path:
    compiled: Any = torch.compile(net, backend="lnfold", fullgraph=True)
    compiled.forward.aot_compile(((ids,), {})).save_compiled_function(path)
    return path


def loaded(path: Path) -> Any:
    with path.open("rb") as file:
        return torch.compiler.load_compiled_function(file)


@pytest.fixture(scope="module")
def compiled_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model compiled ahead of time, once for all tests that load it."""
    with torch.no_grad(), torch._dynamo.config.patch(enable_aot_compile=True):
        yield saved(model(), tmp_path_factory.mktemp("aot") / "compiled.bin")


# --- aot_compile ------------------------------------------------------------------------------------------------------


def test_loaded_code_serves_other_weights_and_notices_changes(compiled_file: Path) -> None:
    compiled = loaded(compiled_file)
    for seed in (0, 7):
        net = model(seed)
        assert worst_error(compiled, net) < 1e-12
        net.h[0].attn.weight.mul_(1.5)
        assert worst_error(compiled, net) < 1e-12
        net.embedding.weight.data.copy_(torch.randn_like(net.embedding.weight))  # which torch does not count
        assert worst_error(compiled, net) < 1e-12
        assert [report.folded for report in lncompile.reports(net)] == [FOLDED]
        assert not {weight.storage for report in lncompile.reports(net) for weight in report.weights} - {"copy"}


def test_without_centering_it_would_be_wrong(compiled_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Expression, "evaluate", lambda self, leaves: leaves[0].detach().clone())
    assert worst_error(loaded(compiled_file), model(3)) > 1e-3


def test_weights_that_move_at_every_call_are_answered_right(
    compiled_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is given up, and nothing says so: there is no code of the graph as it came."""
    compiled = loaded(compiled_file)
    for seed in range(60):
        assert worst_error(compiled, model(seed)) < 1e-12
    assert not [record for record in caplog.records if record.name == "lncompile"]


def test_it_can_be_saved_again(compiled_file: Path, tmp_path: Path) -> None:
    loaded(compiled_file).save_compiled_function(tmp_path / "again.bin")
    assert worst_error(loaded(tmp_path / "again.bin"), model(4)) < 1e-12


def test_the_look_in_c_comes_with_it(compiled_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new container does not wait for a compiler."""
    if not can_compare():
        pytest.skip("no function in C can be compiled here")
    monkeypatch.setattr(torch_private_compiler, "inductor_cache_folder", lambda: str(tmp_path))
    loaded(compiled_file)
    (library,) = (tmp_path / "lncompile").iterdir()
    assert ctypes.PyDLL(str(library)).PyInit_host_words


def test_another_release_is_refused(compiled_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lncompile, "__version__", "0.0.7")
    with pytest.raises(RuntimeError, match=r"compiled by lncompile 0\.1\.0, and this is 0\.0\.7: compile it anew"):
        loaded(compiled_file)


@torch._dynamo.config.patch(enable_aot_compile=True)
def test_a_graph_without_anything_to_fold_is_saved_as_stock_saves_it(tmp_path: Path) -> None:
    net = Plain().double()
    compiled = loaded(saved(net, tmp_path / "plain.bin"))
    assert worst_error(compiled, net) < 1e-12


@torch._dynamo.config.patch(enable_aot_compile=True)
def test_any_size(tmp_path: Path) -> None:
    ids = torch.randint(0, 20, (2, 6))
    torch._dynamo.mark_dynamic(ids, 1)
    compiled = loaded(saved(model(), tmp_path / "dynamic.bin", ids))
    for length in (3, 5, 9):
        assert worst_error(compiled, model(1), torch.randint(0, 20, (2, length))) < 1e-12


@torch._dynamo.config.patch(enable_aot_compile=True)
def test_gradients(tmp_path: Path) -> None:
    with torch.enable_grad():
        compiled = loaded(saved(model(), tmp_path / "training.bin"))
        net, plain = model(5), model(5)
        ids = torch.randint(0, 20, IDS.shape)
        (compiled(net, ids) ** 2).sum().backward()
        (plain(ids) ** 2).sum().backward()
    for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)


# --- caching_precompile -----------------------------------------------------------------------------------------------


def test_what_is_saved_is_checked_when_it_is_read(compiled_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo asks by the source of a function alone; what was compiled for something else is not to be run."""
    loaded(compiled_file)(net := model(), IDS)
    (report,) = lncompile.reports(net)
    arguments = {"mode": None, "options": {"lnfold.defer": "off"}}
    options = lncompile.Options(defer="off")
    release = lncompile.__version__
    known = folded_graph.Saved(release, options, arguments, (), (), report)
    artifact = folded_graph.SavedGraph("__compiled_fn_0", ("inner", known))
    assert copy.deepcopy(artifact).content == artifact.content
    backend = type("Backend", (), {"compiler_name": "lnfold", "kwargs": {"mode": None, "options": {}}})()
    monkeypatch.setattr(precompile, "backend_of_load", lambda: backend)
    with pytest.raises(RuntimeError, match="another mode or other options"):
        copy.deepcopy(artifact)
    backend.kwargs["options"] = {"lnfold.defer": "off"}
    copy.deepcopy(artifact)
    monkeypatch.setenv("LNCOMPILE_DISABLE_PASSES", "defer")
    with pytest.raises(RuntimeError, match="another mode or other options"):
        copy.deepcopy(artifact)
    monkeypatch.delenv("LNCOMPILE_DISABLE_PASSES")
    backend.compiler_name = "inductor"
    with pytest.raises(RuntimeError, match="another backend is asked for"):
        copy.deepcopy(artifact)
    backend.compiler_name = "lnfold"
    other = dataclasses.replace(known, release="0.0.7")
    with pytest.raises(RuntimeError, match="compiled by lncompile"):
        copy.deepcopy(folded_graph.SavedGraph("__compiled_fn_0", ("inner", other)))


def run(folder: Path, step: str, backend: str = "lnfold", option: str = "") -> dict[str, Any]:
    """What a process of its own says that knows nothing but the artifacts in a folder."""
    # What Dynamo keeps on disk itself; Inductor's cache beside it spares asking the C++ compiler what it can do.
    shutil.rmtree(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "dynamo", ignore_errors=True)
    command = [sys.executable, str(PROGRAM), step, str(folder / "artifacts"), backend, option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_another_process_loads_it_and_centers_its_own_weights(tmp_path: Path) -> None:
    made = run(tmp_path, "save")
    assert made["compiled"] == 1
    assert made["errors"][0] < 1e-12
    found = run(tmp_path, "load")
    assert found["cache"] == {"dynamo_cache_hit": 1}
    assert found["compiled"] == 0, "nothing was compiled"
    assert found["folded"] == [FOLDED]
    assert max(found["errors"]) < 1e-12
    for other in ({"backend": "inductor"}, {"option": "lnfold.defer"}):
        found = run(tmp_path, "load", **other)
        assert found["cache"] == {"dynamo_cache_error": 1}
        assert max(found["errors"]) < 1e-12
        assert found["folded"] == ([] if "backend" in other else [FOLDED])
