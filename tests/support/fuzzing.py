"""One random program through the backend: everything eager computes and changes must come out, to rounding.

:func:`examine` runs a drawn :class:`~random_modules.Program` eagerly and compiled, with Inductor left out, and compares
outputs, arguments and state after each of three calls; the third comes after an update of all parameters, so that a
stale centered weight shows. Where wanted, weights are written instead, before the second call and before the third,
each time in a random one of the ways of ``weight_writes``, most of which torch does not count. What torch itself gets
wrong is told apart: the same program is then run by Dynamo alone.

The rewritten graph is run as it is, which is fastest, or traced once more by AOTAutograd (what Inductor would be given,
with its checks of shapes, strides and aliases), or compiled by Inductor.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from graphs import run_as_it_is
from random_modules import Program
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from weight_writes import SEEN, UNSEEN, another_process, prepared

import lncompile
from lncompile import safety_net
from lncompile.lowering import torch_private_inductor
from lncompile.passes.graph.axes import Axes
from lncompile.passes.rewrites import center

CALLS = 3
# A process for each write would take longer than all the rest.
WRITES = [kind for kind in (*UNSEEN, *SEEN) if kind is not another_process]


def run_through_aot(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: dict[str, Any]
) -> Callable[..., Any]:
    """Stands in for Inductor: AOTAutograd's graph, run as it is."""
    compiled: Callable[..., Any] = lookup_backend("aot_eager")(graph_module, list(example_inputs))
    return compiled


# What compiles a rewritten graph, and torch's own backend that does the same to one of Dynamo's.
COMPILERS: dict[str, tuple[Callable[..., Callable[..., Any]], str]] = {
    "none": (run_as_it_is, "eager"),
    "aot": (run_through_aot, "aot_eager"),
    "inductor": (torch_private_inductor.inductor_compile, "inductor"),
}
Values = dict[str, Tensor]


class Difference(AssertionError):
    """The compiled program does not do what the eager one does, or its report contradicts itself."""


@dataclass(frozen=True)
class Outcome:
    """What became of one program.

    Attributes:
        folded: LayerNorm sites that became RMSNorms.
        total: all sites.
        reasons: of the others.
        instructions: that the program was written by.
        problem: what is wrong, or "".
        unsupported: what torch's own tracer does not take or gets wrong, or "".
    """

    folded: int = 0
    total: int = 0
    reasons: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()
    problem: str = ""
    unsupported: str = ""


