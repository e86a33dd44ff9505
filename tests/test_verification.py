"""`lncompile.verify`: which errors pass, and what becomes of NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn

import lncompile
from lncompile.verification import OutputError, Verification

NAN, INF = math.nan, math.inf


def output(eager: float = 1e-7, inductor: float = 1e-7, lnfold: float = 1e-7, **more: Any) -> OutputError:
    return OutputError(".logits", "float32", eager, inductor, lnfold, **{"same_non_finite": True, **more})


@pytest.mark.parametrize(
    ("error", "passed"),
    [
        (output(lnfold=1.2e-6, inductor=1e-6), True),
        (output(lnfold=1.3e-6, inductor=1e-6), False),
        (output(lnfold=4e-7, inductor=0.0), True),  # within four roundings
        (output(lnfold=5e-7, inductor=0.0), False),
        (output(lnfold=NAN), False),
        (output(lnfold=INF), False),
        (output(lnfold=NAN, inductor=NAN, eager=NAN), False),
        (output(lnfold=INF, inductor=INF, eager=INF), False),
        (output(lnfold=INF, inductor=NAN), False),
        (output(inductor=NAN), True),
        (output(lnfold=1e-2, inductor=NAN), False),  # eager's error counts then
        (output(lnfold=1e-2, inductor=NAN, eager=INF), True),  # nothing to be worse than
        (output(same_non_finite=False), False),
        (output(not_finite=1), False),
    ],
)
def test_what_passes(error: OutputError, passed: bool) -> None:
    assert error.passed is passed
    assert (error.in_words() == "") is passed


class Output(nn.Module):
    """Two norms that fold; what follows is a function that one arm or another replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.norm(self.first(x))
        return {"logits": logits, "masked": torch.where(logits > 0, logits, -INF)}


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verification]:
    """Verify a model whose arms are replaced by what spoils eager's outputs in them."""

    def verifying(inductor: Callable[..., None] | None = None, lnfold: Callable[..., None] | None = None):
        spoilers = {"inductor": inductor, "lnfold": lnfold}
        model = randomise(Output()).eval()

        def compile(module: nn.Module, backend: str, **_: Any) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                outputs = module(*arguments)
                if (spoil := spoilers[backend]) is not None:
                    spoil(outputs)
                return outputs

            return run

        monkeypatch.setattr(torch, "compile", compile)
        return lncompile.verify(model, torch.randn(4, 8))

    return verifying


def put(name: str, value: float, elements: int = 1) -> Callable[[dict[str, Tensor]], None]:
    """Put a value into the first elements of an output that are finite."""

    def spoil(outputs: dict[str, Tensor]) -> None:
        flat = outputs[name].view(-1)
        flat[flat.isfinite().nonzero().flatten()[:elements]] = value

    return spoil


def test_unspoiled_outputs_pass_with_infinities_where_the_reference_has_them(verify) -> None:
    found = verify()
    assert found.passed
    assert [out.output for out in found.outputs] == ["['logits']", "['masked']"]
    assert found.sentence() == "Predictions stay the same."
    assert found.outputs[0].elements == 32


@pytest.mark.parametrize("name", ["logits", "masked"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_single_element_that_is_not_finite_fails(verify, name: str, value: float) -> None:
    found = verify(lnfold=put(name, value))
    (bad,) = (out for out in found.outputs if not out.passed)
    assert bad.output == f"['{name}']"
    assert (bad.not_finite, bad.not_finite_inductor) == (1, 0)
    assert f"['{name}'] is not finite: lnfold gives NaN or infinity in 1 of 32 elements" in found.sentence()
    assert "NOT FINITE" in str(found)
    assert found.to_dict()["passed"] is False


def test_stock_torch_compile_that_fails_alike_is_said_and_passes_nothing(verify) -> None:
    found = verify(put("logits", NAN, 3), put("logits", NAN, 2))
    assert not found.passed
    assert "in 2 of 32 elements where the reference is finite (stock torch.compile: 3)" in found.sentence()


def test_stock_torch_compile_that_fails_alone_is_no_fault_of_ours(verify) -> None:
    found = verify(put("logits", INF))
    assert found.passed
    assert found.outputs[0].not_finite_inductor == 1


@pytest.mark.parametrize("value", [NAN, INF, 0.0])
def test_where_the_reference_is_infinite_so_must_the_output_be(verify, value: float) -> None:
    def spoil(outputs: dict[str, Tensor]) -> None:
        masked = outputs["masked"].view(-1)
        masked[masked.isneginf().nonzero()[0]] = value

    found = verify(lnfold=spoil)
    (bad,) = (out for out in found.outputs if not out.passed)
    assert (bad.output, bad.not_finite, bad.same_non_finite) == ("['masked']", 0, False)
    assert "is not NaN or infinite in the elements where the reference is" in found.sentence()
    assert "NOT THE SAME" in str(found)


def test_names_of_outputs_are_printed_as_they_are() -> None:
    found = Verification((OutputError(".a:ok:[bold]", "float32", 1e-7, 1e-7, 1e-7, True),))
    assert ".a:ok:[bold]" in str(found)
