"""Products of one row as generated sums with the norm inside: where, exactly, and in fewer launches."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import randomise
from branch_blocks import Branch, BranchBlock, branch_block
from decoding_steps import CONFIGS, decoder
from graphs import capture
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.lowering import normed_matrix_vector, torch_private_inductor
from lncompile.lowering.inspect.triton_interpreter import run_in_interpreter
from lncompile.lowering.inspect.triton_without_gpu import retargeted_to_gpu, triton_for_sm90
from lncompile.lowering.target import compiled_for
from lncompile.options import Options, parse_options
from lncompile.passes.rewrites import matrix_vector as passes
from lncompile.verification import relative_error

D, OUT = 16, 24
ON = {"lnfold.matrix_vector": "on"}
ONE = torch.tensor([[3]])
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def written_under_a_name(m: BranchBlock, x: Tensor) -> Tensor:
    up = m.up(m.norm(x))
    up.view(-1)[:4] += 1
    return up


def the_norm_is_written_to(m: BranchBlock, x: Tensor) -> Tensor:
    normed = m.norm(x)
    normed.view(-1)[:4] += 1
    return m.up(normed)


# A body, how many of its products become sums (the block's last one does too), and how many of them hold the norm.
SUMS: dict[str, tuple[Branch, int, int]] = {
    "linear and gelu": (lambda m, x: functional.gelu(m.up(m.norm(x))), 1, 1),
    "no bias, no affine": (lambda m, x: torch.relu(m.gate(m.simple(x))), 1, 1),
    "two readers": (lambda m, x: (lambda y: functional.silu(m.gate(y)) * m.up(y))(m.norm(x)), 2, 2),
    "addmm of [in, out]": (lambda m, x: torch.addmm(m.bias, m.norm(x).view(1, D), m.weight).view(1, 1, OUT), 1, 1),
    "matmul of [in, out]": (lambda m, x: torch.tanh(m.norm(x) @ m.weight + m.bias), 1, 1),
    "matmul of a transposed": (lambda m, x: m.norm(x) @ m.gate.weight.T, 1, 1),
    "matmul of a transposed by name": (lambda m, x: m.norm(x) @ m.gate.weight.transpose(-1, 0), 1, 1),
    "the last row": (lambda m, x: m.up(m.norm(x)[:, -1:, :]), 1, 1),
    "an activation reads the norm as well": (lambda m, x: (lambda y: m.up(y) + torch.relu(y).sum())(m.norm(x)), 1, 0),
    "an activation in between": (lambda m, x: m.up(torch.relu(m.norm(x))), 1, 0),
    "the weight multiplies itself": (lambda m, x: m.up(m.norm(x)) + m.up.weight.sum(), 1, 1),
    "doubled in place": (lambda m, x: m.up(m.norm(x)).mul_(2), 1, 1),
    "written to under a name": (written_under_a_name, 0, 0),
    "the norm is written to": (the_norm_is_written_to, 1, 0),
    "a scaled addmm": (
        lambda m, x: torch.addmm(m.bias, m.norm(x).view(1, D), m.weight, alpha=2).view(1, 1, OUT), 0, 0),
    "a bias that is no row": (
        lambda m, x: torch.addmm(m.bias.view(1, OUT), m.norm(x).view(1, D), m.weight).view(1, 1, OUT), 0, 0),
    "the last row by a number": (lambda m, x: m.up(m.norm(x)[:, -1]).view(1, 1, OUT), 1, 1),
    "features turned round": (lambda m, x: m.up(m.norm(x)[..., torch.arange(D - 1, -1, -1)]), 1, 0),
    "features in another order": (lambda m, x: m.up(m.norm(x).view(4, 4).t().reshape(1, 1, D)), 1, 0),
    "bits read as another type": (
        lambda m, x: m.up(m.norm(x).view(torch.int64).view(torch.float64).view(1, 1, D)), 1, 0),
    "dropout in evaluation": (lambda m, x: m.up(functional.dropout(m.norm(x), 0.5, training=False)), 1, 1),
    "a convolution reads the norm as well": (
        lambda m, x: (lambda y: m.up(y) + m.point(y.transpose(1, 2)).transpose(1, 2))(m.norm(x)), 1, 0),
    "no matrix": (lambda m, x: m.norm(x) @ m.weight.expand(1, D, OUT), 0, 0),
}  # fmt: skip


def block(branch: Branch) -> BranchBlock:
    return branch_block(branch, D, OUT)


@pytest.mark.parametrize("name", SUMS)
def test_what_becomes_a_sum(name: str, without_inductor: None) -> None:
    body, sums, inside = SUMS[name]
    for device, expected in ((GPU, inside), (CPU, 0)):
        torch._dynamo.reset()
        model = block(body)
        with compiled_for(device):
            plan = capture(model, ONE).analyse(Options(matrix_vector="on")).matrix_vectors
            assert (len(plan.products), len(plan.inside)) == (sums + 1, expected)
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="lnfold", options=ON)
            assert relative_error(compiled(ONE), model(ONE)) <= 1e-12
            (report,) = lncompile.reports(compiled)
            lowered = ["rms_norm_deferred" if expected else "rms_norm", "rms_norm"]
            assert [site.lowering for site in report.sites] == lowered
            assert ("computed for one row in the kernels of" in report.sites[0].deferral) == bool(expected)
            for parameter in (model.norm.weight, model.norm.bias, model.weight, model.up.weight, model.down.weight):
                parameter.mul_(1.5)
            assert relative_error(compiled(ONE), model(ONE)) <= 1e-12, "weights that change are noticed"


def test_a_dropout_that_drops_stays(without_inductor: None) -> None:
    model = block(lambda m, x: m.up(functional.dropout(m.norm(x), 0.5, training=True)))
    compiled = torch.compile(model, backend="lnfold", options=ON)
    answers = []
    for run in (model, compiled):
        torch.manual_seed(1)
        answers.append(run(ONE))
    assert relative_error(answers[1], answers[0]) <= 1e-12


def test_products_that_absorb_are_left(without_inductor: None) -> None:
    """One of two readers is no product, so that the norm stays outside, and its γ and β may go into both."""
    body = SUMS["a convolution reads the norm as well"][0]
    for options, sums in (({"lnfold.absorb_affine": "off"}, 2), ({"lnfold.absorb_affine": "on"}, 1), ({}, 2)):
        torch._dynamo.reset()
        model = block(body)
        given = {**ON, "lnfold.defer": "off", **options}
        ours, _ = parse_options(None, given)
        assert len(capture(model, ONE).analyse(ours).matrix_vectors.products) == sums
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="lnfold", options=given)
        assert relative_error(compiled(ONE), model(ONE)) <= 1e-12


def test_only_one_row_and_only_if_asked(without_inductor: None) -> None:
    body = SUMS["linear and gelu"][0]
    tuned = {"coordinate_descent_tuning": True}  # which is something to go by on a GPU
    for ids, options in ((torch.tensor([[3, 4]]), ON), (torch.tensor([[3], [4]]), ON), (ONE, {}), (ONE, tuned)):
        torch._dynamo.reset()
        model = block(body)
        compiled = torch.compile(model, backend="lnfold", options=options)
        assert relative_error(compiled(ids), model(ids)) <= 1e-12
        assert {site.lowering for site in lncompile.reports(compiled)[0].sites} == {"rms_norm"}


def test_not_where_rows_are_dynamic_nor_in_training() -> None:
    body = SUMS["linear and gelu"][0]
    asked = Options(matrix_vector="on", training="on")
    assert not capture(block(body), torch.tensor([[3, 4]]), dynamic=True).analyse(asked).matrix_vectors.products
    with torch.enable_grad():
        assert not capture(block(body), ONE).analyse(asked).matrix_vectors.products
    with torch.autocast("cpu", torch.bfloat16):
        assert not capture(block(body).float(), ONE).analyse(asked).matrix_vectors.products


def test_copies_only_where_weights_are_copied() -> None:
    """A weight that is kept as ``[in, out]`` is left alone within a budget; others need no copy."""
    for name, expected in (("addmm of [in, out]", 1), ("linear and gelu", 2)):
        captured = capture(block(SUMS[name][0]), ONE)
        asked = Options(memory_budget=1.0, matrix_vector="on")
        assert len(captured.analyse(asked).matrix_vectors.products) == expected


def test_long_sums_for_few_outputs_are_left() -> None:
    class Narrow(nn.Module):
        def __init__(self, features: int, outputs: int) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(2, features), nn.LayerNorm(features)
            self.out = nn.Linear(features, outputs)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.norm(self.table(ids)))

    limit, enough = passes.LONGEST_UNCUT_SUM, passes.OUTPUTS_OF_AN_UNCUT_SUM
    for features, outputs, expected in ((limit, 4, 1), (limit + 1, 4, 0), (limit + 1, enough, 1)):
        analysis = capture(Narrow(features, outputs).eval(), torch.tensor([1])).analyse(Options(matrix_vector="on"))
        assert len(analysis.matrix_vectors.products) == expected


def test_wrong_sums_are_noticed(monkeypatch: pytest.MonkeyPatch, without_inductor: None) -> None:
    """The control: without the scale, without β, without γ, without the bias the answer is another."""
    model = block(SUMS["linear and gelu"][0])
    expected, right = model(ONE), normed_matrix_vector

    def without(name: str) -> Callable[..., Tensor]:
        def wrong(*arguments: Any) -> Tensor:
            given = inspect.signature(right).bind(*arguments).arguments
            return right(**{**given, name: 1e6 if name == "eps" else None})

        return wrong

    for name in ("eps", "beta", "gamma", "bias"):
        torch._dynamo.reset()
        with monkeypatch.context() as patched:
            patched.setattr(passes, "normed_matrix_vector", without(name))
            with compiled_for(GPU):
                actual = torch.compile(model, backend="lnfold", options=ON)(ONE)
        assert relative_error(actual, expected) > 1e-3, name


def test_by_itself_where_inductor_does_so_and_nothing_is_copied() -> None:
    tuned = {"coordinate_descent_tuning": True}
    assert torch_private_inductor.writes_products_as_sums(tuned, GPU)
    assert torch_private_inductor.writes_products_as_sums(parse_options("max-autotune", None)[1], GPU)
    assert not torch_private_inductor.writes_products_as_sums({"coordinate_descent_tuning": False}, GPU)
    assert not torch_private_inductor.writes_products_as_sums(tuned, CPU)
    # The last product's weight lies right; so does that of "linear and gelu", and nobody else copies m.weight.
    for name, options, expected in (
        ("linear and gelu", Options(), 2),
        ("linear and gelu", Options(matrix_vector="off"), 0),
        ("addmm of [in, out]", Options(), 1),
        ("addmm of [in, out]", Options(matrix_vector="on"), 2),
    ):
        captured = capture(block(SUMS[name][0]), ONE)
        assert not captured.analyse(options, tuned).matrix_vectors.products or options.matrix_vector == "on"
        with compiled_for(GPU):
            assert len(captured.analyse(options, tuned).matrix_vectors.products) == expected


def test_a_weight_that_is_copied_anyway_is_copied_the_other_way_round(without_inductor: None) -> None:
    """GPT-2 keeps ``[in, out]``: what writes into its stream is centered, what reads the norms is not."""
    model, arguments = decoder("gpt2", torch.float64)
    expected = model(**arguments()).logits
    tuned = {"coordinate_descent_tuning": True}
    with compiled_for(GPU):
        compiled = torch.compile(model, backend="lnfold", options=tuned)
        assert relative_error(compiled(**arguments()).logits, expected) <= 1e-12
    (report,) = [report for report in lncompile.reports(compiled) if report.total]
    without = torch.compile(model, backend="lnfold", options={**tuned, "lnfold.matrix_vector": "off"})
    assert report.extra_bytes == lncompile.explain(without, **arguments()).extra_bytes, "no copy beside centered ones"
    assert report.sites[-1].lowering == "rms_norm_deferred", "lm_head lies right"
    assert {site.lowering for site in report.sites[:-1]} == {"rms_norm"}


def test_inductor_is_asked_to_tune() -> None:
    assert parse_options(None, ON)[1]["coordinate_descent_tuning"] is True
    assert parse_options(None, {**ON, "coordinate_descent_tuning": False})[1]["coordinate_descent_tuning"] is False
    assert "coordinate_descent_tuning" not in parse_options(None, {})[1]


def test_through_inductor() -> None:
    model = block(SUMS["two readers"][0])
    compiled = torch.compile(model, backend="lnfold", options=ON)
    assert relative_error(compiled(ONE), model(ONE)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_errors(dtype: torch.dtype, without_inductor: None) -> None:
    """Nothing is rounded between a norm and its product."""
    model = block(SUMS["two readers"][0]).to(dtype)
    compiled = torch.compile(model, backend="lnfold", options=ON)
    found: list[tuple[float, float]] = []
    for seed in range(24):
        randomise(model, seed)
        expected = copy.deepcopy(model).double()(ONE)
        found.append((relative_error(model(ONE), expected), relative_error(compiled(ONE), expected)))
    theirs, ours = (sum(errors) for errors in zip(*found, strict=True))
    assert ours <= 1.25 * theirs


# --- decoding ---


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_decoding(name: str, without_inductor: None) -> None:
    model, arguments = decoder(name, torch.float64)
    expected = model(**arguments()).logits
    for device, lowering in ((GPU, "rms_norm_deferred"), (CPU, "rms_norm")):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="lnfold", options=ON)
        with compiled_for(device):
            assert relative_error(compiled(**arguments()).logits, expected) <= 1e-12
        (report,) = [report for report in lncompile.reports(compiled) if report.total]
        assert [site.lowering for site in report.sites] == [lowering] * 5


def launches(name: str, layers: int, **options: Any) -> tuple[int, int]:
    """Launches of generated kernels, and calls of others, in one step."""
    model, arguments = decoder(name, torch.bfloat16, layers)
    given = arguments()
    with retargeted_to_gpu() as recorder:
        torch.compile(model, fullgraph=True, dynamic=False, **options)(**given)
    return recorder.code.launches, recorder.code.extern_calls


# A block's launches, generated and extern, as stock compiles it and with sums. Up to three of those write the caches
# and their count; the extern call that is left is attention.
A_BLOCK = {"gpt2": ((6, 5), (7, 1)), "opt": ((7, 7), (6, 1)), "gpt_neox": ((5, 5), (7, 1))}


@pytest.mark.parametrize("name", A_BLOCK)
def test_launches_of_a_block(name: str) -> None:
    pytest.importorskip("triton", reason="needs Triton to generate CUDA kernels: pip install triton")
    found = []
    for options in ({}, {"backend": "lnfold", "options": ON}):
        one, two = (launches(name, layers, **options) for layers in (1, 2))
        found.append((two[0] - one[0], two[1] - one[1]))
    assert tuple(found) == A_BLOCK[name]


def test_the_generated_kernels_compute_it() -> None:
    """The Triton code of a block for one row, run by Triton's interpreter, in bfloat16 against float64."""
    pytest.importorskip("triton", reason="needs Triton to generate and interpret CUDA kernels: pip install triton")
    model = block(SUMS["two readers"][0]).to(torch.bfloat16)
    expected = copy.deepcopy(model).double()(ONE)
    code = triton_for_sm90(model, ONE, backend="lnfold", options=ON)
    assert code.extern_calls == 0
    (inside,) = [kernel for kernel in code.kernels if kernel.reductions >= 5]
    assert "rsqrt" in inside.source, "both products, the sum with β of each, and the norm: one kernel"
    ((output,),) = run_in_interpreter([(code.source[0], code.inputs[0])])
    assert output is not None
    assert relative_error(output, expected) <= 1.25 * relative_error(model(ONE), expected)
