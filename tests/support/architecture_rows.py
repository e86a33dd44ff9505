"""What the tables of more models are written with: a row, inputs of many kinds, builders from nested configs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from architectures import Architecture, tokens
from torch import nn


@dataclass(frozen=True)
class Model(Architecture):
    """An architecture, with the counts that a rule still missing would give.

    Attributes:
        expected_later: (sites, folded, centerings) once the rule named beside it is there; None where nothing is
            known to be missing.
        wide: whether it only runs in float64 where that is the default dtype too (it makes constants of that).
    """

    expected_later: tuple[int, int, int] | None = None
    wide: bool = False

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in evaluation mode, randomised; batch norms with the statistics of its inputs.

        Without them the activations of a deep convolutional model overflow what its norms add to them.
        """
        model = super().model(dtype)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
        if norms:
            for norm in norms:
                norm.train()
                norm.momentum = 1.0
            with torch.no_grad():
                model(**self.inputs(dtype))
            model.eval()
        return model


Inputs = Callable[[torch.dtype], dict[str, Any]]


def noise(*shape: int, dtype: torch.dtype, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def floats(name: str, *shape: int, **others: Any) -> Inputs:
    """Inputs of one floating-point tensor, and others as they are."""

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {name: noise(*shape, dtype=dtype), **others}

    return inputs


def seq2seq(_: torch.dtype) -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=5, seed=3), "use_cache": False}


def both(*parts: Inputs) -> Inputs:
    """Inputs of several kinds together."""

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {name: value for part in parts for name, value in part(dtype).items()}

    return inputs


def fixed(**values: Any) -> Inputs:
    """Inputs that do not depend on the dtype."""
    return lambda _: dict(values)


def with_configs(class_name: str, config_name: str, parts: dict[str, tuple[str, dict[str, Any]]],
                 **config: Any) -> Callable[[], nn.Module]:  # fmt: skip
    """A builder of a model whose config contains others, as objects."""

    def build() -> nn.Module:
        objects = {key: getattr(transformers, name)(**values) for key, (name, values) in parts.items()}
        return getattr(transformers, class_name)(getattr(transformers, config_name)(**objects, **config))

    return build


def inner(module: str, class_name: str, config_name: str, **config: Any) -> Callable[[], nn.Module]:
    """A builder of a model that transformers does not export by name."""

    def build() -> nn.Module:
        found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        return getattr(found, class_name)(getattr(found, config_name)(**config))

    return build


def boxes(length: int = 7) -> torch.Tensor:
    corners = torch.tensor([[1, 2, 11, 14], [3, 5, 20, 9], [0, 0, 4, 6]])
    return corners[torch.arange(length) % 3].expand(2, length, 4).clone()


D4 = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
