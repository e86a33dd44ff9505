"""Random modules out of the whole op set, written out as Python source.

A drawn :class:`Program` is a list of instructions over a pool of live tensors, each one statement of Python; its
parameters are statements of the constructor. It prints as a class that can be pasted into a test, and Dynamo traces it
as it would a user's. While a program is drawn every statement is run in float64, so that shapes are known, and what
torch refuses, what explodes, and norms of all but constant rows are left out by construction.

The drawing leans towards what folds (sources, operations that commute with the centering, residual blocks) and strews
traps between: operations that do not commute, readers that notice, joins and cuts along the features, in-place writes
under many names, shared and written parameters.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

T = TypeVar("T")
Shape = tuple[int, ...]

F64 = torch.float64
# Largest number a drawn tensor may hold, and smallest variance that a norm's input may have: rounding errors of
# 1e-16 then stay far below the tolerance, however the operations are arranged.
LARGEST, SMALLEST_VARIANCE = 100.0, 1e-3
EXACT, ROUNDED = 1e-9, 2e-3


# --- what the programs' statements call, beside torch -------------------------------------------------------------------


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
    for index, (name, weight) in enumerate(module.named_parameters()):
        new = parameter(seed + index, *weight.shape).detach()
        with torch.no_grad():
            weight.copy_(new if weight.dim() > 1 or "bias" in name else new * 0.3 + 0.9)
    return module


NAMESPACE: dict[str, Any] = {
    "F": functional, "choices": choices, "mask": mask, "nn": nn, "parameter": parameter, "randomised": randomised,
    "scales": scales, "torch": torch, "values": values,
}  # fmt: skip


# --- a program -----------------------------------------------------------------------------------------------------------

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
    """

    setup: tuple[str, ...]
    inputs: tuple[tuple[str, str], ...]
    statements: tuple[str, ...]
    outputs: tuple[str, ...]
    tolerance: float = EXACT
    options: tuple[tuple[str, Any], ...] = ()
    instructions: tuple[str, ...] = ()

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
        return f"\n{self.source}\n{inputs}{options}"


class Unusable(Exception):
    """A write made numbers that are not usable, and cannot be taken back."""


_TENSOR = re.compile(r"\b[uv]\d+\b")


