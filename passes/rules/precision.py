"""Values that are kept in a narrow dtype and used in a wider one: they are exact there, so must not be centered before.

    narrow = x.to(float32)                  # it is the number that it was rounded to
    joined = cat((wide, narrow))            # in float64; so is ``wide + narrow``, ``narrow.double()``, ``where(...)``

``C`` of ``narrow`` in its own dtype would be rounded once more than the program rounds it. What is computed in the
narrow dtype is rounded anyway, so a linear layer in bfloat16 whose result is added to a float32 stream is computed
centered like any other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from lncompile.passes.graph.canonical import Operation, canonicalise, tensor_of
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.graph.traits import VIEWS, Trait, has

# What hands on the values of its operands unchanged: look-ups and moves, but no arithmetic.
_MOVES = (
    VIEWS
    | Trait.PASSES
    | Trait.CUTS
    | Trait.SPLITS
    | Trait.ROTATES
    | Trait.SELECTS
    | Trait.LOOKS_UP
    | Trait.DUPLICATES
    | Trait.JOINS
    | Trait.CHOOSES
)


def tensor_dtype(node: fx.Node) -> torch.dtype:
    """Dtype of a node's tensor. Raises TypeError where it has none."""
    tensor = tensor_of(node)
    if tensor is None:
        raise TypeError(f"{node.name} is not a tensor")
    return tensor.dtype


def widens(operand: fx.Node, result: fx.Node) -> bool:
    """Whether ``result``, computed from ``operand``, is of a finer floating dtype (float32 of bfloat16, say)."""
    narrow, wide = tensor_of(operand), tensor_of(result)
    if narrow is None or wide is None or not (narrow.is_floating_point() and wide.is_floating_point()):
        return False
    return torch.finfo(wide.dtype).eps < torch.finfo(narrow.dtype).eps


def widened_parameter(operation: Operation, operand: fx.Node, facts: GraphFacts) -> fx.Node | None:
    """``operand`` if it is a parameter, or values looked up in one, and the operation widens it; else None."""
    if not widens(operand, operation.node):
        return None
    pending, seen = [operand], {operand}
    while pending:
        node = pending.pop()
        if node in facts.parametric:
            return operand
        for source in _moved(node):
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return None


def widened_cast(operation: Operation, facts: GraphFacts) -> fx.Node | None:
    """As :func:`widened_parameter` for the operand of a cast, and None for what is not a cast."""
    if not has(operation, Trait.CASTS) or not isinstance(operation["input"], fx.Node):
        return None
    return widened_parameter(operation, operation["input"], facts)


def is_widened_later(node: fx.Node) -> bool:
    """Whether an operation widens a tensor, or what was moved out of it."""
    pending, seen = [node], {node}
    while pending:
        source = pending.pop()
        for user in source.users:
            if user in seen:
                continue
            if widens(source, user):
                return True
            if source in _moved(user):
                seen.add(user)
                pending.append(user)
    return False


def _moved(node: fx.Node) -> Iterator[fx.Node]:
    """The operands whose values a node hands on."""
    operation = canonicalise(node)
    if operation is None or not has(operation, _MOVES):
        return
    values = {"embedding": ("weight",), "where": ("input", "other")}.get(operation.name, ("input", "tensors"))
    for (name, _), operand in operation.operands():
        if name in values:
            yield operand
