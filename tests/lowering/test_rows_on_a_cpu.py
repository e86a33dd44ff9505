"""Rows on a CPU: wide ones summed in slices, without a cascade, and scales stored, so that each is computed once."""

from __future__ import annotations

import copy
import functools
import operator
import re
from collections.abc import Callable

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn

import lncompile
from lncompile.lowering import (
    Spacing,
    StoredScale,
    rms_norm,
    row_scale,
    scale_stored_apart,
    slices_of_row,
    stored_scale_of,
)
from lncompile.lowering.inspect.generated_code import generated_code
from lncompile.lowering.target import compiled_for
from lncompile.passes.pipeline import rewriting
from lncompile.passes.rewrites import deferral
from lncompile.verification import relative_error

APART, IN_ROW = Spacing
WIDTH = 5120
IDS = torch.tensor([[1, 2, 0]])


class Block(nn.Module):
    """A stream that folds, a norm whose stream is read on, and a last one whose stream is not."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.table, self.norm, self.last = nn.Embedding(4, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.gate = nn.Linear(width, 1)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.table(ids)
        return self.last(stream + torch.tanh(self.gate(self.norm(stream))) * self.table(ids + 1))


class Deferred(Block):
    """The first norm is read by a product with a pointwise operation behind it."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.table(ids)
        return self.last(stream + self.down(torch.nn.functional.gelu(self.up(self.norm(stream)))))


def cascades(compiled: Callable[..., object]) -> int:
    """Reductions of the generated C++ that sum whole vectors in cascades."""
    kernels = generated_code(compiled, IDS).kernels
    return sum(len(re.findall(r"_vec = cascade_sum_combine\(", kernel.source)) for kernel in kernels)


def square_roots_in_loops_over_rows(compiled: Callable[..., object], width: int) -> int:
    """Loops over the elements of a row, of the generated C++, that take a square root before they store."""
    loops = [text for kernel in generated_code(compiled, IDS).kernels for text in kernel.source.split("for(int64_t ")]
    head = re.compile(rf"x\d=static_cast<int64_t>\(0L\); x\d<static_cast<int64_t>\({width}L\)")
    return sum("sqrt(" in text.partition(".store(")[0] and ".store(" in text for text in loops if head.match(text))