class Writer:
    """Writes a program statement by statement and runs each at once.

    Attributes:
        live: names of the tensors that later statements may use.
        streams: those of them that are made by sources and commuting operations alone, as far as the writer cares.
        norms: outputs of norms; returned where nothing else reads them, or they would be no part of the graph.
    """

    def __init__(self, below: Callable[[int], int]) -> None:
        self._below = below
        self.setup: list[str] = []
        self.inputs: dict[str, str] = {}
        self.statements: list[str] = []
        self.instructions: list[str] = []
        self.live: list[str] = []
        self.streams: set[str] = set()
        self.norms: set[str] = set()
        self.read: set[str] = set()
        self.tolerance = EXACT
        self.batch = self.pick([2, 2, 1])
        self.length = self.pick([5, 4, 6])
        self.width = self.pick([12, 12, 8, 6, 4])
        self._seeds = itertools.count(1)
        self._numbers = itertools.count()
        self._module = nn.Module()
        self._names: dict[str, Any] = {**NAMESPACE, "self": self._module}
        self._parameters: list[str] = []
        self._modules: dict[str, str] = {}

    # --- drawing ---

    def pick(self, options: Sequence[T]) -> T:
        """One of the options; shrinks to the first."""
        return options[self._below(len(options))]

    def chance(self, n: int) -> bool:
        """True once in n times."""
        return self._below(n) == n - 1

    def order(self, n: int) -> list[int]:
        """The numbers below n in some order; shrinks to the natural one."""
        left = list(range(n))
        return [left.pop(self._below(len(left))) for _ in range(n)]

    def number(self) -> str:
        """A number, small and not zero, whole or not."""
        return self.pick(["2", "0.5", "-1.5", "3", "-0.25"])

    # --- tensors ---

    def tensor(self, name: str) -> Tensor:
        """The value of a live tensor."""
        value = self._names[name]
        assert isinstance(value, Tensor)
        return value

    def shape(self, name: str) -> Shape:
        """Its shape."""
        return tuple(self.tensor(name).shape)

    def some(self, accept: Callable[[Tensor], bool] = lambda _: True, stream: bool | None = None) -> str | None:
        """A live floating-point tensor, mostly one of the latest; with ``stream``, mostly of that kind."""
        names = [n for n in self.live if self.tensor(n).is_floating_point() and accept(self.tensor(n))]
        if stream is not None:
            preferred = [n for n in names if (n in self.streams) == stream]
            if preferred and not self.chance(5):
                names = preferred
        if not names:
            return None
        names.reverse()
        return self.pick(names[:3]) if not self.chance(3) else self.pick(names)

    def like(self, name: str) -> str:
        """A tensor that can be added to the named one: live or new, of its shape or broadcast to it."""
        shape = self.shape(name)

        def fits(tensor: Tensor) -> bool:
            try:
                return tuple(torch.broadcast_shapes(tuple(tensor.shape), shape)) == shape
            except RuntimeError:
                return False

        found = self.some(fits, stream=True)
        kind = self.pick(["live", "live", "parameter", "expression", "number", "input"])
        if kind == "live" and found is not None:
            return found
        if kind == "number":
            return self.number()
        if kind == "input" and self.chance(3):
            return self.input(f"values({{}}, {self._sizes(self.broadcast(shape, features=1))})")
        if kind == "expression":
            return self.weight(self.broadcast(shape))
        return self.parameter(self.broadcast(shape))

    def broadcast(self, shape: Shape, features: int | None = None) -> Shape:
        """A shape that broadcasts to this one: leading axes dropped, others 1; the last one is ``features`` if given."""
        new = [1 if self.chance(3) else size for size in shape]
        if shape:
            new[-1] = features if features is not None else (1 if self.chance(6) else shape[-1])
        return tuple(new[self.pick(range(len(shape))) if shape and self.chance(2) else 0 :])

    def input(self, expression: str) -> str:
        """A new argument of the forward. ``{}`` in the expression stands for a seed."""
        name = f"u{len(self.inputs)}"
        self.inputs[name] = expression.format(next(self._seeds))
        self._names[name] = eval(self.inputs[name], dict(NAMESPACE))
        return name

    def gate(self, name: str) -> str:
        """Something to multiply a tensor with that is mostly constant along the features."""
        shape = self.shape(name)
        kind = self.pick(["number", "input", "parameter", "computed", "scalar"])
        if kind == "input":
            return self.input(f"scales({{}}, {self._sizes(self.broadcast(shape, features=1))})")
        if kind == "parameter":
            return self.parameter(self.broadcast(shape, features=1), "scales")
        if kind == "computed" and (source := self.some(lambda t: t.shape[:-1] == shape[:-1] and t.dim() > 0)):
            return f"torch.sigmoid({source}.mean(-1, keepdim=True))"
        if kind == "scalar":
            return self.parameter((), "scales")
        return self.number()

    # --- parameters ---

    def parameter(self, shape: Shape, kind: str = "parameter") -> str:
        """A parameter or buffer of a shape: new, one that is there already, or a second one on its storage."""
        same = [p for p in self._parameters if tuple(self._attribute(p).shape) == shape]
        if same and self.chance(3):
            return self.pick(same)
        seed, sizes = next(self._seeds), self._sizes(shape)
        name = f"p{len(self._parameters)}"
        plain = f"self.{name} = {'parameter' if kind == 'parameter' else 'nn.Parameter(scales'}({seed}, {sizes})"
        plain += ")" if kind != "parameter" else ""
        options = [plain, plain, plain, plain, f"self.register_buffer('{name}', {kind_of(kind)}({seed}, {sizes}))"]
        if same:
            options += [f"self.{name} = nn.Parameter({self.pick(same)}.detach())"]
        if len(shape) == 2:
            transposed = self._sizes(shape[::-1])
            options += [f"self.{name} = nn.Parameter({kind_of(kind)}({seed}, {transposed}).t() / {shape[1]}**0.5)"]
        if shape:
            larger = self._sizes((*shape[:-1], shape[-1] + 2))
            options += [f"self.{name} = nn.Parameter({kind_of(kind)}({seed}, {larger})[..., 1:-1])"]
        self._set_up(self.pick(options))
        self._parameters.append(f"self.{name}")
        return f"self.{name}"

    def weight(self, shape: Shape) -> str:
        """A parameter of a shape, or an expression of parameters."""
        plain = self.parameter
        options: list[Callable[[], str]] = [
            lambda: plain(shape), lambda: plain(shape), lambda: plain(shape),
            lambda: f"({plain(shape)} * {self.number()})",
            lambda: f"({plain(shape)} / {self.parameter((), 'scales')})",
            lambda: f"({plain(shape)} + {plain(self.broadcast(shape))})",
            lambda: f"({plain(shape)} * {plain(self.broadcast(shape), 'scales')})",
            lambda: f"(-{plain(shape)})",
            lambda: f"{plain(shape)}.clone()",
            lambda: f"{plain(shape)}.detach().to(torch.float64)",
            lambda: f"torch.cat(({plain(shape)}, {plain(shape)}))[{':' + str(shape[0]) if shape else '0'}]",
            lambda: f"({plain(shape)} * {self.gate_without_features()})",
            lambda: f"torch.tanh({plain(shape)})",
        ]  # fmt: skip
        if len(shape) >= 1:
            rows, rest = shape[0], shape[1:]
            options += [
                lambda: f"{plain((rows + 2, *rest))}[1:-1]",
                lambda: f"{plain((rows * 2, *rest))}.split({rows})[1]",
                lambda: f"{plain((rows * 2, *rest))}.chunk(2)[0]",
                lambda: f"{plain((2, rows, *rest))}.unbind(0)[1]",
                lambda: f"{plain((2, rows, *rest))}[1]",
                lambda: f"{plain((2, rows, *rest))}.select(0, 1)",
                lambda: f"{plain((math.prod(shape),))}.view({self._sizes(shape)})",
                lambda: f"{plain((rows + 1, *rest))}.narrow(0, 1, {rows})",
                lambda: f"{plain((1, *rest))}.expand({self._sizes(shape)})",
            ]
        if len(shape) == 2:
            options += [lambda: f"{plain(shape[::-1])}.t()", lambda: f"{plain(shape[::-1])}.mT"]
        return self.pick(options)()

    def gate_without_features(self) -> str:
        """A number computed at run time."""
        source = self.some()
        return f"torch.sigmoid({source}.mean())" if source else self.number()

    def module(self, expression: str) -> str:
        """A module of torch, new or used before."""
        if expression in self._modules and self.chance(2):
            return self._modules[expression]
        name = f"self.m{len(self.setup)}"
        self._set_up(f"{name} = randomised({next(self._seeds)}, {expression})")
        self._modules[expression] = name
        return name

    def any_parameter(self, accept: Callable[[Tensor], bool] = lambda _: True) -> str | None:
        """A parameter or buffer that is there already."""
        found = [p for p in self._parameters if accept(self._attribute(p))]
        return self.pick(found) if found else None

    def _attribute(self, name: str) -> Tensor:
        value = getattr(self._module, name.removeprefix("self."))
        assert isinstance(value, Tensor)
        return value

    def _set_up(self, statement: str) -> None:
        exec(statement, self._names)
        self.setup.append(statement)

    @staticmethod
    def _sizes(shape: Iterable[int]) -> str:
        return ", ".join(map(str, shape)) if shape else "*()"

    # --- statements ---

    def let(self, expression: str, stream: bool = False) -> str | None:
        """Add ``v = expression`` and return v; None where torch refuses it or the numbers are not usable."""
        name = f"v{next(self._numbers)}"
        state = torch.get_rng_state()
        try:
            value = eval(expression, self._names)
        except (RuntimeError, IndexError, ValueError, TypeError):
            torch.set_rng_state(state)
            return None
        if not (isinstance(value, Tensor) and usable(value)):
            torch.set_rng_state(state)
            return None
        self._names[name] = value
        self.statements.append(f"{name} = {expression}")
        self.read.update(_TENSOR.findall(expression))
        self.live.append(name)
        if stream:
            self.streams.add(name)
        return name

    def do(self, statement: str, target: str) -> bool:
        """Add a statement that writes to a live tensor or a parameter; False where torch refuses it."""
        try:
            exec(statement, self._names)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        value = self._names[target] if target in self._names else self._attribute(target)
        if not usable(value):
            raise Unusable
        self.statements.append(statement)
        self.read.update(set(_TENSOR.findall(statement)) - {target})
        return True

    def commuting(self, name: str, expression: str) -> str | None:
        """Add an operation that keeps a stream a stream."""
        return self.let(expression, stream=name in self.streams)

    def forget(self, name: str) -> None:
        """Let no later statement use a tensor."""
        self.live.remove(name)
        self.read.add(name)

    def program(self, outputs: Sequence[str], options: dict[str, Any]) -> Program:
        """What was written."""
        return Program(
            tuple(self.setup), tuple(self.inputs.items()), tuple(self.statements), tuple(outputs), self.tolerance,
            tuple(options.items()), tuple(self.instructions),
        )  # fmt: skip


def kind_of(kind: str) -> str:
    """The function that makes the values of a parameter."""
    return "values" if kind == "parameter" else kind


def usable(value: Tensor) -> bool:
    """Whether a tensor is not empty, finite and of moderate size."""
    if value.numel() == 0 or value.numel() > 4000 or value.is_complex():
        return False
    if not value.is_floating_point():
        return True
    return bool(value.isfinite().all()) and float(value.detach().abs().max()) <= LARGEST


# --- instructions --------------------------------------------------------------------------------------------------------

Instruction = Callable[[Writer], object]
INSTRUCTIONS: dict[str, list[Instruction]] = {}


def instruction(kind: str, weight: int = 1) -> Callable[[Instruction], Instruction]:
    """Register a function that adds one or more statements (or none, where nothing fits)."""

    def register(function: Instruction) -> Instruction:
        INSTRUCTIONS.setdefault(kind, []).extend([function] * weight)
        return function

    return register


# Sources: the parameters absorb the centering.


