"""Making a program that fails smaller: drop outputs, statements, options and parameters while it still fails."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

import torch
from random_modules import Program

_LET = re.compile(r"^(v\d+) = (.*)$")
_NAME = re.compile(r"\b[uv]\d+\b")
# A factor, an index or a call of one operand around a name: what a statement may lose without losing the name.
_CALL = re.compile(r"\w+(?:\.\w+)*\(([^()]*)\)")


def shrink(program: Program, fails: Callable[[Program], bool], most: int = 400) -> Program:
    """Return a smaller program that still fails.

    Args:
        program: one that fails.
        fails: whether a program fails in the way that is looked into. Only asked of programs that run eagerly.
        most: how often it may be asked.
    """
    asked = 0
    again = True
    while again:
        again = False
        for candidate in _smaller(program):
            if asked >= most:
                return program
            if not _runs(candidate):
                continue
            asked += 1
            if fails(candidate):
                program, again = candidate, True
                break
    return program


def _runs(program: Program) -> bool:
    """Whether torch takes a program; what it refuses, and names that are gone, make many candidates useless."""
    try:
        with torch.no_grad():
            program.build()(*program.arguments())
    except Exception:  # whatever torch says to a program that was cut at random: the answer is no
        return False
    return True


def _smaller(program: Program) -> Iterator[Program]:
    """Candidates, the largest steps first."""
    change = dataclasses.replace
    statements, outputs = program.statements, program.outputs
    if len(outputs) > 1:
        for name in outputs:
            yield _used(change(program, outputs=(name,)))
    for size in (len(statements) // 2, len(statements) // 4, 2, 1):
        for start in range(len(statements) - size, -1, -1) if size else ():
            yield _used(change(program, statements=statements[:start] + statements[start + size :]))
    for name in outputs[:-1] if len(outputs) > 1 else ():
        yield _used(change(program, outputs=tuple(other for other in outputs if other != name)))
    for index in range(len(statements) - 1, -1, -1):
        if (found := _LET.match(statements[index])) is None:
            continue
        for operand in dict.fromkeys(_NAME.findall(found[2])):
            yield _used(_renamed(program, index, found[1], operand))
    for index in range(len(statements) - 1, -1, -1):
        for call in _CALL.finditer(statements[index]):
            simpler = statements[index][: call.start()] + call[1] + statements[index][call.end() :]
            yield _used(change(program, statements=(*statements[:index], simpler, *statements[index + 1 :])))
    if program.dynamic:
        yield change(program, dynamic=False)
    if program.options:
        for index in range(len(program.options)):
            yield change(program, options=program.options[:index] + program.options[index + 1 :])


def _renamed(program: Program, index: int, name: str, other: str) -> Program:
    """The program without a statement, whose value another tensor takes the place of."""

    def exchange(text: str) -> str:
        return re.sub(rf"\b{name}\b", other, text)

    return dataclasses.replace(
        program,
        statements=program.statements[:index] + tuple(map(exchange, program.statements[index + 1 :])),
        outputs=tuple(dict.fromkeys(map(exchange, program.outputs))),
    )


def _used(program: Program) -> Program:
    """The program without the parameters and arguments that nothing reads."""
    text = "\n".join((*program.statements, *program.outputs))
    kept: list[str] = []
    for line in reversed(program.setup):
        name = re.search(r"self\.(?:register_buffer\('(\w+)'|(\w+) =)", line)
        assert name is not None, line
        if re.search(rf"\bself\.{name[1] or name[2]}\b", "\n".join((text, *kept))):
            kept.append(line)
    inputs = tuple((name, value) for name, value in program.inputs if re.search(rf"\b{name}\b", text))
    return dataclasses.replace(program, setup=tuple(reversed(kept)), inputs=inputs)