@dataclass
class Statistics:
    """Sums over many outcomes: whether the fuzzing says anything."""

    graphs: int = 0
    with_a_folded_site: int = 0
    with_a_site: int = 0
    sites: int = 0
    folded: int = 0
    unsupported: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    instructions: Counter[str] = field(default_factory=Counter)

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Count more outcomes."""
        for outcome in outcomes:
            self.graphs += 1
            self.with_a_site += outcome.total > 0
            self.with_a_folded_site += outcome.folded > 0
            self.sites += outcome.total
            self.folded += outcome.folded
            self.unsupported += bool(outcome.unsupported)
            self.reasons.update(outcome.reasons)
            self.instructions.update(outcome.instructions)


@contextlib.contextmanager
def compiled_by(compiler: str) -> Iterator[None]:
    """Compile rewritten graphs with one of :data:`COMPILERS`, and let failures of ours through."""
    with (
        mock.patch.object(torch_private_inductor, "inductor_compile", COMPILERS[compiler][0]),
        mock.patch.object(safety_net, "enabled", False),
    ):
        yield


@contextlib.contextmanager
def centering_left_out() -> Iterator[None]:
    """Leave parameters and activations as they are where they should be centered: a negative control."""

    def not_centered(value: Tensor, *_: object) -> Tensor:
        return value.clone()

    def only_scaled(weight: Tensor, scale: Tensor, dimension: int, axes: Axes, *_: object) -> Tensor:
        sizes = [1] * axes.rank
        sizes[dimension] = -1
        return weight * scale.reshape(sizes)

    with (
        mock.patch.object(center, "center_weight", not_centered),
        mock.patch.object(center, "center_activation", not_centered),
        mock.patch.object(center, "center_scaled_weight", only_scaled),
    ):
        yield


def examine(program: Program, compiler: str = "none", writes: bool = False) -> Outcome:
    """Run a program eagerly and compiled by our backend, and compare.

    Args:
        program: what to run.
        compiler: what takes the rewritten graph, one of :data:`COMPILERS`.
        writes: whether weights are written between calls in random ways, in place of one update.
    """
    torch._dynamo.reset()
    with compiled_by(compiler), torch.no_grad():
        try:
            model, expected = program.build(), _trace(program, writes=writes)
            compiled = torch.compile(
                model, backend="lnfold", fullgraph=True, dynamic=program.dynamic or None, options=dict(program.options)
            )
            problem = _compare(_trace(program, model, compiled, writes), expected, program.tolerance)
            reports = lncompile.reports(compiled)
        except Exception as error:
            problem, reports = f"{type(error).__name__}: {error}", []
    problem = problem or _contradiction(reports)
    unsupported = _fails_without_us(program, compiler, writes) if problem else ""
    return _outcome(program, reports, "" if unsupported else problem, unsupported)


def examine_training(program: Program, compiler: str = "none") -> Outcome:
    """Run a program once with gradients, eagerly and compiled for training, and compare outputs and gradients.

    What autograd itself refuses (writes into what the way back needs, or into parameters) counts as unsupported.

    Args:
        program: what to run.
        compiler: what takes the rewritten graph, one of :data:`COMPILERS`.
    """
    torch._dynamo.reset()
    with compiled_by(compiler), torch.enable_grad():
        try:
            expected = _gradients(program)
        except Exception as error:
            return Outcome(instructions=program.instructions, unsupported=f"{type(error).__name__}: {error}")
        options = {**dict(program.options), "lnfold.training": "on"}
        try:
            model = program.build()
            compiled = torch.compile(
                model, backend="lnfold", fullgraph=True, dynamic=program.dynamic or None, options=options
            )
            actual = _gradients(program, model, compiled)
            problem = _compare([actual], [expected], program.tolerance)
            reports = lncompile.reports(compiled)
        except Exception as error:
            problem, reports = f"{type(error).__name__}: {error}", []
        if problem.startswith("call "):
            noise = _compare([_gradients(program, disturbed=True)], [expected], 0.1 * program.tolerance)
            if noise:
                return Outcome(instructions=program.instructions, unsupported=f"rounding alone does that: {noise}")
    return _outcome(program, reports, problem or _contradiction(reports))


def _outcome(program: Program, reports: Sequence[lncompile.FoldReport], problem: str, unsupported: str = "") -> Outcome:
    """What the reports say of a program, and what went wrong."""
    sites = [site for report in reports for site in report.sites]
    return Outcome(
        folded=sum(site.folded for site in sites),
        total=len(sites),
        reasons=tuple(site.reason.value for site in sites if site.reason is not None),
        instructions=program.instructions,
        problem=problem,
        unsupported=unsupported,
    )


def check(program: Program, compiler: str = "none", training: bool = False, writes: bool = False) -> Outcome:
    """As :func:`examine`, or :func:`examine_training`.

    Raises:
        Difference: with the program, where something is wrong.
    """
    outcome = examine_training(program, compiler) if training else examine(program, compiler, writes)
    if outcome.problem:
        raise Difference(f"{outcome.problem}\n{program!r}")
    return outcome


def _gradients(
    program: Program, model: nn.Module | None = None, compiled: Any = None, disturbed: bool = False
) -> Values:
    """Outputs of one call and the gradients of a loss in all of them; ``disturbed`` by a rounding of the parameters."""
    model = program.build() if model is None else model
    if disturbed:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-15 * torch.randn_like(parameter))
    outputs: Sequence[Tensor] = (model if compiled is None else compiled)(*program.arguments())
    values = {f"output {name}": value.detach().clone() for name, value in zip(program.outputs, outputs, strict=True)}
    floating = [value for value in outputs if value.is_floating_point() and value.requires_grad]
    if floating:
        weights = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).reshape(v.shape) for v in floating]
        sum((value * weight).sum() for value, weight in zip(floating, weights, strict=True)).backward()  # type: ignore[union-attr]
    values |= {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return values


def _fails_without_us(program: Program, compiler: str, writes: bool) -> str:
    """What goes wrong with the backend of torch that does the same without us, or ""."""
    torch._dynamo.reset()
    with torch.no_grad():
        try:
            expected = _trace(program, writes=writes)  # eager does not write into what was loaded in inference mode
            model = program.build()
            backend_name = COMPILERS[compiler][1]
            compiled = torch.compile(model, backend=backend_name, fullgraph=True, dynamic=program.dynamic or None)
            return _compare(_trace(program, model, compiled, writes), expected, program.tolerance)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def _trace(
    program: Program, model: nn.Module | None = None, compiled: Any = None, writes: bool = False
) -> list[Values]:
    """Everything visible after each call: outputs, arguments, parameters and buffers."""
    model = program.build() if model is None else model
    function = model if compiled is None else compiled
    if not writes:
        return _calls(program, model, function, [lambda: None, lambda: _update(model)])
    # The same ones each time that the program is run.
    generator = random.Random(repr(program))
    with contextlib.ExitStack() as stack:
        kinds = generator.choices(WRITES, k=CALLS - 1)
        return _calls(program, model, function, [stack.enter_context(prepared(kind, model)) for kind in kinds])


def _calls(
    program: Program, model: nn.Module, function: Callable[..., Any], between: Sequence[Callable[[], None]]
) -> list[Values]:
    """What is visible after each call, with something done between two."""
    seen: list[Values] = []
    for call in range(CALLS):
        if call:
            between[call - 1]()
        arguments = program.arguments()
        outputs: Sequence[Tensor] = function(*arguments)
        values = {f"output {name}": value for name, value in zip(program.outputs, outputs, strict=True)}
        values |= {f"argument {name}": value for (name, _), value in zip(program.inputs, arguments, strict=True)}
        values |= {f"state {name}": value for name, value in model.state_dict().items()}
        seen.append({name: value.detach().clone() for name, value in values.items()})
    return seen


def _update(model: nn.Module) -> None:
    """What an optimiser does: every parameter changes in place, once for each storage."""
    storages: set[int] = set()
    for parameter in model.parameters():
        if (storage := parameter.untyped_storage().data_ptr()) not in storages:
            storages.add(storage)
            parameter.mul_(0.9)


def _compare(actual: Sequence[Values], expected: Sequence[Values], tolerance: float) -> str:
    """The first disagreement in words, or ""."""
    for call, (ours, reference) in enumerate(zip(actual, expected, strict=True)):
        for name, value in reference.items():
            form, right_form = ((tensor.dtype, tuple(tensor.shape)) for tensor in (ours[name], value))
            if form != right_form:
                return f"call {call}: {name} is {form}, not {right_form}"
            if name.startswith("state") and torch.equal(value, ours[name]):
                continue
            if not value.is_floating_point():
                if not torch.equal(ours[name], value):
                    return f"call {call}: {name} differs"
                continue
            finite = value.isfinite()
            if not torch.equal(ours[name][~finite].nan_to_num(), value[~finite].nan_to_num()):
                return f"call {call}: {name} is not finite in other places"
            error = (ours[name] - value)[finite].abs().max().item() if finite.any() else 0.0
            size = max(1.0, value[finite].abs().max().item()) if finite.any() else 1.0
            if not error <= tolerance * size:
                return f"call {call}: {name} differs by {error:.2e} of {size:.2g}"
    return ""


def _contradiction(reports: Sequence[lncompile.FoldReport]) -> str:
    """What is wrong with the reports themselves, or ""."""
    for report in reports:
        if not 0 <= report.folded <= report.total == len(report.sites):
            return f"report: {report.folded} of {report.total} folded"
        if report.memory_budget is not None and report.extra_bytes > report.memory_budget.limit:
            return f"report: {report.extra_bytes} bytes, and a budget of {report.memory_budget.limit}"
        for site in report.sites:
            if not (site.name and site.detail):
                return f"report: a site without name or detail: {site}"
            if (site.reason is None) != site.folded or site.lowering.startswith("rms_norm") != site.folded:
                return f"report: contradicts itself: {site}"
    return ""
