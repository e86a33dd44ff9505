"""γ and β in the layers behind a norm: what is left is a plain RMSNorm, and a stream that can be rotated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from plan_models import IDS, TOLERANCE, WIDTH, Once, Residual, Tied, error, randomised, value
from text_architectures import TEXT_DECODERS
from torch import Tensor, nn

import lncompile
from lncompile.nn import RMSNorm


def check(model: nn.Module, mode: str, absorbed: dict[str, str], *args: Any, **options: Any) -> lncompile.FoldPlan:
    """Plan with absorption, apply, compare; what is absorbed is said by norm: "γβ", "β", "γ"."""
    plan = lncompile.plan(model, *args, absorb=mode, **options)
    what = {entry.path: ("γ" if entry.weight else "") + ("β" if entry.bias else "") for entry in plan.absorb}
    assert what == absorbed, str(plan)
    folded = plan.apply(copy.deepcopy(model))
    assert error(folded, model, *args) <= TOLERANCE
    for entry in plan.absorb:
        norm = folded.get_submodule(entry.path)
        assert isinstance(norm, RMSNorm)
        assert entry.bias is None or norm.bias is None
        assert entry.weight is None or bool((norm.weight == 1).all())
    before = {name: tensor.clone() for name, tensor in folded.state_dict().items()}
    again = plan.apply(folded).state_dict()
    assert before.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items()), "twice is once"
    assert error(plan.replace_modules(copy.deepcopy(model)), model, *args) > 1e-4, "the control"
    return plan


def test_beta_goes_into_biases_and_gamma_into_weights() -> None:
    model = randomised(Residual())
    # The branch reads the norm through an activation; the head reads the last norm, and has no bias.
    plan = check(model, "bias", {"final": "β"}, IDS)
    (layer,) = plan.absorb[0].layers
    assert (layer.weight, layer.bias, layer.adds_bias) == ("head.weight", "head.bias", True)
    assert "a bias is added to head" in str(plan)
    assert "γ and β stay: its output is read by" in str(plan)
    folded = plan.apply(copy.deepcopy(model))
    assert folded.state_dict().keys() ^ model.state_dict().keys() == {"final.bias", "head.bias"}
    assert torch.equal(folded.head.weight, model.head.weight)
    check(model, "affine", {"final": "γβ"}, IDS)


class Between(nn.Module):
    """A layer between two norms: it absorbs the first, and is centered for the second."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.second, self.final = nn.Linear(WIDTH, WIDTH, bias=bias), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final(self.second(self.norm(self.first(x)))))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["bias", "affine"])
def test_a_layer_that_is_centered_and_absorbs(mode: str, bias: bool) -> None:
    what = "γβ" if mode == "affine" else "β"
    model = randomised(Between(bias))
    plan = check(model, mode, {"norm": what, "final": what}, value(2, 3))
    folded = plan.apply(copy.deepcopy(model))
    assert folded.second.weight.mean(0).abs().max() < 1e-15
    assert folded.second.bias.mean().abs() < 1e-15
    narrow = plan.apply(copy.deepcopy(model).float())
    for name, tensor in plan.apply(copy.deepcopy(model).float().double()).state_dict().items():
        torch.testing.assert_close(narrow.state_dict()[name], tensor.float(), rtol=1e-7, atol=1e-9)


def test_a_tied_head_takes_beta_and_takes_gamma_once_it_is_untied() -> None:
    check(randomised(Tied()), "bias", {"final": "β"}, IDS)
    plan = check(randomised(Tied()), "affine", {"final": "β"}, IDS)
    assert "'table.weight' is also looked up in" in str(plan)
    check(randomised(Tied()), "affine", {"final": "γβ"}, IDS, untie=True)


