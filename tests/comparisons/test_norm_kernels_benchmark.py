"""The benchmark of the norm's kernels: it times what it says, interleaved, and no timing decides anything here."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import norm_kernels
import norm_kernels_on_cpu
import pytest
import recording
import torch

from lncompile.lowering.inspect.generated_code import GeneratedCode


def test_kinds_compute_one_thing(without_inductor: None) -> None:
    """On rows of zero mean; the folded norm's are."""
    inputs = [value.normal_() for value in norm_kernels.arguments(4, 64, "float32")]
    inputs[:2] = [value - value.mean(-1, keepdim=True) for value in inputs[:2]]
    expected = norm_kernels.add_layer_norm(*inputs)
    for kind in norm_kernels.KINDS:
        function, backend = norm_kernels.compiled_by(kind)
        torch._dynamo.reset()
        for actual, wanted in zip(torch.compile(function, backend=backend)(*inputs), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(("terms", "written"), [(2, False), (5, True)])
def test_the_sum_is_written_where_it_says(terms: int, written: bool) -> None:
    *_, weight, bias = norm_kernels.arguments(4, 64, "float32")
    function = functools.partial(norm_kernels_on_cpu.norm_of_sum, norm_kernels.rms_norm)
    with norm_kernels.generated_only() as wrappers:
        torch.compile(function, dynamic=False)(weight, bias, *(torch.randn(4, 64) for _ in range(terms)))
    (kernel,) = GeneratedCode.from_wrappers(wrappers).kernels
    assert kernel.source.count(".store(") == kernel.source.count("int64_t x0=") == 1 + written


def test_times_on_a_cpu_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_inductor: None, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = []

    def run_here(script: str, tasks: list[dict[str, Any]], progress: Any) -> list[Any]:
        assert Path(script).name == "norm_kernels_on_cpu.py"
        orders.extend(task["order"] for task in tasks)
        return [json.loads(json.dumps(norm_kernels_on_cpu.carry_out(json.loads(json.dumps(task))))) for task in tasks]

    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    monkeypatch.setattr(norm_kernels_on_cpu, "run_processes", run_here)
    chosen = "--widths 64 --dtypes float32 --seconds 0.01 --processes 2"
    assert norm_kernels_on_cpu.main(chosen.split()) == 0
    assert orders == [norm_kernels.KINDS, norm_kernels.KINDS[::-1]]
    result = json.loads((tmp_path / "norm_kernels-cpu.json").read_text())
    assert [cell["terms"] for cell in result["cells"]] == [2, 5]
    for cell in result["cells"]:
        assert (cell["width"], cell["rows"] * cell["width"]) == (64, norm_kernels_on_cpu.ELEMENTS)
        assert all(cell[f"{kind}_us"] > 0 for kind in norm_kernels.KINDS)
        assert cell["rounds"] >= 2 * 15
    assert "lnfold over layer_norm" in capsys.readouterr().out
