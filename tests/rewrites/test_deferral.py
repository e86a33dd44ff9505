"""The scale of a norm behind the products that read it: where it wins, exactly, and never at a kernel more."""

from __future__ import annotations

from collections.abc import Iterator

import numerics
import pytest
import torch
from architectures import ARCHITECTURES, Architecture, randomise
from branch_blocks import Branch, BranchBlock, branch_block
from graphs import capture
from torch import Tensor, nn
from torch.nn import functional
from torch_versions import IS_OLD, unless_old

import lncompile
from lncompile.lowering import torch_private_inductor
from lncompile.lowering.inspect.generated_code import GeneratedCode
from lncompile.lowering.inspect.triton_without_gpu import H200, retargeted_to_gpu, triton_for_sm90
from lncompile.lowering.target import compiled_for
from lncompile.options import OptionError, Options, parse_options
from lncompile.passes.placement.costs import NOTHING, Balance, Bytes, Device
from lncompile.passes.rewrites import deferral
from lncompile.transform import transform
from lncompile.verification import floating_outputs, relative_error

D, OUT, TOKENS = 8, 12, 6
ON, OFF = {"lnfold.defer": "on"}, {"lnfold.defer": "off"}
IDS = torch.arange(2 * TOKENS).reshape(2, TOKENS) % 11


# A body, and how many kernels more its deferral would launch by the cost model: then it is left.
DEFERRED: dict[str, tuple[Branch, int]] = {
    "linear and gelu": (lambda m, x: functional.gelu(m.up(m.norm(x))), 0),
    "no affine": (lambda m, x: torch.relu(m.up(m.simple(x))), 0),
    "addmm of flattened rows": (
        lambda m, x: torch.tanh(torch.addmm(m.bias, m.norm(x).view(-1, D), m.weight).view(2, TOKENS, OUT)), 0),
    "matmul and a bias by hand": (lambda m, x: functional.silu(m.norm(x) @ m.weight + m.bias), 0),
    "gated": (lambda m, x: (lambda y: functional.silu(m.gate(y)) * m.up(y))(m.norm(x)), 0),
    "one weight read twice": (lambda m, x: (lambda y: torch.relu(m.up(y)) * m.up(y))(m.norm(x)), 0),
    "a product behind it": (lambda m, x: m.up(m.norm(x)), 1),
    "a product and a sum behind it": (lambda m, x: m.up(m.norm(x)) + 1, 1),
    "one with a product, one with gelu behind it": (
        lambda m, x: (lambda y: functional.gelu(m.gate(y)) + torch.softmax(m.up(y), 1))(m.norm(x)), 1),
    "two norms": (lambda m, x: torch.relu(m.up(m.norm(x))) + torch.tanh(m.gate(m.plain(x))), 0),
}  # fmt: skip


def written_to(m: BranchBlock, x: Tensor) -> Tensor:
    """What the norm read is no more when its output is multiplied."""
    stream = x * 2
    normed = m.norm(stream)
    stream += x
    return torch.relu(m.up(normed)) + m.gate(m.plain(stream))


def written_under_a_name(m: BranchBlock, x: Tensor) -> Tensor:
    stream = x * 2
    name = functional.dropout(stream, 0.5, training=False).view(-1, D)
    normed = m.norm(stream)
    name += x.view(-1, D)
    return torch.relu(m.up(normed)) + m.gate(m.plain(name)).view(2, TOKENS, OUT)