class TwoReaders(Once):
    """A layer that reads the norm, and something else with the same weights."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.head, self.way = nn.Linear(WIDTH, WIDTH, bias=way != "module"), way

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x))
        if self.way == "activation":
            return self.head(y) + torch.tanh(y)
        if self.way == "returned":
            return self.head(y) * y.sum()
        if self.way == "bias":
            return self.head(y) + self.head.bias
        return self.head(y) + self.head(x)


@pytest.mark.parametrize("mode", ["bias", "affine"])
@pytest.mark.parametrize("way", ["activation", "returned", "bias", "module"])
def test_what_something_else_reads_stays(way: str, mode: str) -> None:
    x = value(2, 3)
    plan = lncompile.plan(randomised(TwoReaders(way)), x, absorb=mode)
    assert plan.folded == 1
    assert not plan.absorb
    assert "γ and β stay: " in plan.norms[0].detail


class OtherWay(Between):
    """Another call reads the head, or the norm, in another way."""

    def forward(self, x: Tensor, way: str = "") -> Tensor:
        return self.head(x) if way == "head" else super().forward(x)


def test_all_calls_have_a_say() -> None:
    x, model = value(2, 3), randomised(OtherWay())
    assert len(lncompile.plan(model, x, absorb="affine").absorb) == 2
    calls = [lncompile.Call(x, "head")]
    plan = lncompile.plan(model, x, more_calls=calls, absorb="affine")
    assert [entry.path for entry in plan.absorb] == ["norm"]
    folded = plan.apply(copy.deepcopy(model))
    assert max(error(folded, model, x), error(folded, model, x, "head")) <= TOLERANCE


def test_a_plan_that_absorbs_is_kept_in_a_file(tmp_path: Path) -> None:
    model = randomised(Between(False))
    plan = lncompile.plan(model, value(2, 3), absorb="affine")
    plan.save(tmp_path / "plan.json")
    loaded = lncompile.FoldPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    folded = loaded.apply(copy.deepcopy(model))
    other = loaded.replace_modules(randomised(Between(False), seed=4))
    other.load_state_dict(folded.state_dict())
    assert error(other, model, value(2, 3)) <= TOLERANCE
    with pytest.raises(ValueError, match="absorb takes 'bias' or 'affine' or None"):
        lncompile.plan(model, value(2, 3), absorb="all")


def test_a_failure_in_the_middle_puts_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(Between())
    plan = lncompile.plan(model, value(2, 3), absorb="affine")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr("lncompile.plans.application._exchange", lambda *_: None)
    put, written = lncompile.plans.application._put, []  # type: ignore[attr-defined]

    def fail_at_the_fifth(tensor: Tensor, value: Tensor) -> None:
        written.append(tensor)
        if len(written) == 5:
            raise MemoryError
        put(tensor, value)

    monkeypatch.setattr("lncompile.plans.application._put", fail_at_the_fifth)
    with pytest.raises(MemoryError):
        plan.apply(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-15, atol=1e-15)


# --- rotation ---


def rotation(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q


def rotate(model: nn.Module, into: Sequence[str], out_of: Sequence[str]) -> nn.Module:
    """Rotate the residual stream: tables and layers that write into it, and layers that read it."""
    width = 32
    q = rotation(width)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in into):
                # An embedding or a position [..., width], a linear layer [width, in], a convolution, a bias.
                if parameter.shape[-1] == width and (parameter.dim() == 3 or "embed" in name):
                    parameter.copy_(parameter @ q)
                else:
                    parameter.copy_(torch.einsum("io,i...->o...", q, parameter))
            elif any(part in name for part in out_of) and parameter.dim() == 2:
                parameter.copy_(parameter @ q)
    return model


def model_of(name: str) -> tuple[nn.Module, dict[str, Any]]:
    rows = {a.name: a for a in (*ARCHITECTURES, *TEXT_DECODERS)}
    return rows[name].model(), rows[name].inputs(torch.float64)


ROTATED: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], list[str], list[str]]] = {
    "opt": (
        lambda: model_of("opt"),
        ["embed_tokens", "embed_positions", "out_proj", "fc2"],
        ["q_proj", "k_proj", "v_proj", "fc1", "lm_head"],
    ),
    "gpt_neox": (
        lambda: model_of("gpt_neox_parallel"),
        ["embed_in", "attention.dense", "dense_4h_to_h"],
        ["query_key_value", "dense_h_to_4h", "embed_out", "lm_head"],
    ),
    "phi": (
        lambda: model_of("phi"),
        ["embed_tokens", "dense", "fc2"],
        ["q_proj", "k_proj", "v_proj", "fc1", "lm_head"],
    ),
    "vit": (
        lambda: model_of("vit"),
        ["cls_token", "position_embeddings", "patch_embeddings", "o_proj", "fc2"],
        ["q_proj", "k_proj", "v_proj", "fc1", "classifier"],
    ),
}


@pytest.mark.parametrize("name", ROTATED)
def test_the_stream_can_be_rotated(name: str) -> None:
    make, into, out_of = ROTATED[name]
    model, inputs = make()
    plan = lncompile.plan(model, absorb="affine", untie=True, **inputs)
    assert plan.folded == plan.total == len(plan.absorb), str(plan)
    folded = plan.apply(copy.deepcopy(model))
    assert error(folded, model, **inputs) <= TOLERANCE
    rotated = rotate(copy.deepcopy(folded), into, out_of)
    changed = [n for n, p in rotated.named_parameters() if not torch.equal(p, folded.get_parameter(n))]
    assert len(changed) > 12
    assert error(rotated, model, **inputs) <= TOLERANCE
    assert error(rotate(copy.deepcopy(model), into, out_of), model, **inputs) > 1e-2, "the model as it came"
    plain = lncompile.plan(model, untie=True, **inputs).apply(copy.deepcopy(model))
    assert error(rotate(plain, into, out_of), model, **inputs) > 1e-2, "γ and β are in the way"