@instruction("source", 4)
def linear(w: Writer) -> str | None:
    """A linear layer in one of its spellings."""
    h = w.some(lambda t: t.dim() >= 2 and t.shape[-1] > 1, stream=False)
    if h is None:
        return None
    *lead, k = w.shape(h)
    out = w.width
    rows = f"{h}.reshape({math.prod(lead)}, {k})"
    back = ", ".join(map(str, (*lead, out)))
    rank = len(lead) + 1

    def bias() -> str:
        return w.pick([w.weight, w.parameter])((out,)) if not w.chance(8) else w.parameter((1,))

    spellings: list[Callable[[], str]] = [
        lambda: f"F.linear({h}, {w.weight((out, k))}, {bias()})",
        lambda: f"F.linear({h}, {w.weight((out, k))})",
        lambda: f"{w.module(f'nn.Linear({k}, {out})')}({h})",
        lambda: f"{w.module(f'nn.Linear({k}, {out}, bias=False)')}({h})",
        lambda: f"{h} @ {w.weight((k, out))}",
        lambda: f"torch.matmul({h}, {w.parameter((out, k))}.t()) + {bias()}",
        lambda: f"torch.addmm({bias()}, {rows}, {w.weight((k, out))}).view({back})",
        lambda: f"torch.addmm({bias()}, {rows}, {w.parameter((k, out))}, beta=0.5, alpha=2).view({back})",
        lambda: f"torch.addmm({w.parameter((math.prod(lead), 1))}, {rows}, {w.parameter((k, out))}).view({back})",
        lambda: f"torch.ops.aten.linear.default({h}, {w.parameter((out, k))}, {bias()})",
        lambda: f"torch.einsum('...k,ko->...o', {h}, {w.parameter((k, out))})",
    ]
    if rank == 3:
        spellings += [
            lambda: f"torch.bmm({h}, {w.weight((lead[0], k, out))})",
            lambda: f"torch.baddbmm({w.parameter(w.broadcast((*lead, out)))}, {h}, {w.parameter((lead[0], k, out))})",
        ]
    return w.let(w.pick(spellings)(), stream=True)


@instruction("source")
def embedding(w: Writer) -> str | None:
    """An embedding, its table perhaps tied to a weight that is there already."""
    tied = w.any_parameter(lambda p: p.dim() == 2 and p.shape[1] == w.width)
    table = tied if tied is not None and w.chance(2) else w.parameter((7, w.width))
    rows = w._attribute(table).shape[0]
    ids = w.input(f"choices({{}}, {rows}, {w.batch}, {w.length})")
    spelling = w.pick([
        f"F.embedding({ids}, {table})", f"F.embedding({ids}, {table}, padding_idx=0)", f"{table}[{ids}]",
        f"F.embedding_bag({ids}, {table}, mode='{w.pick(['mean', 'sum', 'max'])}')",
        f"F.embedding_bag({ids}, {table}, mode='sum', per_sample_weights={table}.new_full({ids}.shape, 0.5))",
        f"torch.embedding({table}, {ids})", f"F.embedding({ids}[0], {table})", f"F.embedding({ids}, {table}, max_norm=1.0)",
        f"F.embedding({ids}, weight={table}, max_norm=1.0)", f"F.embedding_bag({ids}, {table}, max_norm=1.0)",
    ][: 10 if w.chance(4) else 6])  # fmt: skip
    return w.let(spelling, stream=True)


@instruction("source")
def tied_head(w: Writer) -> str | None:
    """A weight that is there already, as the weight of another layer: its rows or columns read raw or centered."""
    weight = w.any_parameter(lambda p: p.dim() == 2)
    if weight is None:
        return None
    out, k = w._attribute(weight).shape
    spelling = w.pick(["F.linear({}, {})", "{} @ {}"])
    size = k if spelling.startswith("F") else out
    h = w.some(lambda t: t.dim() >= 2 and t.shape[-1] == size)
    return None if h is None else w.let(spelling.format(h, weight), stream=True)


