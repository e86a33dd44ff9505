"""Products of one row on a CPU: when they are sums by themselves, and how their weights are read."""

from __future__ import annotations

import re

import pytest
import torch
from branch_blocks import branch_block
from decoding_steps import decoder
from graphs import capture
from torch import Tensor
from torch.nn import functional

from lncompile.lowering import blocks_of_weight, matrix_vector
from lncompile.lowering.inspect import torch_private_codegen
from lncompile.lowering.inspect.generated_code import GeneratedCode
from lncompile.lowering.target import compiled_for
from lncompile.options import Options
from lncompile.verification import relative_error

ONE, TWO = torch.tensor([[3]]), torch.tensor([[3, 4]])


@pytest.mark.parametrize(
    ("dtype", "inductors", "expected"),
    [
        (torch.float32, {}, 2),
        (torch.bfloat16, {}, 2),
        (torch.float16, {}, 2),
        (torch.float64, {}, 0),  # not measured
        (torch.float32, {"freezing": True}, 0),
        (torch.float32, {"max_autotune": True}, 0),
        (torch.bfloat16, {"max_autotune_gemm": True}, 0),
        (torch.float32, {"coordinate_descent_tuning": True}, 2),
    ],
)
def test_by_itself_on_a_cpu(
    dtype: torch.dtype, inductors: dict[str, bool], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = branch_block(lambda m, x: functional.gelu(m.up(m.norm(x))), 16, 24).to(dtype)
    one, two = capture(model, ONE), capture(model, TWO)
    for capability, found in (("AVX512", expected), ("AVX2", 0)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        assert len(one.analyse(Options(), inductors).matrix_vectors.products) == found
        assert not one.analyse(Options(matrix_vector="off"), inductors).matrix_vectors.products
        assert not two.analyse(Options(), inductors).matrix_vectors.products


# Outputs and features: in one block; in four; with rows left over; in slices, which cascades would take the place of.
WEIGHTS = {(24, 16): 1, (63, 8192): 1, (64, 4096): 4, (1027, 384): 4, (258, 8192): 4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", WEIGHTS)
def test_weights_are_read_in_blocks_on_a_cpu(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    row, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((1, 1, sizes[1]), sizes, (sizes[0],)))
    blocks = blocks_of_weight(weight)
    assert blocks == WEIGHTS[sizes]
    with compiled_for(torch.device("cuda")):
        assert blocks_of_weight(weight) == 1
    expected = functional.linear(row.double(), weight.double(), bias.double())
    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    for given, total in ((bias, expected), (None, expected - bias.double())):
        answer = matrix_vector(row, weight, given, sizes, (1, 1, sizes[0]), dtype, blocks)
        assert answer.dtype == dtype
        assert relative_error(answer, total) <= limit


@pytest.mark.parametrize(("sizes", "sums"), [((1027, 384), 4), ((258, 8192), 4), ((24, 16), 1)])
def test_one_loop_reads_a_row_of_each_block(sizes: tuple[int, int], sums: int) -> None:
    """In the C++ that Inductor generates: so many sums side by side in a loop over the features, none in cascades."""

    def product(row: Tensor, weight: Tensor) -> Tensor:
        return matrix_vector(row, weight, None, sizes, (1, 1, sizes[0]), row.dtype, blocks_of_weight(weight))

    row, weight = torch.randn(1, 1, sizes[1]), torch.randn(sizes)
    with torch_private_codegen.recorded_wrappers() as wrappers:
        compiled = torch.compile(product, dynamic=False)
        torch.testing.assert_close(compiled(row, weight), functional.linear(row, weight), rtol=1e-4, atol=1e-4)
    (code,) = wrappers
    assert "cascade" not in code.lower()
    accumulators = [set(re.findall(r"tmp_acc\d+_vec", loop)) for loop in code.split("for(int64_t x0=")]
    assert max(map(len, accumulators)) == sums


def test_a_step_of_decoding_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, through Inductor: no product is left to a library, and errors are not larger than stock's."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    model, arguments = decoder("opt", torch.bfloat16)
    wide, wide_arguments = decoder("opt", torch.float64)
    wide.load_state_dict(model.state_dict())
    expected = wide(**wide_arguments()).logits
    found = {}
    for backend in ("inductor", "lnfold"):
        torch._dynamo.reset()
        given = arguments()
        with torch_private_codegen.recorded_wrappers() as wrappers:
            answer = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(**given).logits
        found[backend] = GeneratedCode.from_wrappers(wrappers).extern_calls, relative_error(answer, expected)
    assert found["inductor"][0] - found["lnfold"][0] == 13, "six products a layer, and the head"
    assert found["lnfold"][1] <= 1.25 * found["inductor"][1]
