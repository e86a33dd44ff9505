"""LoRA adapters of PEFT on a compiled model: beside the weights, merged into them, taken out, switched and unloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, randomise, tokens
from torch import Tensor, nn

import lncompile

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.usefixtures("without_inductor"), pytest.mark.filterwarnings("ignore")]

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def adapted(*names: str) -> Any:
    model = next(a for a in ARCHITECTURES if a.name == "gpt2").model()
    layers = ["c_attn", "c_proj", "c_fc"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=layers, fan_in_fan_out=True)
    wrapped = peft.get_peft_model(model, config, adapter_name="default")
    for name in names:
        wrapped.add_adapter(name, config)
    return randomise(wrapped.double()).eval()


def logits(model: Callable[..., Any]) -> Tensor:
    result: Tensor = model(input_ids=tokens(), use_cache=False).logits
    return result


def check(compiled: Callable[..., Any], model: nn.Module) -> Tensor:
    expected = logits(model)
    torch.testing.assert_close(logits(compiled), expected, **TOLERANCE)
    assert {(report.folded, report.total) for report in lncompile.reports(compiled)} == {(5, 5)}
    return expected


def test_merged_and_unmerged() -> None:
    model = adapted()
    compiled = torch.compile(model, backend="lnfold")
    beside = check(compiled, model)
    # PEFT adds to `weight.data`, which torch does not count.
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(check(compiled, model), beside, **TOLERANCE)
        model.unmerge_adapter()
        torch.testing.assert_close(check(compiled, model), beside, **TOLERANCE)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
        beside = check(compiled, model)


def test_disabled_and_enabled() -> None:
    model = adapted()
    compiled = torch.compile(model, backend="lnfold")
    beside = check(compiled, model)
    with model.disable_adapter():
        assert not torch.allclose(check(compiled, model), beside)
    torch.testing.assert_close(check(compiled, model), beside, **TOLERANCE)


def test_switched() -> None:
    model = adapted("other")
    compiled = torch.compile(model, backend="lnfold")
    first = check(compiled, model)
    model.set_adapter("other")
    assert not torch.allclose(check(compiled, model), first)
    model.set_adapter("default")
    torch.testing.assert_close(check(compiled, model), first, **TOLERANCE)


def test_another_adapter_merged_between_two_calls() -> None:
    model = adapted("other")
    compiled = torch.compile(model, backend="lnfold")
    model.merge_adapter(["default"])
    first = check(compiled, model)
    model.unmerge_adapter()
    model.merge_adapter(["other"])
    assert not torch.allclose(check(compiled, model), first)


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swapped(prepared: bool, tmp_path: Path) -> None:
    """An adapter's values are exchanged in place, through ``.data``; prepared, for another rank and scaling as well."""
    hotswap = pytest.importorskip("peft.utils.hotswap")
    config = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    for name, rank in (("first", 2), ("second", 3 if prepared else 2)):
        plain = next(a for a in ARCHITECTURES if a.name == "gpt2").model()
        adapter = peft.get_peft_model(plain, peft.LoraConfig(r=rank, lora_alpha=4 + rank, **config))
        randomise(adapter.double(), seed=rank + len(name)).save_pretrained(tmp_path / name)
    base = randomise(next(a for a in ARCHITECTURES if a.name == "gpt2").model().double())
    model = peft.PeftModel.from_pretrained(base, tmp_path / "first").double().eval()
    if prepared:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4)
    compiled = torch.compile(model, backend="lnfold")
    answers = [check(compiled, model)]
    for name in ("second", "first"):
        hotswap.hotswap_adapter(model, tmp_path / name, adapter_name="default", torch_device="cpu")
        answers.append(check(compiled, model))
    assert not torch.allclose(answers[0], answers[1], rtol=1e-3), "the control: another adapter"
    torch.testing.assert_close(answers[0], answers[2], **TOLERANCE)


def test_another_adapter_merged_safely_between_two_calls() -> None:
    model = adapted("other")
    compiled = torch.compile(model, backend="lnfold")
    model.merge_adapter(["default"], safe_merge=True)
    first = check(compiled, model)
    model.unmerge_adapter()
    model.merge_adapter(["other"], safe_merge=True)  # exchanges the data, which is noticed
    assert not torch.allclose(check(compiled, model), first)


def test_unloaded() -> None:
    model = adapted()
    compiled = torch.compile(model, backend="lnfold")
    beside = check(compiled, model)
    plain = model.merge_and_unload()
    torch.testing.assert_close(check(torch.compile(plain, backend="lnfold"), plain), beside, **TOLERANCE)
