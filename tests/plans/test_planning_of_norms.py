"""Plans of norms of other classes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from plan_models import WIDTH, Once, becomes, check, randomised, value
from torch import Tensor, nn
from torch.nn import functional

from lncompile.nn import RMSNorm


class Renamed(nn.Module):
    """γ and β under other names, computed in float32 or wider."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.layer_norm(hidden, (hidden.shape[-1],), self.gamma, self.beta, 1e-3)


class OnePlus(Renamed):
    """γ is one more than its parameter."""

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.layer_norm(hidden, (hidden.shape[-1],), self.gamma + 1, self.beta, 1e-3)


class Added(Renamed):
    """The norm, and its input."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + 2.0


class Handwritten(Renamed):
    """A norm written by hand."""

    def forward(self, hidden: Tensor) -> Tensor:
        mean = hidden.mean(-1, keepdim=True)
        variance = (hidden - mean).pow(2).mean(-1, keepdim=True)
        return self.gamma * ((hidden - mean) / torch.sqrt(variance + 1e-3)) + self.beta


class Wide(Renamed):
    """Computed in double precision, and returned in the dtype that came."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.float64)
        result = functional.layer_norm(wide, (hidden.shape[-1],), self.gamma.double(), self.beta.double(), 1e-3)
        return result.to(hidden.dtype)


NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer_norm": (lambda: nn.LayerNorm(WIDTH), "rms_norm"),
    "no_affine": (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), "rms_norm"),
    "no_bias": (lambda: nn.LayerNorm(WIDTH, bias=False), "rms_norm"),
    "renamed": (lambda: Renamed(WIDTH), "rms_norm"),
    "wide": (lambda: Wide(WIDTH), "rms_norm"),
    "one_plus": (lambda: OnePlus(WIDTH), "centered"),
    "added": (lambda: Added(WIDTH), "centered"),
    "handwritten": (lambda: Handwritten(WIDTH), "centered"),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_other_classes(name: str) -> None:
    make, outcome = NORMS[name]
    model = Once()
    model.norm = make()
    plan = check(randomised(model), 1, 1, (value(2, 3),))
    assert becomes(plan) == [outcome]
    if outcome == "rms_norm":
        (entry,) = plan.replace
        assert entry.eps == (1e-5 if "layer" in name or "no_" in name else 1e-3)
        assert isinstance(plan.apply(randomised(model)).norm, RMSNorm)


def test_a_norm_over_other_axes_stays_on_a_centered_stream() -> None:
    class ChannelsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, WIDTH, 3), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x).permute(0, 2, 3, 1))

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert becomes(check(randomised(ChannelsFirst()), 1, 1, (x,))) == ["rms_norm"], "permuted outside of the norm"

    class Inside(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), Inside(WIDTH))
    assert becomes(check(randomised(model), 1, 1, (x,))) == ["centered"]


def test_a_norm_with_a_hook_is_not_replaced() -> None:
    model = randomised(Once())
    model.norm.register_forward_hook(lambda module, args, output: None)
    assert becomes(check(model, 1, 1, (value(2, 3),))) == ["centered"]


class Named(nn.Module):
    """Calls its norm by the name of the argument."""

    def __init__(self, norm: nn.Module, name: str) -> None:
        super().__init__()
        self.linear, self.norm, self.name = nn.Linear(WIDTH, WIDTH), norm, name

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(**{self.name: self.linear(x)})


class WithOptions(nn.LayerNorm):
    """Takes a further argument that no example gives, and words that it passes over."""

    def forward(self, input: Tensor, residual: Tensor | None = None, **words: object) -> Tensor:
        return super().forward(input if residual is None else input + residual)


class Hidden(nn.LayerNorm):
    """With another name for what it normalises."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


@pytest.mark.parametrize(
    ("norm", "name", "outcome"),
    [
        (nn.LayerNorm, "input", "rms_norm"),
        (Hidden, "hidden_states", "rms_norm"),
        (WithOptions, "input", "centered"),
    ],
)
def test_norms_called_by_name(norm: type[nn.LayerNorm], name: str, outcome: str) -> None:
    model = randomised(Named(norm(WIDTH), name))
    plan = check(model, 1, 1, (value(2, 3),))
    assert becomes(plan) == [outcome]
    folded = plan.apply(copy.deepcopy(model))
    if outcome == "rms_norm":
        assert plan.replace[0].argument == name
        with pytest.raises(TypeError, match=f"takes one tensor, by position or as '{name}'"):
            folded.norm(value(2, 3), residual=value(2, 3))
        with pytest.raises(TypeError, match="takes one tensor"):
            folded.norm()
    else:
        assert "can be called with several arguments" in plan.norms[0].detail
        x, y = value(2, 3), value(2, 3, seed=1)
        centered = model.linear(x) - model.linear(x).mean(-1, keepdim=True)
        torch.testing.assert_close(folded.norm(centered, y, word=1), model.norm(centered, y), rtol=1e-10, atol=1e-10)
