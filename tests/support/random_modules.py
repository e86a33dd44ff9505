"""Random modules out of the whole op set: the drawing.

It leans towards what folds (sources, operations that commute with the centering, residual blocks) and strews traps
between: operations that do not commute, readers that notice, joins and cuts along the features, in-place writes under
many names, shared and written parameters.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import hypothesis
import random_layers
import random_other_norms
import torch
from hypothesis import strategies as st
from programs import Program, Unusable
from random_instructions import linear
from random_norms import add_layer_norm
from random_programs import INSTRUCTIONS, Writer

__all__ = [
    "INSTRUCTIONS", "Program", "programs", "random_layers", "random_other_norms", "random_program", "statistics",
    "write_program",
]  # fmt: skip

# --- the strategy --------------------------------------------------------------------------------------------------------

# What the steps of a program are, mostly. The first does nothing: that is what a step shrinks to.
_CALM = ["nothing"] + ["commuting"] * 8 + ["norm"] * 4 + ["block"] * 3 + ["source"] * 3 + ["chain"] * 5
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
            add_layer_norm(w, x, 1)
    unread = [name for name in w.live if name not in w.read and name not in w.inputs]
    outputs = [name for name in unread if name not in w.streams or name in w.norms or w.chance(6)]
    if w.chance(8):
        outputs.append(w.pick(w.live))
    options: dict[str, Any] = {}
    if w.chance(4):
        options["lnfold.assist"] = "off"
    if w.chance(4):
        options["lnfold.nonfoldable"] = "eager"
    dynamic = w.chance(5)
    if w.chance(8):
        options["lnfold.memory_budget"] = w.pick((0.3, 0.1, 0.02))
    # Programs are too small for these to pay. What is copied for them is no part of a budget.
    for name, value in (("absorb_affine", "on"), ("defer", "on"), ("matrix_vector", "on")):
        if w.chance(4) and "lnfold.memory_budget" not in options:
            options[f"lnfold.{name}"] = value
    return w.program(list(dict.fromkeys(outputs)) or [w.live[-1]], options, dynamic=dynamic)


def statistics(drawn: Iterable[Program]) -> Counter[str]:
    """How often each instruction was used."""
    return Counter(name for program in drawn for name in program.instructions)
