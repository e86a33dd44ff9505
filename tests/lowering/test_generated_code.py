"""What Inductor generates for a folded norm: one kernel, one reduction, no mean. LayerNorm is the control."""

import functools
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional

from lncompile.lowering import rms_norm, torch_private_inductor
from lncompile.lowering.inspect.generated_code import GeneratedCode, Kernel, generated_code, inspect_kernel
from lncompile.lowering.inspect.machine_code import MachineCode, compile_kernel
from lncompile.lowering.inspect.triton_without_gpu import (
    RetargetedCode,
    require_triton,
    retargeted_to_gpu,
    triton_for_sm90,
)


def add_rms_norm(x, residual, weight, bias):
    total = x + residual
    return rms_norm(total, (total.shape[-1],), weight, bias), total


def add_layer_norm(x, residual, weight, bias):
    total = x + residual
    return functional.layer_norm(total, (total.shape[-1],), weight, bias), total


def norm_arguments(rows, width, dtype):
    return [torch.randn(rows, width, dtype=dtype) for _ in range(2)] + [torch.randn(width, dtype=dtype) for _ in "wb"]


def assert_is_one_rms_norm_kernel(code):
    """The specification of the lowering. Each test that uses it also shows that a LayerNorm fails it."""
    assert code.launches == len(code.kernels) == 1
    assert code.extern_calls == 0
    (kernel,) = code.kernels
    assert kernel.reductions == 1
    assert not kernel.welford
    assert kernel.mean_subtractions == 0


# --- Counting in a kernel's text -------------------------------------------------------------------------------------

TRITON_KERNEL = """
    @triton_heuristics.persistent_reduction(inductor_meta={{'num_reduction': 4, 'note': 'tl.sum( in metadata'}})
    @triton.jit
    def triton_per_fused_0(in_ptr0, in_ptr1, out_ptr0, XBLOCK : tl.constexpr):
        tmp0 = tl.load(in_ptr0 + (r0_1 + 1024*x0), None).to(tl.float32)
        tmp9 = tl.load(in_ptr1 + (r0_1), None)
        tmp1 = tl.broadcast_to(tmp0, [XBLOCK, R0_BLOCK])
        tmp3 = {reduction}
        tmp4 = tl.full([1, 1], 1024.0, tl.float32)
        tmp5 = (tmp3 / tmp4)
        tmp6 = tmp0 - {subtracted}
        tmp7 = tmp6 * tmp9
        tl.store(out_ptr0 + (r0_1 + 1024*x0), tmp7, None)
"""


def triton_kernel(reduction, subtracted):
    return textwrap.dedent(TRITON_KERNEL.format(reduction=reduction, subtracted=subtracted))


@pytest.mark.parametrize(
    ("reduction", "subtracted", "reductions", "mean_subtractions"),
    [
        pytest.param("tl.sum(tmp1, 1)[:, None].to(tl.float32)", "tmp5", 1, 1, id="mean"),
        pytest.param("tl.sum(tmp1, 1)[:, None].to(tl.float32)", "tmp3", 1, 1, id="sum"),
        pytest.param("tl.sum(tmp1, 1)[:, None].to(tl.float32)", "tmp9", 1, 0, id="another-tensor"),
        pytest.param("tl.sum(tmp1, 1)[:, None].to(tl.float32)", "tmp4", 1, 0, id="constant"),
        pytest.param("triton_helpers.max2(tmp1, 1)[:, None]", "tmp3", 1, 0, id="maximum-as-in-softmax"),
        pytest.param("tmp1", "tmp3", 0, 0, id="pointwise"),
    ],
)
def test_triton_facts(reduction, subtracted, reductions, mean_subtractions):
    kernel = inspect_kernel("k", "triton", triton_kernel(reduction, subtracted))
    assert (kernel.reductions, kernel.mean_subtractions) == (reductions, mean_subtractions)
    assert (kernel.loads, kernel.stores, kernel.welford) == (2, 1, False)