LEFT: dict[str, tuple[Branch, str]] = {
    "an activation reads it": (lambda m, x: m.up(torch.relu(m.norm(x))), "relu"),
    "tokens chosen": (lambda m, x: torch.relu(m.up(m.norm(x)[:, -1:])), "rows are moved"),
    "tokens swapped": (lambda m, x: torch.relu(m.up(m.norm(x).transpose(0, 1))).transpose(0, 1), "rows are moved"),
    "other rows": (
        lambda m, x: torch.relu(m.up(m.norm(x).view(3, 4, D))).view(2, TOKENS, OUT), "rows are moved"),
    "a convolution": (lambda m, x: torch.relu(m.point(m.norm(x).transpose(1, 2))).transpose(1, 2), "conv1d"),
    "another dtype": (
        lambda m, x: torch.relu(functional.linear(m.norm(x).float(), m.up.weight.float())).double(), "rows are moved"),
    "the stream is written to": (written_to, "written to behind the norm"),
    "a name of the stream is written to": (written_under_a_name, "written to behind the norm"),
    "float16": (
        lambda m, x: torch.relu(functional.linear(m.norm(x).half(), m.up.weight.half())).double(), "half"),
}  # fmt: skip


def block(branch: Branch) -> BranchBlock:
    return branch_block(branch, D, OUT)


def lowerings(compiled: object) -> list[str]:
    (report,) = lncompile.reports(compiled)  # type: ignore[arg-type]
    return [site.lowering for site in report.sites]


@pytest.mark.parametrize("name", DEFERRED)
def test_what_is_deferred(name: str, without_inductor: None) -> None:
    body, kernels = DEFERRED[name]
    model = block(body)
    compiled = torch.compile(model, backend="lnfold", options=ON)
    assert relative_error(compiled(IDS), model(IDS)) <= 1e-12
    (report,) = lncompile.reports(compiled)
    *deferred, final = report.sites
    assert {site.lowering for site in deferred} == {"rms_norm" if kernels else "rms_norm_deferred"}
    assert final.lowering == "rms_norm"
    more = f"launches {kernels} kernel more" if kernels else ""
    assert all(more in site.deferral and ("launches" in site.deferral) == bool(kernels) for site in deferred)
    assert ("rms_norm_deferred" in str(report)) == (not kernels)
    for norm in (model.norm, model.plain):
        norm.weight.mul_(1.5)
        norm.bias.add_(1)
    assert relative_error(compiled(IDS), model(IDS)) <= 1e-12, "γ and β that change are noticed"


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not(name: str, without_inductor: None) -> None:
    body, words = LEFT[name]
    model = block(body)
    compiled = torch.compile(model, backend="lnfold", options=ON)
    # Two of the bodies compute in single and in half precision.
    assert relative_error(compiled(IDS), model(IDS)) <= {"float16": 1e-3, "another dtype": 1e-6}.get(name, 1e-12)
    (report,) = lncompile.reports(compiled)
    assert report.sites[0].lowering == "rms_norm"
    assert words in report.sites[0].deferral


def test_the_normalised_tensor_is_gone() -> None:
    captured = capture(block(DEFERRED["linear and gelu"][0]), IDS)
    options = Options(defer="on")
    analysis = captured.analyse(options)
    graph = transform(analysis, options).graph_module.graph
    assert "norm" not in {str(node.target) for node in graph.nodes}
    stream = next(node for node in graph.nodes if getattr(node.target, "__name__", "") == "embedding")
    product = next(node for node in graph.nodes if getattr(node.target, "__name__", "") == "linear")
    assert product.args[0].args == (stream,), "the product reads the stream itself"
    assert product.args[0].target == "contiguous"


def test_a_lost_scale_is_noticed(monkeypatch: pytest.MonkeyPatch, without_inductor: None) -> None:
    """The control: these tests notice a scale that is missing, and one without ε."""
    model = block(DEFERRED["linear and gelu"][0])
    model.table.weight.mul_(1e-3)
    expected = model(IDS)
    right = deferral.row_scale
    wrongs = [lambda x, eps, *rest: torch.ones_like(right(x, eps, *rest)), lambda x, eps, *rest: right(x, 0.0, *rest)]
    for wrong in wrongs:
        torch._dynamo.reset()
        with monkeypatch.context() as patched:
            patched.setattr(deferral, "row_scale", wrong)
            actual = torch.compile(model, backend="lnfold", options=ON)(IDS)
        assert relative_error(actual, expected) > 1e-3