@instruction("source")
def convolution(w: Writer) -> str | None:
    """A convolution over tokens or pixels, perhaps grouped, its channels perhaps moved to the end."""
    groups = w.pick([1, 1, 1, 2, w.width])
    channels = w.pick([2, 4]) if groups != w.width else w.width
    channels = channels if channels % groups == 0 else groups
    weight = w.parameter((w.width, channels // groups, 3))
    bias = w.pick([w.parameter((w.width,)), "None"])
    if w.chance(2):
        weight = w.parameter((w.width, channels // groups, 2, 2))
        x = w.input(f"values({{}}, {w.batch}, {channels}, 4, 4)")
        y = w.let(f"F.conv2d({x}, {weight}, {bias}, stride=2, groups={groups})", stream=True)
        moved = f"{y}.flatten(2).transpose(1, 2)"
    else:
        x = w.some(lambda t: t.dim() == 3 and t.shape[1] == channels and t.shape[2] > 2, stream=False)
        x = x or w.input(f"values({{}}, {w.batch}, {channels}, {w.length})")
        y = w.let(f"F.conv1d({x}, {weight}, {bias}, padding=1, groups={groups})", stream=True)
        moved = f"{y}.transpose(1, 2)"
    if y is None or w.chance(4):
        return y
    return w.let(moved, stream=True)


@instruction("source")
def transposed_convolution(w: Writer) -> str | None:
    """A transposed convolution over the tokens, perhaps grouped."""
    x = w.some(lambda t: t.dim() == 3 and t.shape[1] % 2 == 0, stream=False)
    x = x or w.input(f"values({{}}, {w.batch}, 4, 3)")
    groups, channels = w.pick([1, 1, 2]), w.shape(x)[1]
    weight, bias = w.parameter((channels, w.width // groups, 2)), w.pick([w.parameter((w.width,)), "None"])
    y = w.let(f"F.conv_transpose1d({x}, {weight}, {bias}, groups={groups})", stream=True)
    return y if y is None or w.chance(4) else w.let(f"{y}.transpose(1, 2)", stream=True)


@instruction("source")
def module(w: Writer) -> str | None:
    """Modules of torch whose parameters are expressions, or part of a larger operator."""
    h = w.some(lambda t: t.dim() == 3 and t.shape[-1] > 1, stream=False)
    if h is None:
        return None
    k = w.shape(h)[-1]
    heads = 2 if k % 2 == 0 else 1
    parametrised = f"nn.utils.parametrizations.weight_norm(nn.Linear({k}, {w.width}))"
    attention_ = w.pick([f"nn.MultiheadAttention({k}, {heads}, batch_first=True)", f"nn.MultiheadAttention({k}, 1)"])
    spelling = w.pick([
        lambda: f"{w.module(parametrised)}({h})", lambda: f"{w.module(attention_)}({h}, {h}, {h})[0]",
        lambda: f"(n := {w.module(attention_)}({h}, {h}, {h}))[0] + 0.1 * n[1].mean()",
        lambda: f"{w.module(attention_)}({h}, {h}, {h}, need_weights=False)[0]",
    ])  # fmt: skip
    return w.let(spelling(), stream=True)


@instruction("source")
def bare_parameter(w: Writer) -> str | None:
    """A parameter, or an expression of parameters, as a stream: positions, class tokens."""
    shape = w.pick([(w.length, w.width), (w.batch, w.length, w.width), (1, 1, w.width), (w.width,)])
    expression = w.weight(shape)
    return w.let(expression, stream=True)


@instruction("source")
def class_token(w: Writer) -> str | None:
    """A parameter in front of the tokens."""
    x = w.some(lambda t: t.dim() == 3, stream=True)
    if x is None:
        return None
    batch, _, width = w.shape(x)
    return w.commuting(x, f"torch.cat(({w.parameter((1, 1, width))}.expand({batch}, -1, -1), {x}), 1)")


# Operations that commute with the centering along some axes. Where they work along the features they are traps.


@instruction("commuting", 5)
def addition(w: Writer) -> str | None:
    """A residual: plus, minus, with alpha, in every spelling."""
    x = w.some(stream=True)
    if x is None:
        return None
    y = w.like(x)
    spelling = w.pick([
        "{x} + {y}", "{y} + {x}", "{x} - {y}", "{y} - {x}", "torch.add({x}, {y}, alpha={n})", "{x}.sub({y}, alpha={n})",
        "torch.rsub({x}, {y})", "torch.sub({y}, {x}, alpha={n})", "{x}.add({y})",
    ])  # fmt: skip
    return w.commuting(x, spelling.format(x=x, y=y, n=w.number()))


@instruction("commuting", 2)
def scaling(w: Writer) -> str | None:
    """A product with a number or a gate."""
    x = w.some(lambda t: t.dim() > 0, stream=True)
    if x is None:
        return None
    gate = w.gate(x)
    spelling = w.pick(["{x} * {g}", "{g} * {x}", "torch.mul({x}, {g})", "{x} / {g}", "{x}.div({g})"])
    return w.commuting(x, spelling.format(x=x, g=gate))


@instruction("commuting")
def expanded_gate(w: Writer) -> str | None:
    """A gate that has the shape of what it multiplies and is constant along the features, unless written to."""
    x = w.some(lambda t: t.dim() > 0, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    row = w.input(f"scales({{}}, {w._sizes((*shape[:-1], 1))})")
    expanded, repeated = (
        f"{row}.expand({w._sizes(shape)})",
        f"{row}.repeat({w._sizes((*[1] * (len(shape) - 1), shape[-1]))})",
    )
    gate = w.let(w.pick([expanded, f"{expanded}.clone()", repeated, f"{expanded} * 2", f"{expanded}.sigmoid()"]))
    if gate is None:
        return None
    if w.chance(3):
        w.do(w.pick([f"{gate}[..., 0] = 0.7", f"{gate} *= {x}.abs().clamp(0.5, 1)", f"{gate}[:1] = 0.7"]), gate)
    return w.commuting(
        x, w.pick([f"{x} * {gate}", f"{gate} * {x}", f"{x} / {gate}", f"torch.lerp({x}, {x} + 1, {gate})"])
    )


@instruction("commuting", 2)
def layer_scale(w: Writer) -> str | None:
    """A product with a parameter along the features, perhaps straight after a linear layer."""
    x = linear(w) if not w.chance(3) else w.some(lambda t: t.dim() > 0, stream=True)
    if x is None:
        return None
    if w.chance(3):
        x = w.let(w.pick([
            "F.dropout({}, 0.1, False)", "{}.to(torch.float64)", "{0}.view({0}.shape)", "{}.to(torch.int64).to(torch.float64)",
            "F.relu({})", "{}.clone()",
        ]).format(x), stream=True) or x  # fmt: skip
    width = w.shape(x)[-1]
    scale = w.parameter(w.pick([(width,), (1, width), (1, 1, width)]))
    return w.let(w.pick(["{x} * {s}", "{s} * {x}", "torch.mul({x}, {s})"]).format(x=x, s=scale), stream=True)


@instruction("commuting")
def unary(w: Writer) -> str | None:
    """Negations, copies and casts."""
    x = w.some(stream=True)
    if x is None:
        return None
    other = w.some()
    spelling = w.pick([
        "-{}", "torch.neg({})", "torch.positive({})", "{}.clone()", "{}.contiguous()", "{}.detach()", "{}.double()",
        "{}.to(torch.float64)", "{}.to(dtype=torch.float64, copy=True)", f"{{}}.type_as({other})", f"{{}}.to({other})",
        "F.dropout({}, 0.3, training=False)", "F.dropout({}, 0.0, training=True)", "{}.float().double()",
    ])  # fmt: skip
    if "float()" in spelling:
        w.tolerance = ROUNDED
    return w.commuting(x, spelling.format(x))


@instruction("commuting")
def masking(w: Writer) -> str | None:
    """A mask, mostly constant along the features."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    features = None if w.chance(4) else 1
    truth = w.input(f"mask({{}}, {w._sizes(w.broadcast(w.shape(x), features=features))})")
    if w.chance(2):
        truth += w.pick([f".expand_as({x})", f".expand({w._sizes(w.shape(x))}).logical_not()", ".clone()"])
    y = w.like(x)
    spelling = w.pick(["torch.where({m}, {x}, {y})", "torch.where({m}, {y}, {x})", "{x}.masked_fill({m}, {n})",
                       "{x} * {m}"])  # fmt: skip
    return w.commuting(x, spelling.format(m=truth, x=x, y=y, n=w.number()))


@instruction("commuting", 3)
def view(w: Writer) -> str | None:
    """A view of the same elements: features cut into heads, merged again, any other cut."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    last = shape[-1]
    options: list[Callable[[], str]] = [
        lambda: f"{x}.unsqueeze({w.pick(range(-1, len(shape) + 1))})",
        lambda: f"torch.squeeze({x})" if not w.chance(2) else f"{x}.squeeze({w.pick(range(len(shape)))})",
        lambda: f"{x}.{w.pick(['view', 'reshape'])}({w._sizes(_recut(w, shape))})",
        lambda: f"torch.reshape({x}, ({w._sizes(_recut(w, shape))},))",
        lambda: f"{x}.view_as(torch.empty({w._sizes(_recut(w, shape))}))",
    ]
    heads = [h for h in (2, 3, 4) if last % h == 0 and last > h]
    if heads:
        h = w.pick(heads)
        options += [
            lambda: f"{x}.view({w._sizes((*shape[:-1], h, last // h))})",
            lambda: f"{x}.unflatten(-1, ({h}, {last // h}))",
        ] * 2
    if len(shape) >= 2:
        options += [
            lambda: f"{x}.flatten(0, 1)",
            lambda: f"{x}.reshape(-1, {last})",
            lambda: f"torch.flatten({x}, -2)",
        ]
    expression = w.pick(options)()
    return w.commuting(x, expression)


def _recut(w: Writer, shape: Shape) -> Shape:
    """Another shape of as many elements: the prime factors in their order, cut anew."""
    primes = [p for size in shape for p in _primes(size)]
    new = [1]
    for prime in primes:
        if w.chance(2):
            new.append(prime)
        else:
            new[-1] *= prime
    return tuple(new)


def _primes(number: int) -> list[int]:
    factors = []
    for prime in (2, 3, 5, 7):
        while number % prime == 0:
            factors.append(prime)
            number //= prime
    return factors + ([number] if number > 1 else [])


@instruction("commuting", 3)
def permutation(w: Writer) -> str | None:
    """Dimensions in another order."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    rank = len(w.shape(x))
    order = w.order(rank)
    first, second = w.pick(range(rank)), w.pick(range(rank))
    spelling = w.pick([
        f"{x}.transpose(-1, -2)", f"{x}.transpose({first}, {second})", f"{x}.permute({w._sizes(order)})",
        f"torch.permute({x}, ({w._sizes(order)}))", f"{x}.mT", f"torch.movedim({x}, {first}, {second})",
        f"{x}.swapaxes({first}, {second})", f"{x}.T" if rank == 2 else f"{x}.mT", f"{x}.transpose(0, 1)",
    ])  # fmt: skip
    return w.commuting(x, spelling)


def _axis(w: Writer, rank: int) -> int:
    """An axis, mostly not the last one."""
    return w.pick(range(rank - 1)) if rank > 1 and not w.chance(5) else rank - 1


@instruction("commuting", 3)
def cut(w: Writer) -> str | None:
    """Splits, chunks, slices and indices along an axis."""
    x = w.some(lambda t: t.dim() >= 1 and max(t.shape) > 1, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    axis = _axis(w, len(shape))
    size = shape[axis]
    if size < 2:
        return None
    at = w.pick(range(1, size))
    colons = ":, " * axis
    options: list[Callable[[], str]] = [
        lambda: f"{x}[{colons}{at}:]",
        lambda: f"{x}[{colons}:{at}]",
        lambda: f"{x}[{colons}{at}]",
        lambda: f"{x}[{colons}::2]",
        lambda: f"{x}[{colons}None]",
        lambda: f"{x}[..., {at}:{', :' * (len(shape) - axis - 1)}]",
        lambda: f"{x}.narrow({axis}, 1, {at})" if at < size else x,
        lambda: f"{x}.select({axis}, {at})",
        lambda: f"torch.split({x}, [{at}, {size - at}], dim={axis})[{w.pick([0, 1])}]",
        lambda: f"{x}.chunk(2, {axis})[{w.pick([0, 1])}]",
        lambda: f"torch.unbind({x}, {axis})[{at}]",
        lambda: f"torch.ops.aten.slice.Tensor({x}, {axis}, 0, {at})",
        lambda: f"torch.index_select({x}, {axis}, {w.input(f'choices({{}}, {size}, 3)')})",
        lambda: f"{x}[{colons}{w.input(f'choices({{}}, {size}, 2)')}]",
        lambda: f"{x}[{colons}{w.input(f'choices({{}}, {size}, 2, 2)')}]",
        lambda: f"{x}[{colons}{w.input(f'mask({{}}, {size})')} | True].sum({axis}, keepdim=True)",
        lambda: f"torch.gather({x}, {axis}, {w.input(f'choices({{}}, {size}, {w._sizes(shape)})')})",
    ]
    if axis + 1 < len(shape):
        rows = "{}, " + f"{size}, 2", "{}, " + f"{shape[axis + 1]}, 2"
        options += [
            lambda: f"{x}[{colons}{w.input(f'choices({rows[0]})')}, {w.input(f'choices({rows[1]})')}]",
            lambda: f"{x}[{colons}0, {w.input(f'choices({rows[1]})')}]",
            lambda: f"{x}[{colons}{w.input(f'choices({rows[0]})')}, :, None]",
            lambda: f"{x}[{colons}{w.input(f'choices({rows[0]})')}, 0]",
        ]
    return w.commuting(x, w.pick(options)())


@instruction("commuting", 2)
def join(w: Writer) -> str | None:
    """Concatenations and stacks along an axis."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    axis = _axis(w, len(shape))
    y = w.some(lambda t: tuple(t.shape) == shape, stream=True)
    y = y if y is not None and not w.chance(4) else w.weight(shape)
    spelling = w.pick([f"torch.cat(({x}, {y}), dim={axis})", f"torch.cat([{y}, {x}], {axis - len(shape)})",
                       f"torch.stack(({x}, {y}), {axis})", f"torch.stack([{x}, {y}, {x}], dim={axis})",
                       f"torch.concat(({x}, {x}), {axis})"])  # fmt: skip
    return w.commuting(x, spelling)


@instruction("commuting", 2)
def spread(w: Writer) -> str | None:
    """Expand, repeat, roll and flip."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    axis = _axis(w, len(shape))
    times = [2 if i == axis else 1 for i in range(len(shape))]
    wide = [3 if size == 1 else size for size in shape]
    spelling = w.pick([
        f"{x}.roll(1, {axis})", f"torch.roll({x}, (1, 2), dims=({axis}, 0))", f"torch.flip({x}, [{axis}])", f"{x}.roll(1)",
        f"{x}.repeat({w._sizes(times)})", f"{x}.repeat(2, {w._sizes([1] * len(shape))})", f"{x}.expand({w._sizes(wide)})",
        f"{x}.expand(2, {w._sizes(shape)})", f"{x}.expand(-1, {w._sizes(shape[1:])})" if shape[1:] else f"{x}.tile(2)",
    ])  # fmt: skip
    return w.commuting(x, spelling)


@instruction("commuting", 2)
def reduction(w: Writer) -> str | None:
    """Sums and means over an axis, mostly not the features."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    rank = len(w.shape(x))
    axis = _axis(w, rank)
    spelling = w.pick([
        f"{x}.mean({axis})", f"{x}.mean({axis}, keepdim=True)", f"{x}.sum(dim=({axis},), keepdim=True)",
        f"torch.sum({x}, {axis})", f"{x}.mean((0, {axis}), True)" if axis else f"{x}.mean((0,))",
        f"torch.mean({x}, {axis}, dtype=torch.float64)", f"{x}.cumsum({axis})",
    ])  # fmt: skip
    return w.commuting(x, spelling)


@instruction("commuting", 2)
def mixing(w: Writer) -> str | None:
    """A product from the left: attention's ``P @ v``, token mixing."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    *lead, rows, width = w.shape(x)
    square = w._sizes((*lead, rows, rows))
    options: list[Callable[[], str]] = [
        lambda: f"torch.softmax({w.input(f'values({{}}, {square})')}, -1) @ {x}",
        lambda: f"{w.weight((rows, rows))} @ {x}",
        lambda: f"torch.matmul({w.parameter((3, rows))}, {x})",
        lambda: f"F.linear({x}.mT, {w.weight((rows, rows))}, {w.parameter((rows,))}).mT",
        lambda: f"F.linear({x}.transpose(-1, -2), {w.parameter((rows + 1, rows))}).transpose(-1, -2)",
        lambda: f"torch.softmax({x} @ {x}.mT / {width}, -1) @ {x}",
        lambda: f"F.scaled_dot_product_attention({x}, {x}, {x})",
    ]
    return w.commuting(x, w.pick(options)())


@instruction("commuting", 2)
def resampling(w: Writer) -> str | None:
    """Pooling, interpolation, padding, running sums and gathers along another axis, seldom along the features."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    axis = _axis(w, len(shape))
    size, last = shape[axis], shape[-1]
    y = w.some(lambda t: tuple(t.shape) == shape, stream=True)
    part = last // 2 if w.chance(3) else last
    lead = shape[:-1]
    options: list[Callable[[], str]] = [
        lambda: f"F.pad({x}, (0, 0, 1, 2))",
        lambda: f"F.pad({x}, (0, 0, 1, 0), value=1.5)",
        lambda: f"F.pad({x}, (0, 0, -1, 0), 'constant', 2.0)",
        lambda: f"F.pad({x}, (1, 0))",
        lambda: f"{x}.cumsum({axis}) * 0.5",
        lambda: f"torch.repeat_interleave({x}, 2, dim={axis})",
        lambda: f"{x}.repeat_interleave({w.input(f'choices({{}}, 1, {size})')} + 2, {axis}, output_size={2 * size})",
        lambda: f"{x}.index_add({axis}, {w.input(f'choices({{}}, {size}, {size})')}, {y}, alpha={w.number()})",
        lambda: (
            f"{x}.gather(-2, {w.input(f'choices({{}}, {shape[-2]}, {w._sizes((*lead, 1))})')}.expand(*{lead}, {part}))"
        ),
        lambda: f"torch.lerp({x}, {y}, {w.number()})",
        lambda: f"torch.lerp({x}, {y}, {w.parameter((last,) if w.chance(3) else (1,), 'scales')})",
    ]
    if len(shape) == 3:
        options += [
            lambda: f"F.avg_pool1d({x}.mT, 2).mT",
            lambda: f"F.avg_pool1d({x}, 2)",
            lambda: f"F.avg_pool1d({x}.mT, 3, stride=1, padding=1).mT",
            lambda: f"F.adaptive_avg_pool1d({x}.mT, 2).mT",
            lambda: f"F.interpolate({x}.mT, scale_factor=2, mode='linear').mT",
            lambda: f"F.interpolate({x}.mT, size=3).mT",
            lambda: f"F.pad({x}.mT, (1, 1), mode='reflect').mT",
        ]
    if len(shape) == 4:
        options += [lambda: f"F.avg_pool2d({x}, 2)", lambda: f"F.interpolate({x}, size=(3, 2), mode='bilinear')"]
    return w.commuting(x, w.pick(options)())


# Traps: they do not commute, or they are readers that notice.


@instruction("trap", 2)
def activation(w: Writer) -> str | None:
    """A nonlinear function of each element."""
    x = w.some(stream=True)
    if x is None:
        return None
    spelling = w.pick([
        "F.gelu({})", "F.relu({})", "torch.tanh({})", "torch.sigmoid({})", "{0} * {0}", "{}.abs()", "{}.square()",
        "{}.clamp(-1, 1)", "F.silu({})", "{0} * torch.sigmoid({0})", "1 / ({0} * {0} + 1)",
    ])  # fmt: skip
    return w.let(spelling.format(x))


@instruction("trap")
def rounding(w: Writer) -> str | None:
    """Operations that look like casts, divisions and views, and are not linear."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None or w.tolerance != EXACT:
        return None
    spelling = w.pick([
        "{}.to(torch.int64).to(torch.float64)", "torch.div({}, 0.37, rounding_mode='floor')",
        "{}.long().type_as({})", "{} // 0.37", "{}.contiguous().view(torch.int32)[..., 1::2] / 2**29",
        "{}.contiguous().view(torch.float32)[..., 1::2].double()",
    ])  # fmt: skip
    if "float32" in spelling:
        w.tolerance = ROUNDED
    return w.let(spelling.format(x, x), stream=True)


@instruction("trap", 2)
def feature_gate(w: Writer) -> str | None:
    """A product that varies along the features."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    y = w.some(lambda t: tuple(t.shape) == shape)
    spelling = w.pick(["{x} * torch.sigmoid({y})", "{x} * {y}", "{x} / ({y} * {y} + 1)", "{x} * {u}", "{x} / {p}"])
    u = w.input(f"scales({{}}, {w._sizes(shape)})") if "{u}" in spelling else ""
    p = w.parameter((shape[-1],), "scales") if "{p}" in spelling else ""
    return w.let(spelling.format(x=x, y=y, u=u, p=p), stream=w.chance(2))


@instruction("trap", 2)
def other_norm(w: Writer) -> str | None:
    """A normalisation of another kind, or over other axes."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    axis = w.pick([-1, -2, 0])
    channels = shape[1]
    groups = [g for g in (1, 2, 3, channels) if channels % g == 0]
    options = [
        f"{x} - {x}.mean({axis}, keepdim=True)", f"F.normalize({x}, dim={axis}, eps=0.1)", f"torch.softmax({x}, {axis})",
        f"F.log_softmax({x}, dim={axis})", f"{x}.var({axis}, keepdim=True)", f"{x}.mean({axis}, keepdim=True)",
        f"{x} / torch.sqrt({x}.var({axis}, unbiased=False, keepdim=True) + 0.1)",
        f"F.rms_norm({x}, ({shape[-1]},), eps=0.1)", f"F.group_norm({x}, {w.pick(groups)}, eps=0.1)",
        f"F.max_pool1d({x}, 2)" if len(shape) == 3 else f"torch.amax({x}, {axis})", f"{x}.max({axis})[0]",
        f"F.avg_pool1d({x}, 2)" if len(shape) == 3 else f"torch.logsumexp({x}, {axis})", f"{x}.amax({axis}, keepdim=True)",
        f"F.instance_norm({x}, eps=0.1)" if len(shape) == 3 else f"{x}.std(0, keepdim=True)",
        f"F.batch_norm({x}, {w.parameter((channels,))}, {w.parameter((channels,), 'scales')}, eps=0.1)",
        f"F.batch_norm({x}, {w.parameter((channels,))}, {w.parameter((channels,), 'scales')}, training=True, eps=0.1)",
    ]  # fmt: skip
    expression = w.pick(options)
    return w.let(expression, stream="keepdim" in expression or "softmax" in expression)


@instruction("trap")
def reader(w: Writer) -> str | None:
    """A linear layer, a product, a loss: someone who reads a stream and would notice."""
    x = w.some(lambda t: t.dim() >= 2 and t.shape[-1] > 1, stream=True)
    if x is None:
        return None
    width = w.shape(x)[-1]
    options = [f"F.linear({x}, {w.parameter((3, width))})", f"{x} @ {x}.mT / {width}", f"{x}.sum() * 0.1",
               f"{x}.mean(-1)", f"{x}.unsqueeze(-1) * {w.parameter((2,))}", f"torch.full_like({x}, 0.5)",
               f"torch.dist({x}, {x} * 0)"]  # fmt: skip
    return w.let(w.pick(options))


# Norms.


@instruction("norm", 4)
def layer_norm(w: Writer) -> str | None:
    """A LayerNorm over the last axis, seldom over several."""
    x = w.some(lambda t: t.dim() >= 1, stream=True if not w.chance(6) else None)
    if x is None:
        return None
    count = min(w.pick([1, 1, 1, 1, 2]), len(w.shape(x)))
    return _layer_norm(w, x, count)


@instruction("norm")
def norm_after_transpose(w: Writer) -> str | None:
    """A LayerNorm over axes that are not the last ones."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    y = w.commuting(x, f"{x}.permute({w._sizes(w.order(len(w.shape(x))))})")
    return None if y is None else _layer_norm(w, y, min(w.pick([1, 1, 2]), len(w.shape(x))))


@instruction("norm")
def norm_of_heads(w: Writer) -> str | None:
    """A LayerNorm within or across heads, or over every other group of features."""
    if w.chance(3):
        convolution(w)
    x = w.some(lambda t: t.dim() >= 2 and t.shape[-1] % 2 == 0, stream=True)
    if x is None:
        return None
    *lead, last = w.shape(x)
    heads = w.pick([h for h in (2, 3, 4) if last % h == 0])
    parts = [heads, last // heads]
    if parts[1] % 2 == 0 and w.chance(2):
        parts[1:] = [2, parts[1] // 2]
    y = w.commuting(x, f"{x}.reshape({w._sizes((*lead, *parts))})")
    if y is not None and w.chance(2):
        order = [*range(len(lead)), *(len(lead) + i for i in w.order(len(parts)))]
        y = w.commuting(y, f"{y}.permute({w._sizes(order)})")
    return None if y is None else _layer_norm(w, y, w.pick([1, 1, 2]))


@instruction("norm")
def two_norms(w: Writer) -> str | None:
    """A norm of a norm, or several norms of one tensor."""
    x = w.some(lambda t: t.dim() >= 1 and t.shape[-1] > 1, stream=None)
    y = None if x is None else _layer_norm(w, x, 1)
    if x is None or y is None:
        return None
    return _layer_norm(w, w.pick([x, y, y]), 1)


@instruction("norm")
def handwritten_norm(w: Writer) -> str | None:
    """A LayerNorm in the author's own words, some of whose lines write in place or read the wrong tensor."""
    x = w.some(lambda t: t.dim() >= 1 and t.shape[-1] > 1, stream=True)
    if x is None or float(w.tensor(x).detach().var(-1, unbiased=False).min()) < SMALLEST_VARIANCE:
        return None
    mean = w.let(
        w.pick([f"{x}.mean(-1, keepdim=True)", f"torch.mean({x}, -1, True)", f"{x}.mean(dim=[-1], keepdim=True)"])
    )
    if w.chance(6):
        w.do(w.pick([f"{mean} *= 0.5", f"{mean}.mul_(0.5)", f"{x}[:1] = 0.5", f"{x} += 1"]), x)
    difference = mean and w.let(f"{x} - {mean}")
    variance = difference and w.let(w.pick([
        f"{difference}.pow(2).mean(-1, keepdim=True)", f"torch.mean({difference} * {difference}, dim=-1, keepdim=True)",
        f"({difference} ** 2).mean(-1, True)", f"{x}.var(-1, keepdim=True, unbiased=False)", f"{x}.var(-1, keepdim=True)",
        f"torch.var({x}, dim=-1, correction=0, keepdim=True)",
    ]))  # fmt: skip
    if difference is None or variance is None:
        return None
    root = w.pick([f"torch.rsqrt({variance} + 1e-5)", f"({variance} + 1e-5).rsqrt()"])
    if w.chance(4):
        w.do(w.pick([f"{difference} *= {root}", f"{difference}.mul_({root})", f"{difference}.add_({x})"]), difference)
        return difference
    if w.chance(4):
        return w.let(f"{difference}.div_(torch.sqrt({variance} + 1e-5)) * {w.parameter((w.shape(x)[-1],))}")
    y = w.let(
        w.pick([f"{difference} * {root}", f"{difference} / ({variance} + 1e-5).sqrt()", f"{root} * {difference}"])
    )
    return y and w.let(w.pick([f"{y} * {w.parameter((w.shape(x)[-1],))}", f"{w.parameter((1,))} + {y}"]))


def _layer_norm(w: Writer, x: str, count: int) -> str | None:
    """One LayerNorm over the last axes, if its input varies along them."""
    value = w.tensor(x)
    shape = tuple(value.shape)[-count:]
    rows = value.detach().flatten(-count)
    if rows.shape[-1] > 1 and float(rows.var(-1, unbiased=False).min()) < SMALLEST_VARIANCE:
        return None
    axes, eps = f"({w._sizes(shape)},)", w.pick(["1e-5", "0.1"])

    def gamma() -> str:
        return w.pick([w.parameter, w.weight])(shape) if not w.chance(6) else f"(1 + {w.parameter(shape)})"

    options: list[Callable[[], str]] = [
        lambda: f"F.layer_norm({x}, {axes}, {gamma()}, {gamma()}, {eps})",
        lambda: f"F.layer_norm({x}, {axes}, {gamma()}, {gamma()}, {eps})",
        lambda: f"F.layer_norm({x}, {axes}, eps={eps})",
        lambda: f"F.layer_norm({x}, {axes}, weight={gamma()}, eps={eps})",
        lambda: f"torch.layer_norm({x}, {axes}, bias={gamma()}, eps={eps})",
        lambda: f"{w.module(f'nn.LayerNorm({axes}, eps={eps})')}({x})",
        lambda: f"{w.module(f'nn.LayerNorm({axes}, eps={eps}, bias=False)')}({x})",
        lambda: f"torch.native_layer_norm({x}, {axes}, {gamma()}, None, {eps})[0]",
        lambda: f"(n := torch.native_layer_norm({x}, {axes}, None, None, {eps}))[0] + n[1] * n[2] * 0.1",
        lambda: f"torch.native_layer_norm({x}, {axes}, None, None, {eps})[{w.pick([1, 2])}] * 0.1",
    ]
    y = w.let(w.pick(options)())
    if y is not None:
        w.norms.add(y)
    if y is not None and "weight" not in w.statements[-1] and w.chance(2):
        w.streams.add(y)
    return y


# Blocks, as models have them.


@instruction("block", 2)
def feed_forward(w: Writer) -> str | None:
    """``x + W gelu(V norm(x))``, pre-norm or post-norm."""
    x = w.some(lambda t: t.dim() >= 2 and t.shape[-1] == w.width, stream=True)
    if x is None:
        return None
    pre = not w.chance(4)
    h = _layer_norm(w, x, 1) if pre else x
    inner = h and w.let(f"F.gelu({w.module(f'nn.Linear({w.width}, 5)')}({h}))")
    outer = inner and w.let(f"{w.module(f'nn.Linear(5, {w.width})')}({inner})", stream=True)
    total = outer and w.let(w.pick([f"{x} + {outer}", f"{outer} + {x}"]), stream=True)
    return total if pre or not total else _layer_norm(w, total, 1)


@instruction("block", 2)
def attention(w: Writer) -> str | None:
    """``x + W P v`` with the heads cut and merged."""
    x = w.some(lambda t: t.dim() == 3 and t.shape[-1] == w.width, stream=True)
    h = x and _layer_norm(w, x, 1)
    if x is None or h is None:
        return None
    batch, length, width = w.shape(x)
    heads = w.pick([2, 1])
    cut = f".view({batch}, {length}, {heads}, {width // heads}).transpose(1, 2)"
    q, k, v = (w.let(f"{w.module(f'nn.Linear({width}, {width})')}({h}){cut}") for _ in range(3))
    if q is None or k is None or v is None:
        return None
    mixed = w.let(w.pick([
        f"torch.softmax({q} @ {k}.mT / {width}, -1) @ {v}", f"F.scaled_dot_product_attention({q}, {k}, {v})",
    ]))  # fmt: skip
    if mixed is None:
        return None
    joined = f"{mixed}.transpose(1, 2).reshape({batch}, {length}, {width})"
    outer = w.let(f"{w.module(f'nn.Linear({width}, {width})')}({joined})", stream=True)
    return outer and w.let(f"{x} + {outer}", stream=True)


@instruction("block")
def encoder_layer(w: Writer) -> str | None:
    """torch's own encoder layer, one opaque operator in evaluation mode."""
    x = w.some(lambda t: t.dim() == 3 and t.shape[-1] == w.width, stream=True)
    if x is None:
        return None
    arguments = f"{w.width}, 2, 5, batch_first=True, norm_first={w.pick([True, False])}"
    return w.let(f"{w.module(f'nn.TransformerEncoderLayer({arguments})')}({x})", stream=True)


# Writes.


@instruction("write", 3)
def augmented(w: Writer) -> bool:
    """``x += y``: under its name the new value; under other names of its storage too."""
    x = w.some(stream=True)
    if x is None:
        return False
    sign = w.pick(["+=", "+=", "-=", "*=", "/="])
    y = w.like(x) if sign in ("+=", "-=") else w.gate(x)
    if sign == "*=" and w.chance(4):
        y = w.parameter(w.shape(x)[-1:])
    return w.do(f"{x} {sign} {y}", x)


@instruction("write", 2)
def method_in_place(w: Writer) -> bool:
    """``x.add_(y)``, used further by the old name, by the result's, or by both."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None:
        return False
    y, gate = w.like(x), w.gate(x)
    call = w.pick([
        f"{x}.add_({y})", f"{x}.sub_({y}, alpha={w.number()})", f"{x}.mul_({gate})", f"{x}.div_({gate})", f"{x}.neg_()",
        f"{x}.relu_()", f"{x}.copy_({y} + 0 * {x})", f"{x}.masked_fill_({x} > 1, 0.3)", f"torch.ops.aten.add_.Tensor({x}, {x})",
        f"{x}.zero_()", f"{x}.fill_(0.5)", f"{x}.clamp_(-1, 1)",
    ][: 4 if not w.chance(3) else 12])  # fmt: skip
    if not w.chance(3):
        new = w.commuting(x, call)
        if new is not None and not usable(w.tensor(x)):
            raise Unusable
        if new is not None and not w.chance(3):
            w.forget(x)
        return new is not None
    return w.do(call, x)


@instruction("write", 2)
def partial_write(w: Writer) -> bool:
    """Writes into a part of a tensor, through views, keywords, lists and outputs."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return False
    y = w.like(x)
    other = w.some(lambda t: t.shape == w.tensor(x).shape)
    return w.do(w.pick([
        f"{x}[:, 0] = {w.number()}", f"{x}[:, :1] += 0.7", f"{x}[0] = {x}[-1] * 2", f"{x}[..., -1] = 0.1",
        f"{x}.view(-1)[0] = 2.0", f"{x}[:1].add_({w.number()})", f"{x}.select(-1, 0).mul_(0.5)", f"F.relu({x}, inplace=True)",
        f"F.relu(input={x}, inplace=True)", f"torch._foreach_add_([{x}], 0.5)", f"torch._foreach_mul_([{x}, {other}], 0.5)",
        f"F.dropout({x}, 0.5, False, True)",
        # Dynamo takes no `out` that is not contiguous.
        *([f"torch.mul({x}, 0.5, out={x})", f"torch.add({other}, {y}, out={x})"] if w.tensor(x).is_contiguous() else []),
    ]), x)  # fmt: skip


@instruction("write")
def expression_write(w: Writer) -> str | None:
    """An expression of parameters that is written to and used further."""
    shape = w.pick([(w.length, w.width), (w.batch, w.length, w.width)])
    x = w.let(w.weight(shape), stream=True)
    if x is None or w.chance(3):
        return (x and w.do(f"{x} += {w.like(x)}", x) and x) or None
    return w.let(f"{x}.{w.pick(['add_', 'sub_', 'mul_'])}({w.pick([w.like, w.gate])(x)})", stream=True)


@instruction("write")
def parameter_write(w: Writer) -> bool:
    """A parameter or buffer that the forward changes."""
    name = w.any_parameter()
    if name is None:
        return False
    return w.do(
        w.pick([f"{name}.mul_(0.9)", f"{name}.add_(0.1)", f"{name}[:1].mul_(0.8)", f"{name}.data.mul_(0.9)"]), name
    )


@instruction("write")
def input_write(w: Writer) -> bool:
    """An argument that the forward changes."""
    inputs = [n for n in w.inputs if w.tensor(n).is_floating_point()]
    if not inputs:
        return False
    name = w.pick(inputs)
    return w.do(w.pick([f"{name} += 0.5", f"{name}.mul_(0.9)", f"{name}[:1] = 0.3"]), name)


# --- the strategy --------------------------------------------------------------------------------------------------------

# What the steps of a program are, mostly. The first does nothing: that is what a step shrinks to.
_CALM = ["nothing"] + ["commuting"] * 9 + ["norm"] * 4 + ["block"] * 2 + ["source"] * 3
_KINDS = [_CALM, _CALM, _CALM + ["trap"] * 3, _CALM + ["write"] * 4, _CALM + ["trap"] * 2 + ["write"] * 3]


@st.composite
def programs(draw: st.DrawFn, steps: int = 14) -> Program:
    """Draw a program of at most so many instructions after its first sources; hypothesis shrinks it."""
    try:
        return write_program(lambda n: draw(st.integers(0, n - 1)), steps)
    except Unusable:
        hypothesis.reject()


def random_program(seed: int, steps: int = 14) -> Program:
    """The program of a seed: faster than hypothesis where nothing has to be shrunk, and no two alike."""
    generator = random.Random(seed)
    while True:
        with contextlib.suppress(Unusable):
            return write_program(generator.randrange, steps)


@torch.no_grad()
def write_program(below: Callable[[int], int], steps: int) -> Program:
    """Write a program.

    Args:
        below: makes the choices, a number below n each.
        steps: largest number of instructions after the first.
    """
    w = Writer(below)
    w.live.append(w.input(f"values({{}}, {w.batch}, {w.length}, 7)"))
    linear(w)
    kinds = w.pick(_KINDS)
    for _ in range(2 + below(steps - 1)):
        kind = w.pick(kinds)
        if kind == "nothing":
            continue
        chosen = w.pick(INSTRUCTIONS[kind])
        before = len(w.statements)
        chosen(w)
        if len(w.statements) > before:
            w.instructions.append(getattr(chosen, "__name__", kind))
    if not any("orm(" in line for line in (*w.setup, *w.statements)) or w.chance(2):
        x = w.some(lambda t: t.dim() >= 1, stream=True)
        if x is not None:
            _layer_norm(w, x, 1)
    unread = [name for name in w.live if name not in w.read and name not in w.inputs]
    outputs = [name for name in unread if name not in w.streams or name in w.norms or w.chance(6)]
    if w.chance(8):
        outputs.append(w.pick(w.live))
    options: dict[str, Any] = {}
    if w.chance(4):
        options["lnfold.assist"] = False
    if w.chance(4):
        options["lnfold.nonfoldable"] = "eager"
    return w.program(list(dict.fromkeys(outputs)) or [w.live[-1]], options)


def statistics(drawn: Iterable[Program]) -> Counter[str]:
    """How often each instruction was used."""
    return Counter(name for program in drawn for name in program.instructions)
