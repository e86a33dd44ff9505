"""The writer that draws programs statement by statement, and the register of instructions.

While a program is drawn every statement is run in float64, so that shapes are known, and what torch refuses, what
explodes, and norms of all but constant rows are left out by construction.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from programs import EXACT, LARGEST, NAMESPACE, ROUNDED, Program, Shape, T, Unusable
from torch import Tensor, nn

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
            return self.input(f"values({{}}, {self.sizes(self.broadcast(shape, features=1))})")
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
            return self.input(f"scales({{}}, {self.sizes(self.broadcast(shape, features=1))})")
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
        same = [p for p in self._parameters if tuple(self.attribute(p).shape) == shape]
        if same and self.chance(3):
            return self.pick(same)
        seed, sizes = next(self._seeds), self.sizes(shape)
        name = f"p{len(self._parameters)}"
        plain = f"self.{name} = {'parameter' if kind == 'parameter' else 'nn.Parameter(scales'}({seed}, {sizes})"
        plain += ")" if kind != "parameter" else ""
        options = [plain, plain, plain, plain, f"self.register_buffer('{name}', {kind_of(kind)}({seed}, {sizes}))"]
        if same:
            options += [f"self.{name} = nn.Parameter({self.pick(same)}.detach())"]
        if len(shape) == 2:
            transposed = self.sizes(shape[::-1])
            options += [f"self.{name} = nn.Parameter({kind_of(kind)}({seed}, {transposed}).t() / {shape[1]}**0.5)"]
        if shape:
            larger = self.sizes((*shape[:-1], shape[-1] + 2))
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
            lambda: self.pruned(shape),
            lambda: self.narrow(shape),
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
                lambda: f"{plain((math.prod(shape),))}.view({self.sizes(shape)})",
                lambda: f"{plain((rows + 1, *rest))}.narrow(0, 1, {rows})",
                lambda: f"{plain((1, *rest))}.expand({self.sizes(shape)})",
            ]
        if len(shape) == 2:
            options += [lambda: f"{plain(shape[::-1])}.t()", lambda: f"{plain(shape[::-1])}.mT"]
            options += [lambda: self.spectrally_normalised(shape), lambda: self.adapted(shape)]
        return self.pick(options)()

    def pruned(self, shape: Shape) -> str:
        """A parameter times a mask of ones and zeros, as ``nn.utils.prune`` makes it."""
        name = f"p{len(self._parameters)}"
        self._set_up(
            f"self.register_buffer('{name}', mask({next(self._seeds)}, {self.sizes(shape)}).to(torch.float64))"
        )
        self._parameters.append(f"self.{name}")
        return f"({self.parameter(shape)} * self.{name})"

    def narrow(self, shape: Shape) -> str:
        """A buffer kept in float32, cast up where it is used."""
        name = f"p{len(self._parameters)}"
        self._set_up(f"self.register_buffer('{name}', values({next(self._seeds)}, {self.sizes(shape)}).float())")
        self._parameters.append(f"self.{name}")
        self.tolerance = ROUNDED
        return self.pick([f"self.{name}.double()", f"self.{name}.to(torch.float64)", f"(self.{name} * 0.5).double()"])

    def spectrally_normalised(self, shape: Shape) -> str:
        """A matrix over its largest singular value, as a power iteration left its vectors."""
        matrix, rows, columns = self.parameter(shape), self.parameter((shape[0],)), self.parameter((shape[1],))
        return self.pick([
            f"({matrix} / ({rows}.abs() @ ({matrix} @ {columns}.abs())).abs().add(0.5))",
            f"({matrix} / torch.dot({rows}, torch.mv({matrix}, {columns})).square().add(0.5))",
        ])  # fmt: skip

    def adapted(self, shape: Shape) -> str:
        """A matrix with a low-rank update merged into it."""
        left, right = self.parameter((shape[0], 2)), self.parameter((2, shape[1]))
        return f"({self.parameter(shape)} + {left} @ {right} * {self.number()})"

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
        found = [p for p in self._parameters if accept(self.attribute(p))]
        return self.pick(found) if found else None

    def attribute(self, name: str) -> Tensor:
        value = getattr(self._module, name.removeprefix("self."))
        assert isinstance(value, Tensor)
        return value

    def _set_up(self, statement: str) -> None:
        exec(statement, self._names)
        self.setup.append(statement)

    @staticmethod
    def sizes(shape: Iterable[int]) -> str:
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

    def let_all(self, expression: str, streams: Sequence[bool]) -> list[str] | None:
        """Add ``v, w = expression`` for an expression of several tensors; which of them are streams is told."""
        names = [f"v{next(self._numbers)}" for _ in streams]
        try:
            values = eval(expression, self._names)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None
        if len(values) != len(names) or not all(isinstance(v, Tensor) and usable(v) for v in values):
            return None
        self._names.update(zip(names, values, strict=True))
        self.statements.append(f"{', '.join(names)} = {expression}")
        self.read.update(_TENSOR.findall(expression))
        self.live += names
        self.streams.update(name for name, stream in zip(names, streams, strict=True) if stream)
        return names

    def do(self, statement: str, target: str) -> bool:
        """Add a statement that writes to a live tensor or a parameter; False where torch refuses it."""
        try:
            exec(statement, self._names)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        value = self._names[target] if target in self._names else self.attribute(target)
        if not usable(value):
            raise Unusable
        self.statements.append(statement)
        self.read.update(set(_TENSOR.findall(statement)) - {target})
        return True

    def commuting(self, name: str, expression: str) -> str | None:
        """Add an operation that keeps a stream a stream."""
        return self.let(expression, stream=name in self.streams)

    @contextlib.contextmanager
    def focused_on(self, *names: str) -> Iterator[None]:
        """Let the statements within use these tensors and what they make of them, of which only norms live on."""
        before, self.live = self.live, list(names)
        yield
        made = [name for name in self.live if name not in before]
        self.live = before + [name for name in made if name in self.norms or name not in self.streams]

    def forget(self, name: str) -> None:
        """Let no later statement use a tensor."""
        self.live.remove(name)
        self.read.add(name)

    def program(self, outputs: Sequence[str], options: dict[str, Any], dynamic: bool) -> Program:
        """What was written."""
        return Program(
            tuple(self.setup), tuple(self.inputs.items()), tuple(self.statements), tuple(outputs), self.tolerance,
            tuple(options.items()), tuple(self.instructions), dynamic,
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