def test_dynamic_rows(without_inductor: None) -> None:
    for name in ("linear and gelu", "matmul and a bias by hand"):
        torch._dynamo.reset()
        model = block(DEFERRED[name][0])
        compiled = torch.compile(model, backend="lnfold", options=ON, dynamic=True)
        for rows in (3, 5, 4):
            ids = torch.arange(2 * rows).reshape(2, rows) % 11
            assert relative_error(compiled(ids), model(ids)) <= 1e-12
        assert lowerings(compiled) == ["rms_norm_deferred", "rms_norm"]


def test_the_options() -> None:
    captured = capture(block(DEFERRED["linear and gelu"][0]), IDS)
    assert not captured.analyse(Options(defer="off")).deferrals
    assert len(captured.analyse(Options(defer="on")).deferrals) == 1
    without_affine = captured.analyse(Options(defer="on", absorb_affine="off"))
    assert not without_affine.deferrals
    assert "lnfold.absorb_affine is 'off'" in without_affine.verdicts[0].deferral
    captured = capture(block(DEFERRED["no affine"][0]), IDS)
    assert len(captured.analyse(Options(defer="on", absorb_affine="off")).deferrals) == 1
    with torch.enable_grad():
        captured = capture(block(DEFERRED["linear and gelu"][0]), IDS)
        analysis = captured.analyse(Options(defer="on", training="on"))
    assert not analysis.deferrals
    assert "trained" in analysis.verdicts[0].deferral
    with pytest.raises(OptionError, match=r"lnfold.defer' takes 'auto' or 'on' or 'off'"):
        parse_options(None, {"lnfold.defer": True})


# --- the cost model ---


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    """What it does by itself where it gains."""
    with compiled_for(torch.device("cuda")):
        yield


def test_by_itself_on_a_cpu_in_bfloat16_alone() -> None:
    """That is where it was measured to gain."""
    assert deferral.gains_on(torch.device("cuda"), torch.float32)
    ids = torch.arange(40).reshape(1, 40) % 11
    for dtype, expected in ((torch.bfloat16, 1), (torch.float32, 0)):
        analysis = capture(block(DEFERRED["linear and gelu"][0]).to(dtype), ids).analyse(Options())
        assert len(analysis.deferrals) == expected
        assert bool(analysis.verdicts[0].deferral) == bool(expected)


def test_by_itself_only_where_weights_are_copied(as_on_a_gpu: None) -> None:
    ids = torch.arange(40).reshape(1, 40) % 11
    captured = capture(block(DEFERRED["linear and gelu"][0]), ids)
    assert len(captured.analyse(Options()).deferrals) == 1
    assert not captured.analyse(Options(memory_budget=1.0)).deferrals
    assert len(captured.analyse(Options(memory_budget=1.0, defer="on")).deferrals) == 1


def test_by_itself_it_defers_where_one_call_saves_more_than_is_kept(as_on_a_gpu: None) -> None:
    model = block(DEFERRED["linear and gelu"][0])
    kept = 8 * (D * OUT + OUT)
    for rows, expected in ((4, False), (40, True)):
        ids = torch.arange(rows).reshape(1, rows) % 11
        analysis = capture(model, ids).analyse(Options(defer="auto"))
        # The normalised tensor is not written, nor are γ and β read; the rows' scales are written and read.
        saved = 8 * (rows * D - 2 * rows + 2 * D)
        assert (saved > kept) is expected
        assert len(analysis.deferrals) == expected
        words = analysis.verdicts[0].deferral
        assert f"moves {saved} bytes less a call, keeps {kept} bytes of weights more" in words
        assert words.startswith("scaled behind the products" if expected else "scaled in place")


def test_by_itself_it_never_adds_a_kernel(as_on_a_gpu: None) -> None:
    ids = torch.arange(4096).reshape(64, 64) % 11
    for name, (body, kernels) in DEFERRED.items():
        if "flattened" not in name and "two norms" not in name:
            analysis = capture(block(body), ids).analyse(Options(defer="auto"))
            assert len(analysis.deferrals) == (not kernels), name


