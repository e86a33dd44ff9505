"""Which operations may stand in a parameter expression: ``W + B @ A * scale``, ``v · g / ‖v‖``, ``W / σ(W)``, masks.

A parameter expression leaves the graph and is computed once for each set of parameters (see ``materialize``), so what
stands in it must be pure and deterministic, and must give the same value outside of the graph as in it. Autocast is
what could tell the two apart: it casts the operands of a matrix product down, and those of exponentials, norms and sums
up, wherever it happens to be on.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lncompile.lowering import torch_private
from lncompile.passes.graph.canonical import canonicalise
from lncompile.passes.graph.traits import Trait, has


class AutocastEffect(enum.Enum):
    """What autocast does to an operation of an expression."""

    #: Nothing: sums, products element by element, casts, views.
    UNTOUCHED = "untouched"
    #: It may cast operands of half precision up; those of one wide dtype stay as they are.
    WIDENED = "widened"
    #: It casts operands of single precision down.
    NARROWED = "narrowed"
    #: Nothing, but the result is larger than what it reads: no weight to keep a copy of, only a step towards one.
    ENLARGING = "enlarging"


_UNTOUCHED = (
    Trait.ADDS
    | Trait.SCALES
    | Trait.NEGATES
    | Trait.PASSES
    | Trait.CASTS
    | Trait.RESHAPES
    | Trait.PERMUTES
    | Trait.CUTS
    | Trait.SPLITS
)
# By the names of torch's functions and methods, whatever module they stand in.
_WIDENED_NAMES = frozenset(
    "_weight_norm norm_except_dim where masked_fill triu tril diag diagonal diag_embed cat concat concatenate stack "
    "roll flip index_select gather lerp sqrt rsqrt pow __pow__ float_power square abs absolute exp exp2 expm1 log "
    "log2 log10 log1p sigmoid tanh softplus softmax log_softmax logsigmoid logsumexp relu elu silu gelu erf sin cos "
    "tan atan sinh cosh reciprocal sign clamp clamp_min clamp_max clip maximum minimum norm vector_norm matrix_norm "
    "normalize sum mean var std prod amax amin cumsum cumprod eq ne lt le gt ge logical_not logical_and logical_or "
    "invert and_ or_ ones_like full_like outer ger kron addcmul addcdiv hypot atan2 remainder "
    "round floor ceil trunc mH H".split()
)
_NARROWED_NAMES = frozenset(
    "matmul mm bmm mv dot vdot inner einsum tensordot addmm baddbmm addmv addr linear chain_matmul multi_dot vecdot "
    "matrix_exp matrix_power inv solve solve_triangular cholesky qr householder_product det slogdet".split()
)
# Constants written into the graph; they read no tensor.
_CONSTANT_NAMES = frozenset("ones zeros eye full arange linspace tri scalar_tensor".split())
_TORCH_MODULES = ("torch", "_operator", "operator", "_VariableFunctions", "builtins")


def autocast_effect(node: fx.Node) -> AutocastEffect | None:
    """Say what autocast does to an operation, or None if it may not stand in a parameter expression.

    Args:
        node: a node that writes to nothing.
    """
    operation = canonicalise(node)
    if operation is not None and operation.in_place:
        return None
    if has(operation, _UNTOUCHED):
        return AutocastEffect.UNTOUCHED
    if operation is not None and (has(operation, Trait.EXPANDS | Trait.TILES) or operation.name == "zeros"):
        return AutocastEffect.ENLARGING
    name = _name(node)
    if name in _CONSTANT_NAMES:
        return AutocastEffect.ENLARGING
    if name in _WIDENED_NAMES:
        return AutocastEffect.WIDENED
    return AutocastEffect.NARROWED if name in _NARROWED_NAMES else None


def _name(node: fx.Node) -> str:
    """Name of torch's function or method; "" for what is not torch's or may write somewhere."""
    if "out" in node.kwargs or node.kwargs.get("inplace"):
        return ""
    target = node.target
    if isinstance(target, str):
        return target
    if target is getattr:
        return str(node.args[1])
    if isinstance(target, torch_private.OpOverload):
        pure = target.namespace == "aten" and not torch_private.schema_of(target).is_mutable
        return str(target.overloadpacket.__name__) if pure else ""
    module = getattr(target, "__module__", None) or "torch"
    name = getattr(target, "__name__", "").removeprefix("linalg_")
    return name if module.split(".")[0] in _TORCH_MODULES else ""


def is_settled(kind: AutocastEffect, operands: Sequence[Tensor], autocast: bool) -> bool:
    """Whether an operation gives the same value inside and outside of the graph.

    Args:
        kind: what autocast does to it.
        operands: the (fake) tensors it reads.
        autocast: whether autocast may be on where it stands.
    """
    if not autocast or kind in (AutocastEffect.UNTOUCHED, AutocastEffect.ENLARGING):
        return True
    dtypes = {operand.dtype for operand in operands if operand.is_floating_point()}
    # Autocast leaves double precision alone altogether.
    wide = [{torch.float64}, {torch.float32}] if kind is AutocastEffect.WIDENED else [{torch.float64}]
    return not dtypes or dtypes in wide


def find_autocast(graph: fx.Graph, examples: Sequence[object]) -> set[fx.Node]:
    """Return the nodes of a graph at which autocast may be on.

    Args:
        graph: the graph, with ``_enter_autocast`` and ``_exit_autocast`` where the model itself turns it on or off.
        examples: values of the placeholders. Autocast around the call leaves no node: the graph is being compiled
            under it, and Dynamo's guards make another one for calls without it.
    """
    devices = {example.device.type for example in examples if isinstance(example, Tensor)}
    if any(torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) for device in devices):
        return set(graph.nodes)
    touched: set[fx.Node] = set()
    depth = 0
    for node in graph.nodes:
        entering = node.op == "call_function" and node.target is torch_private.ENTER_AUTOCAST
        leaving = node.op == "call_function" and node.target is torch_private.EXIT_AUTOCAST
        depth += entering - leaving
        if depth > 0:
            touched.add(node)
    return touched
