"""The generated sm_90 kernels compute the norm: run on CPU tensors by Triton's interpreter, against float64."""

import zlib
from typing import NamedTuple

import pytest
import torch
from graphs import compile_as_folded
from torch import Tensor
from torch.nn import functional

from lncompile.lowering import rms_norm
from lncompile.lowering.inspect.triton_interpreter import run_in_interpreter
from lncompile.lowering.inspect.triton_without_gpu import triton_for_sm90

pytest.importorskip("triton", reason="needs Triton to generate and interpret CUDA kernels: pip install triton")

# One process generates and runs what all of these tests look at.
pytestmark = pytest.mark.xdist_group("triton interpreter")

ROWS = 3
EPS = 1e-5


class Case(NamedTuple):
    norm: str
    width: int
    dtype: torch.dtype
    residual: bool
    parameter_dtype: torch.dtype | None = None
    axes: tuple[int, ...] = ()
    backend: str = "inductor"

    def __str__(self):
        return f"{self.norm}-{self.width}-{str(self.dtype)[6:]}{'-residual' * self.residual}-{self.backend}"

    @property
    def shape(self):
        return self.axes or (self.width,)


# A row of 768 is held by a persistent kernel; one of 4096 is read in blocks, twice, unless it is a folded norm's. Rows
# that are no power of two leave lanes of the block without an element.
CASES = [
    Case("rms_norm", width, dtype, residual)
    for width in (768, 4096)
    for dtype in (torch.float32, torch.bfloat16)
    for residual in (False, True)
] + [Case("layer_norm", 768, dtype, True) for dtype in (torch.float32, torch.bfloat16)]
HELD = [
    Case("rms_norm", 4096, torch.float32, True, backend="folded"),
    Case("rms_norm", 2560, torch.bfloat16, True, backend="folded"),
    Case("rms_norm", 8192, torch.bfloat16, False, torch.float32, backend="folded"),
    Case("rms_norm", 1536, torch.float16, True, axes=(24, 64), backend="folded"),
]
CASES += HELD
TAMPERED = [Case("rms_norm", 768, torch.float32, True), Case("rms_norm", 4096, torch.bfloat16, False), HELD[0]]


class Run(NamedTuple):
    arguments: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def function_of(case):
    norm = {"rms_norm": rms_norm, "layer_norm": functional.layer_norm}[case.norm]

    def plain(x, weight, bias):
        return (norm(x, case.shape, weight, bias, EPS),)

    def with_residual(x, residual, weight, bias):
        total = x + residual
        return norm(total, case.shape, weight, bias, EPS), total

    return with_residual if case.residual else plain


def arguments_of(case):
    """Random rows, γ and β. Rows for the RMSNorm have zero mean, as folding makes them; LayerNorm's have not."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = [3 * random(ROWS, case.width) + 2 for _ in range(1 + case.residual)]
    if case.norm == "rms_norm":
        rows = [row - row.mean(-1, keepdim=True) for row in rows]
    rows = [row.to(case.dtype).reshape(ROWS, *case.shape) for row in rows]
    parameters = (1 + 0.5 * random(*case.shape), random(*case.shape))
    return *rows, *(value.to(case.parameter_dtype or case.dtype) for value in parameters)


@pytest.fixture(scope="module")
def runs() -> dict[tuple[Case, str], Run]:
    """Every case as generated, and some tampered with, run in one process."""
    names, jobs, arguments = [], [], []
    for case in CASES:
        backend = compile_as_folded if case.backend == "folded" else "inductor"
        code = triton_for_sm90(function_of(case), *arguments_of(case), backend=backend)
        (kernel,) = code.kernels
        assert ("persistent_reduction(" in kernel.source) == (case.width <= 1024 or case in HELD)
        sources = {"as generated": code.source[0]}
        if case in TAMPERED:
            # As little as the tolerance of the dtype lets one see: ε against a mean of squares of about 10.
            other_eps = "1e-03" if case.dtype == torch.float32 else "2.0"
            sources["another ε"] = code.source[0].replace("1e-05", other_eps)
            sources["a tenth of the sum missing"] = code.source[0].replace("tl.sum(", "0.9 * tl.sum(")
        for name, source in sources.items():
            names.append((case, name))
            jobs.append((source, code.inputs[0]))
            arguments.append(arguments_of(case))
            assert name == "as generated" or source != code.source[0]
    outputs = run_in_interpreter(jobs)
    return {name: Run(used, output) for name, used, output in zip(names, arguments, outputs, strict=True)}


def assert_is_the_norm(case, run):
    """Compare with the same norm in float64 on the same (rounded) arguments.

    In 16 bits the result is rounded once; a kernel that reads the row twice also rounds the residual sum. In float32
    additions are in another order. Errors are relative to what is added up: γx̂, β, and the mean in units of the
    standard deviation, below 1.
    """
    exact = tuple(argument.double() for argument in run.arguments)
    expected = function_of(case)(*exact)[0]
    bias = exact[-1]
    unit = torch.finfo(case.dtype).eps
    tolerance = (8 * unit if case.dtype == torch.float32 else unit) * (1 + (expected - bias).abs() + bias.abs())
    assert run.outputs[0].dtype == case.dtype
    assert ((run.outputs[0].double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_computes_the_norm(runs, case):
    run = runs[case, "as generated"]
    assert_is_the_norm(case, run)
    if case.residual:
        # The sum is one addition, rounded to nearest: equal bit by bit.
        assert torch.equal(run.outputs[1], run.arguments[0] + run.arguments[1])


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.float32], ids=str)
def test_kernel_of_zero_mean_rows_computes_layer_norm(runs, case):
    run = runs[case, "as generated"]
    layer_norm = function_of(case._replace(norm="layer_norm"))
    expected = layer_norm(*(argument.double() for argument in run.arguments))[0]
    torch.testing.assert_close(run.outputs[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tampering", ["another ε", "a tenth of the sum missing"])
@pytest.mark.parametrize("case", TAMPERED, ids=str)
def test_a_tampered_kernel_is_caught(runs, case, tampering):
    with pytest.raises(AssertionError):
        assert_is_the_norm(case, runs[case, tampering])


def test_a_failing_kernel_is_reported():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_in_interpreter([("def call(args):\n    return 1 // 0", [])])