def test_triton_welford_is_one_reduction_with_a_mean():
    source = """
        tmp4_mean_next, tmp4_m2_next, tmp4_weight_next = triton_helpers.welford_reduce(
            tmp3, tmp4_mean, tmp4_m2, tmp4_weight, roffset == 0
        )
        tmp5, tmp6, tmp7 = triton_helpers.welford(tmp4_mean, tmp4_m2, tmp4_weight, 1)
        tmp4 = tmp5[:, None]
        tmp10 = tl.load(out_ptr0 + (r0_1 + 4096*x0), r0_mask, other=0.0).to(tl.float32)
        tmp12 = tmp10 - tmp4
    """
    kernel = inspect_kernel("k", "triton", source)
    assert (kernel.reductions, kernel.welford, kernel.mean_subtractions) == (1, True, 1)


def test_cpp_mean_is_followed_through_memory_and_aliases():
    source = """
        auto out_ptr1 = in_out_ptr0;
        float tmp_acc0 = 0;
        auto tmp0 = at::vec::Vectorized<float>::loadu(in_ptr0 + static_cast<int64_t>(x1), static_cast<int64_t>(16));
        tmp_acc0_vec = tmp_acc0_vec + tmp0;
        tmp_acc0 = tmp_acc0 + at::vec::vec_reduce_all<float, 1>(add, tmp_acc0_vec);
        in_out_ptr0[static_cast<int64_t>(x0)] = static_cast<float>(tmp_acc0);
        auto tmp1 = out_ptr1[static_cast<int64_t>(x0)];
        auto tmp2 = static_cast<float>(1024.0);
        auto tmp3 = tmp1 / tmp2;
        tmp3.store(in_out_ptr0 + static_cast<int64_t>(x0));
        auto tmp4 = in_out_ptr0[static_cast<int64_t>(x0)];
        auto tmp5 = at::vec::Vectorized<float>(tmp4);
        auto tmp6 = tmp0 - tmp5;
    """
    kernel = inspect_kernel("k", "cpp", source)
    assert (kernel.reductions, kernel.mean_subtractions, kernel.loads, kernel.stores) == (1, 1, 3, 2)
    maximum = source.replace("tmp_acc0 = 0", "tmp_acc0 = -std::numeric_limits<float>::infinity()")
    assert inspect_kernel("k", "cpp", maximum).mean_subtractions == 0


def test_unknown_language_is_refused():
    with pytest.raises(ValueError, match="'k'"):
        inspect_kernel("k", "metal", "")  # type: ignore[arg-type]


def test_wrapper_is_read_for_kernels_launches_and_extern_calls():
    wrapper = textwrap.dedent("""
        aten = torch.ops.aten
        norm_0 = async_compile.triton('norm_0', '''
        tmp1 = tl.sum(tmp0, 1)
        ''', device_str='cuda')
        async_compile.wait(globals())
        def call(args):
            norm_0.run(arg0_1, buf0, stream=raw_stream0)
            extern_kernels.mm(buf0, arg1_1, out=buf1)
            norm_0.run(buf1, buf2, stream=raw_stream0)
            buf3 = torch.ops.aten._scaled_dot_product_flash_attention.default(buf2, buf2, buf2)
    """)
    code = GeneratedCode.from_wrappers([wrapper, wrapper])
    assert [(kernel.name, kernel.launches, kernel.reductions) for kernel in code.kernels] == [("norm_0", 2, 1)] * 2
    assert (code.launches, code.extern_calls) == (4, 4)
    with pytest.raises(ValueError, match="cpp_wrapper"):
        GeneratedCode.from_wrappers(["int main() {}"])


# --- C++ kernels -----------------------------------------------------------------------------------------------------


