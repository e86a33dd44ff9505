"""Norms that are folded already: ``lncompile.nn.RMSNorm``, which a fold of the whole model puts in a norm's place.

Its stream is centered by the weights that the model has, so it needs nothing from the graph that it stands in: not the
stream's sources, which other graphs may hold (blocks compiled one at a time, graph breaks), nor any reader's consent.
Dynamo writes the module's forward out. One operation is put in the place of these lines, a norm like any other to the
passes behind; it computes the same function.

Before, in bfloat16 with a bias::

    wide = x.float(); γ_wide = γ.float(); y = rms_norm(wide, (768,), γ_wide, ε); β_wide = β.float()
    y = y + β_wide; y = y.to(bfloat16); y = y.contiguous()

After::

    y = rms_norm(x, (768,), γ, β, ε)        # lncompile.lowering.rms_norm

Where the mean is subtracted in front of the module, by hand, that is a LayerNorm in two parts, and is read as one.
Only this module is known: other RMSNorms are not a fold's, and are compiled as stock torch.compile does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lncompile.lowering import compute_dtype_of, rms_norm
from lncompile.passes.decisions import Verdict
from lncompile.passes.graph.canonical import canonicalise, tensor_of
from lncompile.passes.graph.effects import written_arguments
from lncompile.passes.graph.provenance import is_made_by, module_path
from lncompile.passes.norms.differences import differences_in
from lncompile.passes.norms.moments import exact_origin
from lncompile.passes.norms.sites import SITE_NAME, NormSite

#: The module that says of itself that its input is centered by the weights before it.
FOLDED_NORM = "lncompile.nn.RMSNorm"


def gather_folded_norms(graph: fx.Graph) -> int:
    """Put one operation in the place of each call of the module.

    Args:
        graph: as Dynamo captured it, with its values; changed in place.

    Returns:
        How many.
    """
    found = [node for node in graph.nodes if _is_statistic(node)]
    if not found:
        return 0
    gathered = 0
    lines = list(graph.nodes)
    differences = {difference.node for difference in differences_in(graph)}
    for node in found:
        call = _read(node)
        if call is None or exact_origin(call.input) in differences:
            continue
        first, last = sorted(map(lines.index, (call.first, call.last)))
        between = lines[first : last + 1]
        if not any(written_arguments(line) for line in between):
            _gather(graph, call, between)
            gathered += 1
    return gathered


def _is_statistic(node: fx.Node) -> bool:
    if not is_made_by(node, FOLDED_NORM) or tensor_of(node) is None:
        return False
    operation = canonicalise(node)
    return operation is not None and operation.name == "rms_norm" and operation["eps"] is not None


@dataclass(frozen=True)
class _Call:
    """A call of the module, read from the lines of its forward: the first, the ``rms_norm`` among them, the last."""

    first: fx.Node
    node: fx.Node
    last: fx.Node
    input: fx.Node
    sizes: tuple[Any, ...]
    weight: Any
    bias: Any
    eps: Any


def _read(node: fx.Node) -> _Call | None:
    operation = canonicalise(node)
    assert operation is not None  # it is an rms_norm
    sizes = operation["normalized_shape"]
    if not isinstance(sizes, tuple | list) or not isinstance(operation["input"], fx.Node):
        return None
    input, weight = (_before_widening(operation[name], node) for name in ("input", "weight"))
    casts = [
        operation[name] for name, source in (("input", input), ("weight", weight)) if operation[name] is not source
    ]
    last, bias = node, None
    steps = ["add", "to", "contiguous"]
    while steps and len(last.users) == 1:
        (user,) = last.users
        step = _step(user, last, tuple(sizes)) if _is_same_call(user, node) else None
        if step not in steps:
            break
        if step == "add":
            bias = _before_widening(next(operand for operand in user.args if operand is not last), node)
        steps = steps[steps.index(step) + 1 :]
        last = user
    return _Call(next(iter(casts), node), node, last, input, tuple(sizes), weight, bias, operation["eps"])


def _step(node: fx.Node, value: fx.Node, sizes: tuple[Any, ...]) -> str | None:
    """Which line behind the ``rms_norm`` a node is; None for any other."""
    if node.kwargs or tensor_of(node) is None:
        return None
    if node.op == "call_method" and node.args[0] is value:
        return str(node.target) if (node.target == "contiguous" and len(node.args) == 1) or _is_cast(node) else None
    operation = canonicalise(node)
    if operation is None or operation.name != "add" or operation.in_place:
        return None
    others = [operand for operand in node.args if operand is not value]
    added = tensor_of(others[0]) if len(others) == 1 and isinstance(others[0], fx.Node) else None
    return "add" if len(node.args) == 2 and added is not None and tuple(added.shape) == sizes else None


def _before_widening(value: Any, node: fx.Node) -> Any:
    """What the module cast to the dtype that it computes in; the value itself where it did not."""
    if not isinstance(value, fx.Node) or not _is_same_call(value, node) or not _is_cast(value):
        return value
    source = value.args[0]
    narrow, wide = (tensor_of(cast) if isinstance(cast, fx.Node) else None for cast in (source, value))
    if narrow is None or wide is None or wide.dtype != compute_dtype_of(narrow.dtype):
        return value
    return source


def _is_cast(node: fx.Node) -> bool:
    """Whether a line casts to another dtype, and does nothing else: ``x.float()``, ``x.to(torch.bfloat16)``."""
    if node.op != "call_method" or node.kwargs:
        return False
    if node.target == "to":
        return len(node.args) == 2 and isinstance(node.args[1], torch.dtype)
    return node.target == "float" and len(node.args) == 1


def _is_same_call(node: fx.Node, other: fx.Node) -> bool:
    """Whether two lines were written out of one call of a module. Dynamo numbers the calls."""
    return list(node.meta.get("nn_module_stack") or {}) == list(other.meta.get("nn_module_stack") or {})


def _gather(graph: fx.Graph, call: _Call, lines: Sequence[fx.Node]) -> None:
    given, result = tensor_of(call.input), tensor_of(call.last)
    assert given is not None  # a norm's input is a tensor
    assert result is not None  # what `_step` requires
    arguments = (call.input, call.sizes, call.weight, call.bias, call.eps)
    dtypes: dict[str, Any] = {"input_dtype": given.dtype, "output_dtype": result.dtype}
    with graph.inserting_before(call.last):
        gathered = graph.create_node("call_function", rms_norm, arguments, dtypes, name=f"{call.node.name}_folded")
    gathered.meta = {**call.node.meta, "example_value": result}
    if not module_path(call.node):
        gathered.meta[SITE_NAME] = "rms_norm"  # the module itself is what is compiled
    call.last.replace_all_uses_with(gathered)
    for line in reversed(lines):
        if not line.users and line.op in ("call_function", "call_method") and _is_same_call(line, call.node):
            graph.erase_node(line)


def verdict_of_folded(site: NormSite) -> Verdict:
    """Return the verdict on a norm that was folded before, wherever it stands."""
    detail = f"folded before ({FOLDED_NORM})"
    return Verdict(site.name, site.location, True, "rms_norm", None, detail, (), folded_before=True)
