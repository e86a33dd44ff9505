"""Programs as Python source, and what their statements call beside torch.

A :class:`Program` is a list of statements over a pool of live tensors; its parameters are statements of the
constructor. It prints as a class that can be pasted into a test, and Dynamo traces it as it would a user's.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

T = TypeVar("T")
Shape = tuple[int, ...]

F64 = torch.float64

# Largest number a drawn tensor may hold, and smallest variance that a norm's input may have: rounding errors of
# 1e-16 then stay far below the tolerance, however the operations are arranged.
LARGEST, SMALLEST_VARIANCE = 100.0, 1e-3
EXACT, ROUNDED = 1e-9, 2e-3


def values(seed: int, *shape: int) -> Tensor:
    """Numbers around 0.5: no mean is zero."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.5


def scales(seed: int, *shape: int) -> Tensor:
    """Numbers between 0.5 and 1.5, to multiply with and to divide by."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) + 0.5


def choices(seed: int, high: int, *shape: int) -> Tensor:
    """Whole numbers below ``high``."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def mask(seed: int, *shape: int) -> Tensor:
    """Truth values."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


def parameter(seed: int, *shape: int) -> nn.Parameter:
    """A weight of the scale of a sensible initialisation (matrices), with nonzero means along every axis."""
    return nn.Parameter(values(seed, *shape) / max(1, math.prod(shape[1:])) ** 0.5)


def randomised(seed: int, module: nn.Module) -> nn.Module:
    """A module of torch in float64 and evaluation mode whose parameters hide nothing."""
    module.double().eval()
    for index, buffer in enumerate(module.buffers()):
        if buffer.is_floating_point():
            buffer.copy_(scales(seed + index, *buffer.shape))
    for index, (name, weight) in enumerate(module.named_parameters()):
        new = parameter(seed + index, *weight.shape).detach()
        with torch.no_grad():
            weight.copy_(new if weight.dim() > 1 or "bias" in name else new * 0.3 + 0.9)
    return module


NAMESPACE: dict[str, Any] = {
    "F": functional, "choices": choices, "mask": mask, "nn": nn, "parameter": parameter, "prune": prune,
    "randomised": randomised, "scales": scales, "torch": torch, "values": values,
}  # fmt: skip


_numbers = itertools.count()


@dataclass(frozen=True, repr=False)
class Program:
    """One random module, as source.

    Attributes:
        setup: statements of the constructor.
        inputs: the forward's arguments, each with the expression that makes its value.
        statements: of the forward.
        outputs: names of the tensors it returns.
        tolerance: to which two ways of computing it agree, relative to the size of the numbers.
        options: of the backend.
        instructions: names of the instructions it was written by, for statistics.
        dynamic: whether it is compiled with dynamic shapes; sizes that a statement names are then found out again.
    """

    setup: tuple[str, ...]
    inputs: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]
    outputs: tuple[str, ...]
    tolerance: float = EXACT
    options: tuple[tuple[str, Any], ...] = ()
    instructions: tuple[str, ...] = ()
    dynamic: bool = False

    @property
    def source(self) -> str:
        """The class."""
        arguments = "".join(f", {name}" for name, _ in self.inputs)
        lines = ["class Drawn(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in self.setup]
        lines += ["", f"    def forward(self{arguments}):"]
        lines += [f"        {line}" for line in (*self.statements, f"return {', '.join(self.outputs)},")]
        return "\n".join(lines) + "\n"

    def build(self) -> nn.Module:
        """A new module; each has the same parameters."""
        # A file of its own for every class: Dynamo keeps what it knows of a code object by file and line.
        file = f"drawn_program_{next(_numbers)}.py"
        namespace = dict(NAMESPACE)
        exec(compile(self.source, file, "exec"), namespace)
        module: nn.Module = namespace["Drawn"]()
        return module.eval()

    def arguments(self) -> list[Tensor]:
        """New arguments; always the same values."""
        return [eval(expression, dict(NAMESPACE)) for _, expression in self.inputs]

    def __repr__(self) -> str:
        inputs = "".join(f"# {name} = {expression}\n" for name, expression in self.inputs)
        options = f"# options = {dict(self.options)}\n" if self.options else ""
        dynamic = "# dynamic shapes\n" if self.dynamic else ""
        return f"\n{self.source}\n{inputs}{options}{dynamic}"


class Unusable(Exception):
    """A write made numbers that are not usable, and cannot be taken back."""
