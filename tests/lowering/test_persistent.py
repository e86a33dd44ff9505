"""Rows of folded norms held in registers: chosen for them alone, known to the caches, right in every dtype."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

import lncompile
from lncompile.lowering import FOLDED_STATISTIC, persistent_norms, torch_private_inductor
from lncompile.lowering.inspect.generated_code import Kernel
from lncompile.lowering.inspect.machine_code import compile_kernel
from lncompile.lowering.inspect.triton_without_gpu import RetargetedCode, retargeted_to_gpu, triton_for_sm90
from lncompile.lowering.persistent import WIDEST_ROW, ReductionKernel, holds_its_row
from lncompile.lowering.torch_private_choices import persistent_where

needs_triton = pytest.mark.usefixtures("triton")


@pytest.fixture
def triton() -> None:
    pytest.importorskip("triton", reason="needs Triton to generate CUDA kernels: pip install triton")


class Block(nn.Module):
    """A residual stream of two linear layers, and what is to be computed from it."""

    def __init__(self, width: int, read: Callable[[Block, Tensor], Any]) -> None:
        super().__init__()
        self.left, self.right, self.up = nn.Linear(8, width), nn.Linear(8, width), nn.Linear(width, 8)
        self.norm, self.other_norm = nn.LayerNorm(width), nn.LayerNorm(width, bias=False)
        self.scale = nn.Parameter(torch.ones(width))
        self.read = read

    def forward(self, value: Tensor) -> Any:
        return self.read(self, self.left(value) + self.right(value * 2))


def norm(m: Block, stream: Tensor) -> Any:
    return m.norm(stream)


def rms_norm_of_the_user(m: Block, stream: Tensor) -> Tensor:
    wide = stream.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(stream.dtype) * m.scale


def norm_by_hand(m: Block, stream: Tensor) -> Tensor:
    wide = stream.float()
    difference = wide - wide.mean(-1, keepdim=True)
    variance = difference.pow(2).mean(-1, keepdim=True)
    return (difference * torch.rsqrt(variance + 1e-5) * m.scale).to(stream.dtype)


def generate(
    read: Callable[[Block, Tensor], Any], backend: str, width: int = 4096, rows: int = 16, **options: Any
) -> RetargetedCode:
    model = randomise(Block(width, read)).to(torch.bfloat16)
    return triton_for_sm90(model, torch.randn(rows, 8, dtype=torch.bfloat16), backend=backend, options=options or None)


def is_persistent(kernel: Kernel) -> bool:
    return "persistent_reduction(" in kernel.source


def kinds(code: RetargetedCode) -> list[bool]:
    """Whether each reduction kernel is persistent, in order."""
    return [is_persistent(kernel) for kernel in code.kernels if kernel.reductions]


# --- The choice ------------------------------------------------------------------------------------------------------

FOLDED = ReductionKernel(4096, True, 4, (dict(FOLDED_STATISTIC),), "cuda", False)


def test_which_kernels_hold_their_row() -> None:
    assert holds_its_row(FOLDED)
    assert holds_its_row(replace(FOLDED, width=WIDEST_ROW, operands=6))
    assert holds_its_row(replace(FOLDED, width=WIDEST_ROW // 2, operands=13))
    assert holds_its_row(replace(FOLDED, annotations=({**FOLDED_STATISTIC, "user": 1},) * 2))


@pytest.mark.parametrize(
    "change",
    [{"width": None}, {"width": WIDEST_ROW + 1}, {"is_along_rows": False}, {"operands": 14},
     {"width": 4097, "operands": 7}, {"annotations": ()},
     {"annotations": (dict(FOLDED_STATISTIC), {})}, {"annotations": ({"user": 1},)},
     {"device": "hip"}, {"device": "cpu"}, {"is_backward": True}],
    ids=str,
)  # fmt: skip
def test_which_kernels_do_not(change: dict[str, Any]) -> None:
    assert not holds_its_row(replace(FOLDED, **change))


@needs_triton
@pytest.mark.parametrize(("read", "width"), [(norm, 1536), (norm, 8192), (norm_by_hand, 4096)])
def test_a_folded_norm_reads_its_row_once(read: Callable[[Block, Tensor], Any], width: int) -> None:
    ours, stock = generate(read, "lnfold", width), generate(read, "inductor", width)
    assert (kinds(ours), kinds(stock)) == ([True], [False])
    (kernel,), (control,) = ([k for k in code.kernels if k.reductions] for code in (ours, stock))
    assert (kernel.reductions, kernel.welford, kernel.mean_subtractions) == (1, False, 0)
    assert kernel.stores <= control.stores
    assert kernel.loads < control.loads
    machine = compile_kernel(kernel)[0]
    assert (machine.spills, machine.stack, machine.calls) == (0, 0, 0)


@needs_triton
def test_a_number_of_rows_that_is_dynamic_and_several_axes() -> None:
    def norm_of_axes(m: Block, stream: Tensor) -> Tensor:
        in_two = stream.unflatten(-1, (8, -1))
        return functional.layer_norm(in_two, in_two.shape[1:], m.scale.unflatten(0, (8, -1)), None)

    model = randomise(Block(2048, norm_of_axes))
    with retargeted_to_gpu() as recorder:
        compiled = torch.compile(model, backend="lnfold", dynamic=True)
        for rows in (3, 5):
            compiled(torch.randn(rows, 8))
    assert lncompile.explain(model, torch.randn(3, 8)).folded == 1
    assert (len(recorder.code.source), kinds(recorder.code)) == (1, [True])


@needs_triton
def test_wider_rows_stay_as_they_are() -> None:
    assert kinds(generate(norm, "lnfold", width=2 * WIDEST_ROW, rows=1024)) == [False]


@needs_triton
@pytest.mark.parametrize("backend", ["inductor", "lnfold"])
def test_what_the_user_wrote_stays_as_it_is(backend: str) -> None:
    def two_norms(m: Block, stream: Tensor) -> Tensor:
        # The product in between keeps the two norms in kernels of their own.
        return rms_norm_of_the_user(m, m.up(m.norm(stream)) @ m.up.weight)

    expected = [False, False] if backend == "inductor" else [True, False]
    assert kinds(generate(two_norms, backend)) == expected


@needs_triton
def test_a_kernel_that_reduces_more_than_the_statistic_stays_as_it_is() -> None:
    def norm_and_maximum(m: Block, stream: Tensor) -> Any:
        normed = m.norm(stream)
        return normed, normed.amax(-1)

    code = generate(norm_and_maximum, "lnfold")
    assert sum(kernel.reductions for kernel in code.kernels) == 2
    assert not any(kinds(code))


@needs_triton
def test_a_graph_with_nothing_folded_is_what_stock_compiles() -> None:
    def nothing_folds(m: Block, stream: Tensor) -> Any:
        return m.norm(torch.relu(stream)), rms_norm_of_the_user(m, stream)

    options = {"lnfold.assist": "off"}
    ours, stock = generate(nothing_folds, "lnfold", **options), generate(nothing_folds, "inductor")
    assert without_comments(ours) == without_comments(stock)


def without_comments(code: RetargetedCode) -> list[str]:
    # Comments name the folder of the compiler's cache.
    return [line for source in code.source for line in source.splitlines() if not line.startswith("#")]


@needs_triton
def test_options_of_the_user_are_respected() -> None:
    assert kinds(generate(norm, "lnfold", **{"triton.persistent_reductions": False})) == [False]


@needs_triton
def test_choices_of_the_user_are_respected() -> None:
    asked = []

    def factory() -> Any:
        from torch._inductor.choices import InductorChoices

        class Mine(InductorChoices):
            def uuid(self) -> str:
                return "mine"

        asked.append(Mine())
        return asked[-1]

    assert kinds(generate(norm, "lnfold", inductor_choices_class=factory)) == [False]
    from torch._inductor.virtualized import V

    with V.set_choices_handler(factory()):
        assert kinds(generate(norm, "lnfold")) == [False]
    assert kinds(generate(norm, "lnfold")) == [True]


# --- Caches ----------------------------------------------------------------------------------------------------------


def two_means(value: Tensor) -> Tensor:
    return value.pow(2).mean(-1) + value.abs().mean(-1)


def compile_with_folded(*folded: int) -> Callable[..., Any]:
    """A backend that takes some means of the graph, by their order, for statistics of folded norms."""

    def backend(graph_module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        means = [node for node in graph_module.graph.nodes if node.target == "mean"]
        for index in folded:
            means[index].meta["custom"] = dict(FOLDED_STATISTIC)
        with persistent_norms(graph_module, {}):
            return torch_private_inductor.inductor_compile(graph_module, inputs, {})

    return backend


@pytest.mark.parametrize("cache", ["fx_graph", "autograd"])
def test_caches_tell_graphs_of_one_text_apart(cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    value = torch.randn(3, 5)

    def outcomes(*folded: int) -> list[int]:
        torch.compiler.reset()
        counters.clear()
        compiled = torch.compile(two_means, backend=compile_with_folded(*folded), fullgraph=True)
        torch.testing.assert_close(compiled(value), two_means(value))
        group, prefix = ("aot_autograd", "autograd_cache") if cache == "autograd" else ("inductor", "fxgraph_cache")
        return [counters[group][f"{prefix}_{outcome}"] for outcome in ("hit", "miss")]

    with torch._functorch.config.patch(enable_autograd_cache=cache == "autograd"):
        choices = [(), (0,), (1,), (0, 1)]
        assert [outcomes(*folded) for folded in choices] == [[0, 1]] * 4
        assert [outcomes(*folded) for folded in choices] == [[1, 0]] * 4
    assert torch.compiler.config.cache_key_tag == ""


def test_the_choice_can_be_pickled() -> None:
    from torch._inductor.virtualized import V

    with persistent_where(holds_its_row, "name"):
        assert torch.compiler.config.cache_key_tag == "name"
        again = pickle.loads(pickle.dumps(V.choices))
        assert type(again).__name__ == type(V.choices).__name__
    assert again.__reduce__()[1] == (holds_its_row,)
    assert type(again).__name__ != type(V.choices).__name__