# LayerNorm takes two passes at 1024, Welford's one at 4096; 1000 is no multiple of a vector, so its loops have tails.
@pytest.mark.parametrize(
    ("width", "dtype"), [(1024, torch.float32), (1024, torch.bfloat16), (4096, torch.float32), (1000, torch.float32)]
)
def test_cpp_residual_add_and_rms_norm_is_one_kernel_with_one_reduction(width, dtype):
    torch.manual_seed(width)
    arguments = norm_arguments(8, width, dtype)
    code = generated_code(torch.compile(add_rms_norm), *arguments)
    assert_is_one_rms_norm_kernel(code)
    assert code.kernels[0].language == "cpp"

    control = generated_code(torch.compile(add_layer_norm), *arguments)
    assert len(control.kernels) == 1
    assert control.kernels[0].welford or control.kernels[0].reductions == 2
    assert control.kernels[0].mean_subtractions > 0
    with pytest.raises(AssertionError):
        assert_is_one_rms_norm_kernel(control)


def test_generated_code_of_something_compiled_before():
    compiled = torch.compile(add_rms_norm)
    arguments = norm_arguments(8, 1024, torch.float32)
    compiled(*arguments)
    first, second = generated_code(compiled, *arguments), generated_code(compiled, *arguments)
    assert_is_one_rms_norm_kernel(first)
    assert first.kernels == second.kernels


def test_generated_code_of_a_module_with_matrix_products():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    with torch.no_grad():
        code = generated_code(torch.compile(model), torch.randn(8, 64))
    assert code.extern_calls == 2
    assert sum(kernel.mean_subtractions for kernel in code.kernels) > 0


def test_generated_code_of_what_is_not_compiled():
    with pytest.raises(RuntimeError, match=r"torch\.compile"):
        generated_code(add_rms_norm, *norm_arguments(2, 64, torch.float32))


# --- Triton kernels for sm_90, without a GPU -------------------------------------------------------------------------

# One process compiles the kernels of a width once for both tests of it.
WIDTHS = [pytest.param(width, marks=pytest.mark.xdist_group(f"sm90 {width}")) for width in (768, 1024, 4096)]
ROWS = 8192


def need_triton():
    return pytest.importorskip("triton", reason="needs Triton to compile CUDA kernels: pip install triton")


@functools.cache
def sm90(norm, width) -> tuple[RetargetedCode, MachineCode]:
    """Code of a norm in bfloat16, and its kernel compiled for the first launch configuration."""
    arguments = [torch.empty(ROWS, width), torch.empty(ROWS, width), torch.empty(width), torch.empty(width)]
    code = triton_for_sm90(norm, *(argument.to(torch.bfloat16) for argument in arguments))
    return code, compile_kernel(code.kernels[0])[0]


@pytest.mark.parametrize("width", WIDTHS)
def test_sm90_residual_add_and_rms_norm_is_one_kernel_with_one_sum(width):
    need_triton()
    code, _ = sm90(add_rms_norm, width)
    assert_is_one_rms_norm_kernel(code)
    assert code.kernels[0].language == "triton"
    assert code.kernels[0].source.count("tl.sum(") == 1
    with pytest.raises(AssertionError):
        assert_is_one_rms_norm_kernel(sm90(add_layer_norm, width)[0])


@pytest.mark.parametrize("width", WIDTHS)
def test_sm90_rms_norm_is_less_machine_code_than_layer_norm(width):
    need_triton()
    _, rms = sm90(add_rms_norm, width)
    _, layer = sm90(add_layer_norm, width)
    # The same launch, or the counts would not compare.
    assert (rms.warps, rms.blocks) == (layer.warps, layer.blocks)
    assert rms.instructions < layer.instructions
    assert rms.shuffles < layer.shuffles
    assert rms.barriers <= layer.barriers
    assert rms.loads <= layer.loads
    assert rms.stores == layer.stores
    assert rms.registers <= layer.registers
    assert rms.spills == layer.spills == rms.calls == 0
    if width <= 1024:
        # A warp holds the row: five shuffles add up 32 lanes, and LayerNorm does it twice.
        assert (rms.shuffles, layer.shuffles) == (5, 10)


