"""The look at weights on a GPU: the kernel under Triton's interpreter and for sm_90; on a GPU the whole of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn

import lncompile

pytest.importorskip("triton", reason="needs Triton: pip install triton")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# One process cannot both interpret and compile Triton kernels.
INTERPRETED = """
import json, torch
from lncompile.runtime.weight_samples import _DeviceMemory, _Word, word_places

weights = [torch.randn(30, 40, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
weights += [torch.randn(64, 64) for _ in range(400)]  # words for more than one program
places = [_Word(*at, index) for index, weight in enumerate(weights) for at in word_places(weight, 4).items()]
words = _DeviceMemory(places, torch.device("cpu"))
seen = {"words": len(places), "at first": [words.differ(), words.differ()]}
for index in (0, 1, 2, len(weights) - 1):
    weights[index].data.mul_(2)
    seen[index] = [words.differ(), words.differ(), sorted(set(words.different()))]
    words.record()
    seen[index] += [words.differ(), words.differ()]
weights[1].data.neg_()
words.differ()
weights[1].data.neg_()
seen["there and back"] = words.differ()
print(json.dumps(seen))
"""


def test_under_the_interpreter() -> None:
    """The first look finds nothing yet, the second has the answer of the first; recorded anew, both are silent."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=True, cwd="/"
    )
    seen = json.loads(done.stdout)
    assert seen.pop("words") > 1024
    assert seen.pop("at first") == [False, False]
    assert seen.pop("there and back") is False, "the weight is what it was"
    assert seen == {str(index): [False, True, [index], False, False] for index in (0, 1, 2, 402)}


def test_compiled_for_sm_90() -> None:
    """One launch of a few instructions: no barrier, no atomic, one store to the flag, which is predicated."""
    import triton
    from triton.backends.compiler import GPUTarget

    from lncompile.lowering.device_words_kernel import BLOCK, read_words

    types = {"addresses": "*i64", "masks": "*i32", "expected": "*i32", "flag": "*i32", "count": "i32"}
    source = triton.compiler.ASTSource(
        fn=read_words,
        signature={**types, "RECORD": "constexpr", "BLOCK": "constexpr"},
        constexprs={(5,): False, (6,): BLOCK},
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assembly = code.asm["ptx"]
    assert "ld.global" in assembly
    assert not any(word in assembly for word in ("bar.sync", "atom.", "st.shared"))
    stores = [line for line in assembly.splitlines() if "st.global" in line]
    assert stores
    assert all(line.strip().startswith("@%p") for line in stores), "only where a word differs"


# --- on a GPU ---


class Stream(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, value: Tensor) -> Tensor:
        return self.last(self.norm(self.first(value)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("write", ["data", "graph"])
def test_noticed_by_the_second_call(mode: str | None, write: str) -> None:
    model = randomise(Stream()).cuda().eval()
    value = torch.randn(4, 64, device="cuda")
    compiled = torch.compile(model, backend="lnfold", mode=mode)
    for _ in range(4):
        compiled(value)
    assert lncompile.reports(compiled)[0].folded == 1
    step = torch.sin(torch.arange(64 * 64, device="cuda").float()).view(64, 64)
    if write == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model.first.weight.data.add_(step)
        write_once = graph.replay
    else:
        write_once = lambda: model.first.weight.data.add_(step)  # noqa: E731
    for _ in range(2):
        before = model(value)
        write_once()
        compiled(value)
        torch.cuda.synchronize()
        after = model(value)
        assert not torch.allclose(before, after, rtol=1e-2), "the control: it did write"
        torch.testing.assert_close(compiled(value), after, rtol=2e-3, atol=2e-3)
    assert lncompile.reports(compiled)[0].folded == 1


@pytest.mark.gpu
@needs_gpu
def test_the_look_does_not_wait() -> None:
    """A sleeping stream holds up neither the look nor the call."""
    from lncompile.runtime.weight_samples import WeightSamples

    weight = torch.zeros(64, 64, device="cuda")
    samples = WeightSamples([weight])
    assert not samples.differ()
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        torch.cuda._sleep(10**9)
        assert not samples.differ()
        assert not torch.cuda.current_stream().query(), "the control: the stream was still busy"
    torch.cuda.synchronize()