def test_a_stream_that_nobody_else_reads_is_not_written_for_it(as_on_a_gpu: None) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.up = nn.Embedding(11, D), nn.LayerNorm(D), nn.Linear(D, OUT)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.relu(self.up(self.norm(self.table(ids) * 2)))

    ids = torch.arange(4096).reshape(64, 64) % 11
    analysis = capture(randomise(Chain()).eval(), ids).analyse(Options(defer="auto"))
    assert not analysis.deferrals
    assert "bytes more a call" in analysis.verdicts[0].deferral


def test_without_an_affine_nothing_is_kept(as_on_a_gpu: None) -> None:
    analysis = capture(block(DEFERRED["no affine"][0]), IDS).analyse(Options(defer="auto"))
    (balance,) = [deferral.balance for deferral in analysis.deferrals]
    assert balance == Balance(Bytes(8 * (12 * D - 24), 8 * (12 * D - 24)))


def test_prices() -> None:
    balance = Balance(Bytes(100, 100), Bytes(60, 60)) + Balance(Bytes(-10, -10), NOTHING, 1)
    assert balance == Balance(Bytes(90, 90), Bytes(60, 60), 1)
    assert balance.wins
    assert not (balance + Balance(launches=-2)).wins, "never at a kernel more"
    assert not Balance(Bytes(60, 60), Bytes(60, 60)).wins, "what breaks even is left alone"
    assert not Balance(launches=1).wins
    assert Balance(Bytes(-8, -8), NOTHING, -2).in_words() == (
        "moves 8 bytes more a call, keeps 0 bytes of weights more, launches 2 kernels more"
    )


def test_devices() -> None:
    class Properties:
        name, memory_clock_rate, memory_bus_width = "Some GPU", 1_000_000, 1024

    device = Device.from_properties(Properties())
    assert device.bandwidth == 256e9
    words = Balance(Bytes(512, 512_000)).in_words(device)
    assert "moves 512 bytes less a call (2.00 µs of Some GPU's bandwidth)" in words
    assert Device.from_properties(H200).bandwidth is None, "a driver that does not say"
    assert Device.of(torch.device("cpu")) is None


# --- models ---

