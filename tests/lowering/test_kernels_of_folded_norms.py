"""A block that came folded and one that is folded in its graph: the same kernels, line by line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
import transformers
from architectures import TEXT, tokens
from hand_folded import MODELS
from torch import nn

from lncompile.lowering.inspect.generated_code import GeneratedCode, generated_code
from lncompile.lowering.inspect.triton_without_gpu import triton_for_sm90


def lines_of(code: GeneratedCode) -> list[str]:
    """The kernels as they compute, without names and notes of where their operations came from."""
    kernels = []
    for kernel in code.kernels:
        lines = [line.split("#")[0].rstrip() for line in kernel.source.splitlines()]
        noted = ("triton_meta", "inductor_meta")
        body = "\n".join(line for line in lines if line.strip() and not any(word in line for word in noted))
        kernels.append(re.sub(r"(triton_(per|red|poi)|cpp)_fused_\w+", "kernel", body))
    return sorted(kernels)


WIDE = dataclasses.replace(
    MODELS["gpt2"],
    build=lambda: transformers.GPT2Model(
        transformers.GPT2Config(n_embd=1536, n_layer=1, n_head=12, n_inner=64, n_positions=64, **TEXT)
    ),
    inputs={"input_ids": tokens(4, 32), "use_cache": False},
)


def assert_same_kernels(model: nn.Module, folded: nn.Module, generate: Callable[[nn.Module], GeneratedCode]) -> None:
    in_graph, before = generate(model), generate(folded)
    assert (before.launches, before.extern_calls) == (in_graph.launches, in_graph.extern_calls)
    assert lines_of(before) == lines_of(in_graph)
    assert not [kernel for kernel in before.kernels if kernel.welford or kernel.mean_subtractions]


def test_cpp() -> None:
    model, folded = WIDE.models(torch.float32)

    def generate(candidate: nn.Module, backend: str = "lnfold") -> GeneratedCode:
        torch._dynamo.reset()
        return generated_code(torch.compile(candidate, backend=backend), **WIDE.inputs)

    assert_same_kernels(model, folded, generate)
    assert lines_of(generate(folded, "inductor")) != lines_of(generate(folded)), "the control: stock's are others"


def test_triton() -> None:
    pytest.importorskip("triton", reason="needs Triton to generate CUDA kernels: pip install triton")
    model, folded = WIDE.models(torch.bfloat16)

    def generate(candidate: nn.Module, defer: str = "auto") -> GeneratedCode:
        return triton_for_sm90(candidate, backend="lnfold", options={"lnfold.defer": defer}, **WIDE.inputs)

    assert_same_kernels(model, folded, generate)
    in_place = generate(folded, "off")
    assert lines_of(in_place) != lines_of(generate(folded)), "by default one of the scales is deferred"
    persistent = ["persistent_reduction(" in kernel.source for kernel in in_place.kernels if kernel.reductions]
    assert persistent == [True] * len(persistent), "rows of 1536 elements, which stock's kernels loop over"
    stock = triton_for_sm90(folded, **WIDE.inputs)
    assert not all("persistent_reduction(" in kernel.source for kernel in stock.kernels if kernel.reductions)
