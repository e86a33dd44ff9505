"""The latency suite's workloads, on tiny models: shapes, decoding, the limit without norms, and what others do.

Inductor's part is left out where it shows nothing (``without_inductor``): what a candidate computes is its graph's
property, and a C++ compiler takes longer than everything else.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from latency_suite import ARCHITECTURES, WORKLOADS, tiny, without_norms
from suite import peers
from suite.candidates import FOR_ONE_ROW
from suite.decoding import decode_step
from suite.suites import SUITES
from torch import nn

import lncompile
from lncompile.comparisons.no_norm import no_norm, with_small_weights
from lncompile.lowering.inspect.triton_without_gpu import triton_for_sm90
from lncompile.lowering.target import compiled_for
from lncompile.models.loading import randomise

#: Parameters in millions, as their authors and the hub count them.
PARAMETERS = {
    "gpt2": 124.4,
    "gpt2-medium": 354.8,
    "gpt2-xl": 1557.6,
    "opt-125m": 125.2,
    "opt-1.3b": 1315.8,
    "pythia-1.4b": 1414.6,
    "pythia-160m": 162.3,
    "bloom-560m": 559.2,
    "vit-b": 86.4,
    "vit-l": 304.4,
    "dinov2-l": 304.4,
    "clip-l": 303.2,
    "whisper-small": 88.2,  # its encoder
    "whisper-small decoder": 153.6 + 7.8,  # and one layer of the encoder with what is in front of it
    "table encoder 64": 0.204,
    "series encoder 128": 1.202,
    "residual mlp 64": 0.103,
    "mlp-mixer-s/16": 18.5,
    "vit-tiny": 5.6,
    "esm-2-8m": 7.5,  # without its language head
    "segformer-b0": 3.3,  # its encoder
    "wav2vec2 front end": 4.2,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_are_the_real_models(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build(architecture.config(), "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], rel=0.01)


#: One of each class: the others differ in sizes alone, which a tiny model has not.
CLASSES = {architecture.model_class: architecture.name for architecture in reversed(ARCHITECTURES.values())}


ONE_NORM_A_LAYER = "residual mlp 64"


@pytest.mark.parametrize("name", CLASSES.values())
def test_every_model_runs_its_tasks_and_every_norm_can_be_found(name: str) -> None:
    """With real norms, as many as layers say, on the arguments the suite makes."""
    # The first of each task: torch's own encoder layers stay closed in 16 bits on a CPU.
    workloads = reversed([workload for workload in WORKLOADS.values() if workload.architecture.name == name])
    tasks = {workload.task: workload for workload in workloads}
    for task, workload in tasks.items():
        dry = workload.dry()
        model = dry.build("cpu")
        inputs = decode_step(dry, model, "cpu")[0] if task == "decode" else dry.inputs(model, "cpu")
        torch._dynamo.reset()
        report = lncompile.explain(model, **inputs)
        assert report.graphs == 1, "a graph break would hide norms"
        assert report.total >= (dry.depth + 1 if name == ONE_NORM_A_LAYER else 2 * dry.depth)
        assert report.folded or name in ("bloom-560m", "clip-l", "whisper-small")


def test_names_tell_workloads_apart() -> None:
    for members in SUITES.values():
        assert len({workload.name for workload in members}) == len(members)


def test_gpu_decoding_is_timed_with_cuda_graphs() -> None:
    for suite in ("decoding", "gpu", "all"):
        assert all(w.mode == "reduce-overhead" for w in SUITES[suite] if w.task == "decode")


def test_every_parameter_is_random() -> None:
    model = tiny("gpt2 prefill 1x128").build("cpu")
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0, name
        if name.endswith("bias"):
            assert parameter.mean().abs() > 0.01, name


@pytest.mark.parametrize("name", ["gpt2", "opt-1.3b", "pythia-1.4b"])
def test_a_decode_step_continues_the_prompt_and_can_be_repeated(name: str) -> None:
    workload = tiny(f"{name} decode 1x256", "all")
    model = workload.build("cpu").double()
    inputs, rewind = decode_step(workload, model, "cpu")
    prompt = workload.tokens(model.config, "cpu")
    whole = model(input_ids=torch.cat([prompt, prompt[:, -1:]], 1), use_cache=False).logits[:, -1]
    for _ in range(2 * workload.length + 3):  # more often than the cache has room for
        rewind()
        torch.testing.assert_close(model(**inputs).logits[:, -1], whole, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("name", ["gpt2 prefill 1x128", "vit-b encode 1"])
def test_no_norm_is_the_model_with_identities(name: str) -> None:
    workload = tiny(name)
    model = workload.build("cpu").double()
    inputs = {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in workload.inputs(model, "cpu").items()
    }
    limit = no_norm()
    expected = without_norms(model)(**inputs)[0]
    torch.testing.assert_close(torch.compile(model, backend=limit)(**inputs)[0], expected, rtol=1e-12, atol=1e-12)
    assert limit.replaced == sum(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert (model(**inputs)[0] - expected).norm() > 0.1 * expected.norm(), "the norms did something"


def test_without_norms_the_stream_stays_bounded_on_small_weights() -> None:
    workload = dataclasses.replace(tiny("gpt2 prefill 1x128"), layers=48)
    model = workload.build("cpu")
    before = copy.deepcopy(model.state_dict())
    inputs = workload.inputs(model, "cpu")
    assert without_norms(with_small_weights(model))(**inputs).logits.abs().max() < 100
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.usefixtures("without_inductor")
def test_an_author_who_goes_on_in_place_does_not_write_into_the_stream() -> None:
    norm = randomise(nn.LayerNorm(8))

    def author(x: torch.Tensor) -> torch.Tensor:
        stream = x * 2
        y = norm(stream)
        y += 1
        return stream + y

    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(author, backend=no_norm())(x), 2 * x + (2 * x + 1))


def test_the_limit_has_no_trace_of_a_norm_in_the_code_inductor_makes() -> None:
    pytest.importorskip("triton", reason="the extra 'triton' is not installed")
    norm, linear = nn.LayerNorm(64), nn.Linear(64, 64)

    def block(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stream = x + y
        return stream, linear(norm(stream))

    x, y = torch.randn(4, 64), torch.randn(4, 64)
    stock = triton_for_sm90(block, x, y)
    limit = triton_for_sm90(block, x, y, backend=no_norm())
    assert [kernel.reductions for kernel in stock.kernels] == [2]
    assert [kernel.reductions for kernel in limit.kernels] == [0]
    # The sum stays, and the matmul reads it: no copy stands for the norm.
    assert [kernel.stores for kernel in limit.kernels] == [1]
    assert (limit.launches, limit.extern_calls) == (stock.launches, stock.extern_calls) == (1, 1)


@pytest.mark.usefixtures("without_inductor")
def test_a_norm_that_cannot_be_left_out_is_an_error() -> None:
    """A limit with norms in it would be a wrong number."""

    def by_hand(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        difference = x - x.mean(-1, keepdim=True)
        return difference * torch.rsqrt(difference.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    with pytest.raises(Exception, match="not a single call of layer_norm"):
        torch.compile(by_hand, backend=no_norm())(torch.randn(3, 8), torch.randn(8))


@pytest.mark.usefixtures("without_inductor")
def test_peers_compute_the_model() -> None:
    workload = tiny("gpt2 prefill 1x128")
    model = workload.build("cpu").double()
    inputs = workload.inputs(model, "cpu")
    expected = model(**inputs).logits
    folded = torch.compile(model, backend=peers.folded_with(peers.torch_rms_norm))
    by_hand = peers.pre_rms_norm_by_hand(model)
    assert not any(isinstance(module, nn.LayerNorm) for module in by_hand.modules())
    for peer in (folded, by_hand):
        torch.testing.assert_close(peer(**inputs).logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("without_inductor")
def test_each_lever_for_one_row_computes_a_step_of_decoding() -> None:
    workload = tiny("gpt2 decode 1x128")
    model = workload.build("cpu").double()
    arguments, _ = decode_step(workload, model, "cpu")
    expected = model(**arguments).logits
    lowerings = {}
    for recipe in FOR_ONE_ROW:
        torch._dynamo.reset()
        run = recipe.make(model, "max-autotune")
        arguments, _ = decode_step(workload, model, "cpu")
        with compiled_for(torch.device("cuda")):
            torch.testing.assert_close(run(**arguments).logits, expected, rtol=1e-10, atol=1e-10)
        (report,) = [report for report in lncompile.reports(run) if report.total]
        assert report.folded == report.total, recipe.name
        lowerings[recipe.name.removeprefix("lnfold, ")] = {site.lowering for site in report.sites}
    assert lowerings == {
        "fold alone": {"rms_norm"},
        "scales deferred": {"rms_norm", "rms_norm_deferred"},  # where deferring would add a kernel, it stays
        "products as sums": {"rms_norm_deferred"},
    }


@pytest.mark.usefixtures("without_inductor")
def test_torch_rms_norm_stands_where_a_norm_folded() -> None:
    targets: list[object] = []

    def recording_norm(input, normalized_shape, weight, bias, eps):
        targets.append(normalized_shape)
        return peers.torch_rms_norm(input, normalized_shape, weight, bias, eps)

    workload = tiny("gpt2 prefill 1x128")
    model = workload.build("cpu")
    torch.compile(model, backend=peers.folded_with(recording_norm))(**workload.inputs(model, "cpu"))
    assert targets == [(32,)] * 5


@pytest.mark.usefixtures("without_inductor")
def test_kernels_of_others_stand_where_the_norms_were(monkeypatch) -> None:
    """Liger's own need a GPU; here others stand in for them, behind the same operators."""
    calls: list[str] = []

    def layer_norm(x, weight, bias, eps):
        calls.append("layer norm")
        return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def rms_norm(x, weight, eps):
        calls.append("rms norm")
        return nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    operators = peers.operators(layer_norm, rms_norm)
    monkeypatch.setattr(peers, "_liger", lambda: operators)
    workload = tiny("gpt2 prefill 1x128")
    model = workload.build("cpu").double()
    inputs = workload.inputs(model, "cpu")
    for make, name in ((peers.liger_layer_norm, "layer norm"), (peers.liger_rms_norm, "rms norm")):
        calls.clear()
        compiled = torch.compile(model, backend=make(), fullgraph=True)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-10, atol=1e-10)
        assert calls == [name] * 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="Liger's kernels may be there")
def test_liger_is_left_out_with_a_reason() -> None:
    for make in (peers.liger_layer_norm, peers.liger_rms_norm):
        with pytest.raises(peers.Unavailable, match="GPU"):
            make()


def test_a_rewrite_by_hand_is_of_one_model() -> None:
    with pytest.raises(peers.Unavailable, match="written for GPT2LMHeadModel"):
        peers.pre_rms_norm_by_hand(nn.Linear(2, 2))