MODELS = {"gpt2": 2, "opt": 2, "vit": 2, "falcon_rw": 2, "falcon_7b": 0}
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, without_inductor: None) -> None:
    model, inputs = BY_NAME[name].model(), BY_NAME[name].inputs(torch.float64)
    expected = floating_outputs(model(**inputs))
    compiled = torch.compile(model, backend="lnfold", options=ON)
    actual = floating_outputs(compiled(**inputs))
    assert lowerings(compiled).count("rms_norm_deferred") == MODELS[name]
    assert all(relative_error(actual[key], value) <= 1e-10 for key, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_errors(dtype: torch.dtype, without_inductor: None) -> None:
    found = numerics.measure(BY_NAME["gpt2"], dtype, eager=True, options=ON)
    assert all(error.passed for errors in found.values() for error in errors), f"\n{numerics.table(found)}"


def enlarged(architecture: Architecture) -> dict[str, Tensor]:
    """Inputs with so many rows that deferring pays."""
    inputs = dict(architecture.inputs(torch.bfloat16))
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            inputs[name] = value.repeat(16, *(1 if value.dim() > 2 else 4 for _ in value.shape[1:]))
    return inputs


def counts(code: GeneratedCode) -> tuple[int, int]:
    return code.launches, code.extern_calls


def explained(name: str, **options: str) -> list[str]:
    compiled = torch.compile(BY_NAME[name].model(torch.bfloat16), backend="lnfold", options=options)
    return [site.lowering for site in lncompile.explain(compiled, **enlarged(BY_NAME[name])).sites]


# How many norms are deferred: those in front of an MLP. Attention, and parallel blocks, would take a kernel more.
AUTO = {"lnfold.defer": "auto"}
BY_ITSELF = {"gpt2": 2, "vit": 2, "opt": 2, "falcon_rw": 2, "falcon_7b": 0, "bert": 0}


@pytest.mark.parametrize("name", BY_ITSELF)
def test_what_it_defers_by_itself(name: str, as_on_a_gpu: None) -> None:
    assert explained(name, **AUTO).count("rms_norm_deferred") == BY_ITSELF[name]


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_generated_code_has_no_kernel_more(name: str, as_on_a_gpu: None) -> None:
    pytest.importorskip("triton", reason="needs Triton to generate CUDA kernels: pip install triton")
    model, inputs = BY_NAME[name].model(torch.bfloat16), enlarged(BY_NAME[name])
    in_place = triton_for_sm90(model, backend="lnfold", options=OFF, **inputs)
    ours = triton_for_sm90(model, backend="lnfold", options=AUTO, **inputs)
    assert counts(ours) == counts(in_place)
    assert sum(k.reductions for k in ours.kernels) == sum(k.reductions for k in in_place.kernels)
    loads = [sum(kernel.loads * kernel.launches for kernel in code.kernels) for code in (ours, in_place)]
    assert loads[0] < loads[1], "γ and β are not read any more"


def test_through_inductor() -> None:
    model = block(DEFERRED["addmm of flattened rows"][0])
    compiled = torch.compile(model, backend="lnfold", options=ON)
    assert relative_error(compiled(IDS), model(IDS)) <= 1e-12
    assert lowerings(compiled) == ["rms_norm_deferred", "rms_norm"]


# --- where Inductor generates the products ---

# Triton's templates alone to choose from, and the first of them taken: there is nothing to time here.
TEMPLATES = {"max_autotune": True, "max_autotune_gemm_backends": "TRITON", "deterministic": True}


def test_what_is_generated() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    cpp = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "cpp"}
    assert torch_private_inductor.generates_products(TEMPLATES, gpu) == (not IS_OLD)
    assert torch_private_inductor.generates_products(cpp, cpu) == (not IS_OLD)
    others = ({"max_autotune": False}, {"max_autotune_gemm_backends": "ATEN,TRITON"}, {"epilogue_fusion": False})
    assert not any(torch_private_inductor.generates_products({**TEMPLATES, **other}, gpu) for other in others)
    assert not torch_private_inductor.generates_products(TEMPLATES, cpu)
    assert not torch_private_inductor.generates_products({"max_autotune": True}, gpu), "a measurement decides"


@unless_old("no scale is deferred into a product (torch_private_inductor.generates_products)")
@pytest.mark.parametrize(("name", "deferred"), [("gpt2", 2), ("vit", 4), ("falcon_7b", 2)])
def test_generated_products_carry_the_scale(name: str, deferred: int) -> None:
    """In front of attention too, unless a joint projection is cut, in no kernel more: it scales what it stores."""
    pytest.importorskip("triton", reason="needs Triton to generate CUDA kernels: pip install triton")
    model, inputs = BY_NAME[name].model(torch.bfloat16), enlarged(BY_NAME[name])
    in_place = triton_for_sm90(model, backend="lnfold", options={**TEMPLATES, **OFF}, **inputs)
    with retargeted_to_gpu() as recorder:
        compiled = torch.compile(model, backend="lnfold", options={**TEMPLATES, **ON}, fullgraph=True, dynamic=False)
        compiled(**inputs)
        assert lowerings(compiled).count("rms_norm_deferred") == deferred
    ours = recorder.code
    # Fewer for the parallel block on torch 2.15.
    assert ours.launches <= in_place.launches
    assert ours.extern_calls == in_place.extern_calls
    reductions = [sum(k.reductions * k.launches for k in code.kernels) for code in (ours, in_place)]
    assert reductions[0] == reductions[1]
    scaled = [kernel for kernel in ours.kernels if "tl.dot" in kernel.source and "rsqrt" in kernel.source]
    assert sum(kernel.launches for kernel in scaled) >= deferred
