"""A graph before and after one pass, as text that stands in a test: made of a small model, and run."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from architectures import randomise
from graphs import capture
from torch import Tensor, fx, nn

from lncompile.options import Options
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.passes.norms.expand import find_opaque_layers
from lncompile.passes.norms.regions import find_regions
from lncompile.passes.pipeline.context import Known, Rewriting
from lncompile.passes.pipeline.order import DECIDE, REWRITE
from lncompile.passes.pipeline.runner import Runner, Step

# Dynamo's names of parameters and inputs.
_PARAMETER = re.compile(r"l_(?:self|fn)_modules_(\w+?)_(?:parameters|buffers)_([a-z_]+?)_(?=\W|_)")
_HELD = re.compile(r"\bfn_modules_(\w+?)_(?:parameters|buffers)_(\w+)")
_INPUT = re.compile(r"\bl_(\w+?)_(?=\W|_)")
_INPUTS = re.compile(r"    (\w+),.*\n")
_SHORTER = {"torch.nn.functional.": "functional.", "torch._C._nn.": "functional.", "torch.float64": "float64",
            " _transformer_encoder_layer_fwd_": " layer_", "(_transformer_encoder_layer_fwd_": "(layer_"}  # fmt: skip


D, TOKENS = 4, 3


class Plain(nn.Module):
    """A product, and a norm that its caller reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def ready(model: nn.Module) -> nn.Module:
    """Make a model ready for :func:`before_and_after`: random, in float64, in evaluation mode."""
    return randomise(model).double().eval()


def rows() -> Tensor:
    """Return the input of most models: a few rows of features."""
    return torch.linspace(-1, 2, TOKENS * D, dtype=torch.float64).reshape(TOKENS, D)


@dataclass
class Recorder:
    """Keeps the graph as it is before and after the last pass that has run."""

    before: str = ""
    after_it: str = ""
    changed: list[str] = field(default_factory=list)

    def begin(self, code: str, again: bool) -> None:
        self.before = self.after_it = code

    def after(self, step: Step) -> None:
        self.before = self.after_it
        if step.code is not None:
            self.after_it = step.code
            self.changed.append(step.name)


def before_and_after(
    name: str, model: Callable[..., Any], *args: Any, gradients: bool = False, **options: Any
) -> tuple[str, str]:
    """Run the pipeline on a model up to one pass.

    The graph that it leaves is run, and compared with the one that was captured.

    Args:
        name: of the pass.
        model: in float64.
        args: what it is called with.
        gradients: whether gradients are recorded.
        options: of lncompile.Options.

    Returns:
        The graph in front of the pass and behind it, without the names that Dynamo makes and the lines of the source.
    """
    with torch.set_grad_enabled(gradients):
        captured = capture(model, *args)
        inputs, chosen, recorder = list(captured.example_inputs), Options(**options), Recorder()
        runner = Runner(observers=[recorder], until=name)
        if any(one.name == name for one in DECIDE):
            copy = copy_graph_module(captured.graph_module)
            opened = {node.name for node in (*find_regions(copy.graph), *find_opaque_layers(copy.graph))}
            known = Known(copy, inputs, chosen, opened=opened)
            runner.begin(copy)
            runner.run(DECIDE, known)
            _assert_same(captured.graph_module, copy, inputs)
        else:
            work = Rewriting(captured.analyse(chosen), chosen)
            runner.begin(work.graph_module)
            runner.run(REWRITE, work)
            values = [
                expression.evaluate([inputs[leaf] for leaf in expression.leaves])
                for expression in vars(work).get("expressions", ())
            ]
            _assert_same(captured.graph_module, work.graph_module, inputs, values)
    assert recorder.changed[-1:] == [name], f"'{name}' changed nothing"
    return _readable(recorder.before), _readable(recorder.after_it)


def _assert_same(
    captured: fx.GraphModule, changed: fx.GraphModule, inputs: list[Any], values: list[Any] | None = None
) -> None:
    changed.graph.lint()
    changed.recompile()
    for actual, expected in zip(changed(*inputs, *(values or ())), captured(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def _readable(code: str) -> str:
    """Without what is the same in all of them: the shapes of inputs, the places in the source, long names."""
    for pattern in (_PARAMETER, _HELD):
        code = pattern.sub(lambda match: f"{match[1].replace('_modules_', '_')}_{match[2]}", code)
    code = _INPUT.sub(r"\1", code)
    for long, short in _SHORTER.items():
        code = code.replace(long, short)
    head, body = code.split("):\n", 1)
    inputs = textwrap.wrap(f"forward({', '.join(_INPUTS.findall(head))}):", 100)
    lines = [line[4:] for line in body.splitlines() if not line.startswith("    #")]
    return "\n".join([*inputs, *lines])
