"""What an A/B test is made of: arguments, and compiled models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from abtesting import arms, double
from architectures import randomise
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lncompile
from lncompile.comparisons import even_terms
from lncompile.lowering import torch_private_caches


async def coroutine(value: Any) -> Any:
    return value


class AsyncCallable:
    async def __call__(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "pass a model"),
        ({"arms": {"one": double}}, "two arms"),
        ({"arms": {"one": double, "two": 3}}, "arm 'two' is not callable .its type is int"),
        ({"arms": {"one": double, "two": coroutine}}, "arm 'two' is a coroutine function"),
        ({"arms": {"one": double, "two": AsyncCallable()}}, "arm 'two' is a coroutine function"),
        ({"arms": arms(), "mode": "max-autotune"}, "give one or other"),
        ({"arms": arms(), "ratio": 0.0}, "ratio is between 0.01 and 0.99, not 0.0"),
        ({"arms": arms(), "shadow": 2.0}, "shadow is between 0 and 1"),
        ({"arms": arms(), "alpha": 0.0}, "alpha is between"),
        ({"arms": arms(), "warmup": -1}, "warmup is between"),
        ({"arms": arms(), "buckets": 0}, "buckets is between"),
        ({"model": nn.Linear(3, 3), "options": {"lnfold.assits": True}}, "lnfold.assist"),
        ({"model": torch.compile(nn.Linear(3, 3))}, "compiled already"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lncompile.ABTest(**arguments)


def test_a_module_compiled_in_place_is_refused() -> None:
    module = nn.Linear(3, 3)
    module.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled already"):
        lncompile.ABTest(module)


class Block(nn.Module):
    """Its norm folds."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, value: Tensor) -> Tensor:
        return self.outer(self.norm(self.inner(value)))


@pytest.fixture
def block() -> Block:
    return randomise(Block()).eval()  # type: ignore[misc]


def test_a_model_in_both_arms(block: Block) -> None:
    """Both compile it, share its weights, agree with eager, before and after the weights change."""
    ab = lncompile.ABTest(block, shadow=1.0, warmup=2)
    value = torch.randn(4, 16)
    for _ in range(12):
        torch.testing.assert_close(ab(value), block(value), rtol=1e-4, atol=1e-5)
    block.inner.weight.mul_(3.0)
    for _ in range(12):
        torch.testing.assert_close(ab(value), block(value), rtol=1e-4, atol=1e-5)
    assert list(ab.arms) == ["inductor", "lnfold"]
    assert [report.folded for report in lncompile.reports(ab.arms["lnfold"])] == [1]
    verdict = ab.verdict()
    assert (verdict.comparisons, verdict.outputs_agree) == (24, True), str(verdict)
    # A second shape may compile again, and takes part in no measurement then.
    state = ab.to_dict()
    assert state["during_compilation"] >= 1
    counted = sum(arm["seconds"]["requests"] for arm in state["arms"])
    assert counted + state["during_compilation"] + sum(state["buckets"][0]["warmup"].values()) == 24


def test_each_arm_has_its_own_recompile_limit(block: Block) -> None:
    """Fixed shapes: every new one is compiled by both arms, up to Dynamo's limit for each."""
    apart = torch_private_caches.separate_caches()
    if not apart:
        pytest.skip("this torch.compile has one limit for both")
    for arguments, expected in ((apart, 8), ({}, 4)):
        torch._dynamo.reset()
        counters = CompileCounter(), CompileCounter()
        compiled = [torch.compile(block, backend=counter, dynamic=False, **arguments) for counter in counters]
        with torch._dynamo.config.patch(recompile_limit=4):
            for size in range(2, 6):
                for arm in compiled:
                    arm(torch.randn(size, 16))
        assert sum(counter.frame_count for counter in counters) == expected


def test_both_arms_are_compiled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    even_terms.settle()  # the first comparison of a process does, by torch.compile
    calls = []

    def record(function: Any, **arguments: Any) -> Any:
        calls.append(arguments)
        return function

    monkeypatch.setattr(torch, "compile", record)
    lncompile.ABTest(double, options={"lnfold.assist": "off", "max_autotune": True}, dynamic=True, fullgraph=True)
    alike = {"dynamic": True, "fullgraph": True}
    assert calls == [
        {"backend": "inductor", "options": {"max_autotune": True}, **alike},
        {"backend": "lnfold", "options": {"lnfold.assist": "off", "max_autotune": True}, **alike},
    ]
    calls.clear()
    lncompile.ABTest(double, mode="reduce-overhead")
    assert [(call["backend"], call["mode"]) for call in calls] == [
        ("inductor", "reduce-overhead"),
        ("lnfold", "reduce-overhead"),
    ]
    assert not any("options" in call for call in calls)