@pytest.mark.parametrize(
    ("width", "slices"),
    [(768, 1), (4096, 1), (5120, 2), (8192, 2), (12288, 3), (14336, 4), (16384, 4), (14848, 4), (20480, 5), (32768, 8),
     (36864, 1), (4097, 1), (4128, 3), (5000, 1)],
)  # fmt: skip
def test_how_many(width: int, slices: int) -> None:
    value = torch.empty(1, width, dtype=torch.bfloat16)
    assert slices_of_row(value) == slices
    assert width % slices == 0
    with compiled_for(torch.device("cuda")):
        assert slices_of_row(value) == 1
    assert slices_of_row(value.double()) == slices_of_row(value.requires_grad_()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", [2, 4])
def test_the_norm_and_the_scale_of_a_row(dtype: torch.dtype, slices: int) -> None:
    value = torch.randn(3, 64).to(dtype)
    weight, bias = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    torch.testing.assert_close(
        rms_norm(value, (64,), weight, bias, slices=slices), rms_norm(value, (64,), weight, bias), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(row_scale(value, 1e-5, dtype, slices), row_scale(value, 1e-5, dtype))


@pytest.mark.parametrize(
    ("sizes", "dtype", "spacing"),
    [((2, 5, 768), torch.float32, IN_ROW), ((2, 5, 64), torch.float32, IN_ROW), ((64,), torch.bfloat16, APART),
     ((2, 4096), torch.float32, None), ((2, 4096), torch.float16, APART), ((2, 32), torch.float32, None),
     ((2, 32), torch.float16, None), ((2, 768), torch.float64, None), ((1024, 1024), torch.float32, IN_ROW),
     ((1025, 1024), torch.float32, None), ((2048, 1024), torch.bfloat16, APART), ((0, 768), torch.float32, IN_ROW),
     ((2049, 1024), torch.bfloat16, IN_ROW)],
    ids=str,
)  # fmt: skip
def test_which_scales_are_stored(sizes: tuple[int, ...], dtype: torch.dtype, spacing: Spacing | None) -> None:
    value = torch.empty(sizes, dtype=dtype)
    assert stored_scale_of(value) == (StoredScale((*sizes[:-1], 1), spacing) if spacing else None)
    with compiled_for(torch.device("cuda")):
        assert stored_scale_of(value) is None
    assert stored_scale_of(value.requires_grad_()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_deferred_scales_are_stored_at_any_size(dtype: torch.dtype) -> None:
    """Nothing is read twice for it."""
    value = torch.empty(2, 4096, 1024, dtype=dtype)
    assert scale_stored_apart(value) == StoredScale((2, 4096, 1), APART)
    with compiled_for(torch.device("cuda")):
        assert scale_stored_apart(value) is None
    assert scale_stored_apart(value.requires_grad_()) is None


@pytest.mark.parametrize(("kind", "defer", "in_norms", "behind"), [(Block, "off", 2, 0), (Deferred, "on", 1, 1)])
def test_dynamic_rows_have_no_sizes_to_store(kind: type[Block], defer: str, in_norms: int, behind: int) -> None:
    model = randomise(kind(768)).eval()
    compiled = torch.compile(model, backend="lnfold", dynamic=True, options={"lnfold.defer": defer})
    assert square_roots_in_loops_over_rows(compiled, 768) == in_norms
    assert square_roots_in_loops_over_rows(compiled, 32) == behind
    torch.testing.assert_close(compiled(IDS), model(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "defer", "width", "loops"), [(Block, "off", 768, 2), (Deferred, "on", 32, 1)], ids=["norms", "deferred"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_scale_is_computed_once(
    dtype: torch.dtype, kind: type[Block], defer: str, width: int, loops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the loop over the elements of a row, be it the norm's or what a product puts out."""
    model = randomise(kind(768)).eval().to(dtype)
    options = {"lnfold.defer": defer}
    compiled = torch.compile(model, backend="lnfold", options=options)
    assert square_roots_in_loops_over_rows(compiled, width) == 0
    expected = copy.deepcopy(model).double()(IDS)
    ours, stock = (relative_error(f(IDS), expected) for f in (compiled, torch.compile(model)))
    assert ours <= max(1.25 * stock, 4 * torch.finfo(dtype).eps)
    monkeypatch.setattr(rewriting, "stored_scale_of", lambda value: None)
    monkeypatch.setattr(deferral, "scale_stored_apart", lambda value: None)
    torch._dynamo.reset()
    assert square_roots_in_loops_over_rows(torch.compile(model, backend="lnfold", options=options), width) == loops


@pytest.mark.parametrize(
    ("spacing", "square_roots"), [(IN_ROW, [True, False]), (APART, [False]), (None, [False, True])], ids=str
)
def test_a_scale_in_its_row_is_made_in_one_pass(spacing: Spacing | None, square_roots: list[bool]) -> None:
    """In the one loop over rows, behind the loop that sums a row; or in a loop of its own, or for every vector."""
    stored = StoredScale((6, 5, 1), spacing) if spacing else None
    terms = torch.randn(3, 6, 5, 768)

    def norm_of_sum(*terms: Tensor) -> Tensor:
        return rms_norm(functools.reduce(operator.add, terms), (768,), stored_scale=stored)

    (kernel,) = generated_code(torch.compile(norm_of_sum), *terms).kernels
    over_rows = kernel.source.split("for(int64_t x0=")[1:]
    assert len(over_rows) == (3 if spacing is APART else 1)
    # What follows the head of each loop over elements, to the next one.
    assert ["sqrt(" in text for text in over_rows[0].split("for(int64_t x1=")[1:]] == square_roots
    expected = rms_norm(terms.double().sum(0), (768,))
    torch.testing.assert_close(torch.compile(norm_of_sum)(*terms).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", Spacing)
def test_a_stored_scale_of_no_rows(spacing: Spacing) -> None:
    empty = torch.empty(0, 768)
    function = functools.partial(rms_norm, normalized_shape=(768,), stored_scale=StoredScale((0, 1), spacing))
    assert function(empty).shape == torch.compile(function)(empty).shape == empty.shape


@pytest.mark.parametrize("spacing", Spacing)
def test_a_stored_scale_leaves_the_stream_s_memory_to_the_result(spacing: Spacing) -> None:
    """Five terms are written to memory; nothing reads them but the norm."""

    def norm_of_sum(*terms: Tensor) -> Tensor:
        stored = StoredScale((64, 1), spacing)
        return rms_norm(functools.reduce(operator.add, terms), (768,), stored_scale=stored)

    code = generated_code(torch.compile(norm_of_sum), *torch.randn(5, 64, 768))
    assert sum(source.count("empty_strided_cpu((64, 768)") for source in code.source) == 1


@pytest.mark.parametrize("spacing", Spacing)
def test_the_stored_scale_of_a_stream_that_is_not_contiguous(spacing: Spacing) -> None:
    """Its sizes are those of the rows, in whatever order these lie in memory."""
    value = torch.randn(3, 5, 768).transpose(0, 1)
    weight, bias = torch.randn(768), torch.randn(768)
    stored = StoredScale((5, 3, 1), spacing)
    function = torch.compile(lambda x: rms_norm(x * 2, (768,), weight, bias, stored_scale=stored))
    torch.testing.assert_close(function(value), rms_norm(value * 2, (768,), weight, bias))


def test_only_where_the_stream_is_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last norm's result may take the memory of its stream, which slices read before it would forbid."""
    model = randomise(Block()).eval()
    compiled = torch.compile(model, backend="lnfold")
    assert cascades(compiled) == 1
    (report,) = lncompile.reports(compiled)
    assert (report.folded, report.total) == (2, 2)
    expected = copy.deepcopy(model).double()(IDS)
    ours, stock = (relative_error(f(IDS), expected) for f in (compiled, torch.compile(model)))
    assert ours <= max(1.25 * stock, 4 * torch.finfo(torch.float32).eps)
    monkeypatch.setattr(rewriting, "slices_of_row", lambda value: 1)
    torch._dynamo.reset()
    assert cascades(torch.compile(model, backend="lnfold")) == 2


def test_not_where_gradients_are_taken() -> None:
    model = randomise(Block()).eval()
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.training": "on"})
    with torch.enable_grad():
        # One more: the centering of the weight that is trained.
        assert cascades(compiled) == 3
    (report,) = lncompile.reports(compiled)
    assert report.folded == 2


def test_a_deferred_scale() -> None:
    """In bfloat16 on a CPU, where norms are deferred by themselves; the product keeps the stream."""
    model = randomise(Deferred()).eval().to(torch.bfloat16)
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.defer": "on"})
    assert cascades(compiled) == 1
    (report,) = lncompile.reports(compiled)
    assert [site.lowering for site in report.sites] == ["rms_norm_deferred", "rms_norm"]
    expected = copy.deepcopy(model).double()(IDS)
    ours, stock = (relative_error(f(IDS), expected) for f in (compiled, torch.compile(model)))
    assert ours <= max(1.25 * stock, 4 * torch.finfo(torch.bfloat16).eps)
