"""What the whole pipeline generates for models: every folded site one reduction, no mean, no further kernels."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, TEXT, randomise, tokens
from torch import Tensor, nn

import lncompile
from lncompile.lowering.inspection import GeneratedCode, Kernel, generated_code
from lncompile.lowering.triton_interpreter import run_in_interpreter
from lncompile.lowering.triton_without_gpu import compile_kernel, triton_for_sm90

needs_triton = pytest.mark.usefixtures("triton")


@pytest.fixture
def triton() -> None:
    pytest.importorskip("triton", reason="needs Triton to generate CUDA kernels: pip install triton")


def norm_kernels(code: GeneratedCode) -> list[Kernel]:
    """Kernels that take the root of a statistic: the norms. Softmax and activations have none."""
    return [kernel for kernel in code.kernels if "sqrt" in kernel.source and kernel.reductions]


def with_mean(code: GeneratedCode) -> list[Kernel]:
    return [kernel for kernel in code.kernels if kernel.welford or kernel.mean_subtractions]


@pytest.mark.parametrize("name", ["gpt2", "vit", "falcon_7b"])
def test_cpp_of_a_model_has_no_mean_left(name: str) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model, inputs = architecture.model(torch.float32), architecture.inputs(torch.float32)
    stock = generated_code(torch.compile(model), **inputs)
    ours = generated_code(torch.compile(model, backend="lnfold"), **inputs)
    assert with_mean(stock), "the control: stock Inductor's norms have means"
    assert not with_mean(ours)
    assert norm_kernels(ours)
    assert ours.launches <= stock.launches
    assert ours.extern_calls == stock.extern_calls


@needs_triton
def test_triton_of_gpt2_has_one_reduction_a_norm_and_less_machine_code() -> None:
    config = transformers.GPT2Config(n_embd=768, n_layer=1, n_head=12, n_positions=64, **TEXT)
    model = randomise(transformers.GPT2Model(config).eval()).to(torch.bfloat16)
    inputs = {"input_ids": tokens(4, 32), "use_cache": False}
    stock = triton_for_sm90(model, **inputs)
    ours = triton_for_sm90(model, backend="lnfold", **inputs)
    assert [(kernel.reductions, kernel.welford) for kernel in norm_kernels(ours)] == [(1, False)] * 3
    assert [kernel.reductions for kernel in norm_kernels(stock)] == [2] * 3
    assert not with_mean(ours)
    assert ours.launches == stock.launches
    assert ours.extern_calls == stock.extern_calls
    for left, right in zip(norm_kernels(ours), norm_kernels(stock), strict=True):
        rms, layer = compile_kernel(left)[0], compile_kernel(right)[0]
        assert rms.instructions < layer.instructions
        assert rms.shuffles < layer.shuffles
        assert rms.loads <= layer.loads
        assert rms.spills == 0


@needs_triton
def test_a_site_that_does_not_fold_keeps_its_kernel() -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == "bert")
    model, inputs = architecture.model(torch.bfloat16), architecture.inputs(torch.bfloat16)
    stock = triton_for_sm90(model, **inputs)
    ours = triton_for_sm90(model, backend="lnfold", **inputs)
    launches = [sum(kernel.launches for kernel in with_mean(code)) for code in (stock, ours)]
    assert launches == [6, 5]


class Stream(nn.Module):
    """Positions, a residual add and two norms: no matrix product, so that the interpreter can run all of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(19, width), nn.Parameter(torch.zeros(3, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        stream = self.table(ids) + self.positions
        normed = self.norm_1(stream)
        return normed, self.norm_2(stream * 0.5 - self.bias)


@needs_triton
@pytest.mark.parametrize("width", [768, 4096])
def test_generated_triton_of_a_folded_model_interpreted_against_float64(width: int) -> None:
    model = randomise(Stream(width))
    ids = torch.randint(19, (2, 3))
    expected = model.double()(ids)
    model.float()
    code = triton_for_sm90(model, ids, backend="lnfold")
    assert not with_mean(code)
    assert sum(kernel.reductions for kernel in code.kernels) == 2
    assert lncompile.explain(model, ids).folded == 2
    (outputs,) = run_in_interpreter([(code.source[0], code.inputs[0])])
    for actual, reference in zip(outputs, expected, strict=True):
        assert actual is not None
        torch.testing.assert_close(actual.double(), reference, rtol=1e-4, atol=1e-4)