@pytest.mark.xdist_group("sm90 1024")
def test_sm90_launch_configuration_is_the_device_s_own():
    # Canary: where Inductor does not believe in the GPU it generates the same source but launches 8 warps, silently.
    need_triton()
    assert sm90(add_layer_norm, 1024)[1].warps == 1


def test_machine_code_is_counted_in_its_listing():
    listing = textwrap.dedent("""
            /*0000*/                   LDC R1, c[0x0][0x28] ;
            /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
            /*0020*/              @!P0 BRA 0x50 ;
            /*0030*/                   SHFL.BFLY PT, R5, R4, 0x10, 0x1f ;
            /*0040*/               @P1 BRA 0x10 ;
            /*0050*/                   STL [R1], R4 ;
            /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
            /*0070*/                   EXIT ;
            /*0080*/                   BRA 0x80 ;
            /*0090*/                   NOP ;
    """)
    listing = textwrap.indent(listing, "        ")
    code = MachineCode.from_listing(listing, "REG:32 STACK:8", shared_memory=0, warps=4, blocks={"XBLOCK": 2})
    assert (code.instructions, code.loads, code.stores, code.shuffles, code.spills) == (8, 1, 1, 1, 1)
    assert code.loops == 1  # forward, backward, and the one behind EXIT to itself
    assert code.per_row(code.instructions) == 16


def block(width=64):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def inductor_as_a_backend_of_ours(graph_module, inputs):
    return torch_private_inductor.inductor_compile(graph_module, inputs, {"epilogue_fusion": True})


@pytest.mark.parametrize("backend", ["inductor", inductor_as_a_backend_of_ours])
def test_sm90_module_for_inference(backend):
    need_triton()
    model = block()
    with torch.no_grad():
        code = triton_for_sm90(model, torch.randn(32, 64), backend=backend)
    norm, gelu = code.kernels
    assert norm.mean_subtractions > 0
    assert (gelu.reductions, code.launches, code.extern_calls) == (0, 2, 2)
    # The wrapper's arguments are the parameters themselves, and the input.
    assert {value.data_ptr() for value in code.inputs[0]} >= {p.data_ptr() for p in model.parameters()}


def test_sm90_module_for_training_gives_forward_and_backward():
    need_triton()
    with torch.enable_grad():
        code = triton_for_sm90(block(), torch.randn(32, 64))
    forward, backward = code.source
    assert "backward" not in forward
    assert "native_layer_norm_backward" in backward
    assert code.inputs[0]
    assert not code.inputs[1]  # generated, never called


def test_retargeting_several_graphs_and_leaving_it():
    need_triton()
    model = block().eval()
    x = torch.randn(32, 64)
    had_cuda = torch.cuda.is_available()
    compiled = torch.compile(model)
    with torch.no_grad():
        expected = compiled(x)
        with retargeted_to_gpu() as recorder:
            stand_in = compiled(x)
            # Dynamic shapes have no size to make zeros of: the graph is run instead.
            dynamic = torch.compile(model, dynamic=True, mode="reduce-overhead")(x[:7])
        assert torch.equal(stand_in, torch.zeros_like(expected))
        torch.testing.assert_close(dynamic, expected[:7])
        assert len(recorder.code.source) == 2
        assert {kernel.language for kernel in recorder.code.kernels} == {"triton"}
        assert torch.equal(compiled(x), expected)
    assert torch.cuda.is_available() is had_cuda


def test_sm90_graph_with_a_constant_tensor():
    need_triton()

    def scale(x):
        return x * torch.tensor([1.0, 2.0, 3.0])

    code = triton_for_sm90(scale, torch.randn(8, 3))
    assert code.launches == 1


def test_cpp_kernels_do_not_compile_to_machine_code():
    with pytest.raises(ValueError, match="cpp"):
        compile_kernel(Kernel("k", "cpp", "", 0, False, 0, 0, 0))


def test_missing_triton_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for use in (require_triton, lambda: triton_for_sm90(add_rms_norm, torch.randn(2, 8))):
        with pytest.raises(ImportError, match="pip install triton"):
            use()
