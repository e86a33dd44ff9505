"""What torch.compile does around a graph: CUDA graphs' static inputs, dynamic shapes, caches on disk, reset."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, randomise, tokens
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lncompile
from lncompile import backend
from lncompile.compiled_graphs import compiled_graphs
from lncompile.lowering.inspect import torch_private_codegen
from lncompile.runtime.shared_values import shared_values

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


class Residual(nn.Module):
    """Two pre-norm branches and a head: both norms fold, into three weights with their biases."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, value: Tensor) -> Tensor:
        stream = self.first(value)
        stream = stream + self.second(torch.relu(self.norm_1(stream)))
        return self.head(self.norm_2(stream))


def model(seed: int = 0) -> Residual:
    return randomise(Residual().double(), seed=seed).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("dynamic", [False, True])
def test_centered_weights_are_static_inputs(dynamic: bool) -> None:
    """CUDA graphs copy every input into place at each call, except those that Inductor is told are static."""
    inputs: list[dict[bool, list[tuple[int, ...]]]] = []

    def record(compile_inner: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(graph_module: Any, example_inputs: Any, **arguments: Any) -> Any:
            static = set(arguments["static_input_idxs"])
            shapes: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
            for index, example in enumerate(example_inputs):
                if isinstance(example, Tensor):
                    shapes[index in static].append(tuple(example.shape))
            inputs.append(shapes)
            return compile_inner(graph_module, example_inputs, **arguments)

        return wrapped

    net, value = model(), torch.randn(5, 16, dtype=torch.float64)
    with torch_private_codegen.replaced_inner_compile(record), torch_private_codegen.every_graph_lowered():
        torch.compile(net, backend="lnfold", dynamic=dynamic)(value)
    ((static, others),) = [(shapes[True], shapes[False]) for shapes in inputs]
    assert len(others) == 1, "the caller's tensor alone"
    centered = [*net.first.parameters(), *net.second.parameters()]
    assert sorted(static) == sorted(tuple(parameter.shape) for parameter in (*net.parameters(), *centered))


def test_one_compilation_for_all_lengths() -> None:
    counters.clear()
    net = model()
    compiled = torch.compile(net, backend="lnfold", dynamic=True)
    for length in (2, 7, 16, 33, 100):
        value = torch.randn(3, length, 16, dtype=torch.float64)
        torch.testing.assert_close(compiled(value), net(value), **TOLERANCE)
        net.second.weight.mul_(1.1)
    assert counters["stats"]["unique_graphs"] == 1
    assert [report.folded for report in lncompile.reports(compiled)] == [2]


def test_one_compilation_of_gpt2_for_all_lengths(without_inductor: None) -> None:
    net = next(a for a in ARCHITECTURES if a.name == "gpt2").model()
    compiled = torch.compile(net, backend="lnfold", dynamic=True)
    for length in (3, 8, 13, 16):
        ids = tokens(2, length)
        actual, expected = (m(input_ids=ids, use_cache=False).logits for m in (compiled, net))
        torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert [(report.folded, report.total) for report in lncompile.reports(compiled)] == [(5, 5)]


def test_compiled_blocks_share_code_through_inductor() -> None:
    blocks = nn.ModuleList([nn.Sequential(model(seed), nn.Linear(4, 16).double()) for seed in range(3)])
    value = torch.randn(5, 16, dtype=torch.float64)
    expected = [value]
    for block in blocks:
        expected.append(block(expected[-1]))
    for block in blocks:
        block.compile(backend="lnfold")
    actual = value
    for block, wanted in zip(blocks, expected[1:], strict=True):
        actual = block(actual)
        torch.testing.assert_close(actual, wanted, **TOLERANCE)
    blocks[1][0].second.weight.mul_(0)  # its own weights, and nobody else's
    torch.testing.assert_close(blocks[0](value), expected[1], **TOLERANCE)
    assert (blocks[1](expected[1]) - expected[2]).abs().max() > 1e-3
    (report,) = {id(report): report for block in blocks for report in lncompile.reports(block)}.values()
    assert report.folded == 2


@pytest.mark.parametrize("inductor", [False, True])
def test_reset_frees_everything(inductor: bool, request: pytest.FixtureRequest) -> None:
    if not inductor:
        request.getfixturevalue("without_inductor")
    net, value = model(), torch.randn(5, 16, dtype=torch.float64)
    compiled = torch.compile(net, backend="lnfold")
    compiled(value)
    (record,) = [r for r in compiled_graphs if r.report in lncompile.reports(compiled)]
    assert record.materializer is not None
    values = [value for known in record.materializer._sets.values() for value in known.values]
    assert len(values) == 4
    held: dict[str, weakref.ref[Any]] = {f"value {index}": weakref.ref(value) for index, value in enumerate(values)}
    held |= {"record": weakref.ref(record), "materializer": weakref.ref(record.materializer)}
    held |= {str(key): weakref.ref(entry) for key, entry in shared_values._entries.items()}
    del record, values
    torch._dynamo.reset()
    gc.collect()
    assert not {name for name, reference in held.items() if reference() is not None}
    # And the model, which is still there, compiles again.
    torch.testing.assert_close(torch.compile(net, backend="lnfold")(value), net(value), **TOLERANCE)


def test_many_compilations_leave_one_configuration_to_reset(without_inductor: None) -> None:
    torch._dynamo.reset()
    assert backend._used_configurations == []
    for rows in (2, 3, 4):
        torch.compile(model(), backend="lnfold", dynamic=False)(torch.randn(rows, 16, dtype=torch.float64))
    torch.compile(model(), backend="lnfold", mode="reduce-overhead")(torch.randn(5, 16, dtype=torch.float64))
    assert len(backend._used_configurations) == 2


COLD_OR_WARM = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch
from torch._dynamo.utils import counters
from test_modes import Residual
from architectures import randomise
import lncompile

net, value = randomise(Residual()).eval(), torch.linspace(-1, 1, 80).reshape(5, 16)
with torch.no_grad():
    compiled = torch.compile(net, backend="lnfold")
    error = float((compiled(value) - net(value)).abs().max())
    net.first.weight.mul_(1.5)
    error = max(error, float((compiled(value) - net(value)).abs().max()))
counts = {name: dict(counters[name]) for name in ("aot_autograd", "inductor", "lnfold")}
print(json.dumps({"error": error, "folded": [r.folded for r in lncompile.reports(compiled)], "counts": counts}))
"""


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-c",
        COLD_OR_WARM,
        json.dumps([str(Path(__file__).parent), str(Path(__file__).parent / "support")]),
    ]
    results = []
    for _ in range(2):
        finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        results.append(json.loads(finished.stdout.splitlines()[-1]))
    cold, warm = results
    for result in results:
        assert result["folded"] == [2]
        assert result["error"] < 1e-5
    assert cold["counts"]["aot_autograd"]["autograd_cache_miss"] == 1
    assert warm["counts"]["aot_autograd"]["autograd_cache_hit"] == 1
    assert warm["counts"]["inductor"]["fxgraph_cache_hit"] == 1
    assert "autograd_cache_miss" not in warm["counts"]["aot_autograd"]
