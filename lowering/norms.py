"""Lowering the sites of a rewritten graph: folded ones to RMSNorm, the others as asked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lncompile.lowering.emit import emit
from lncompile.lowering.persistent import FOLDED_STATISTIC
from lncompile.lowering.rms_norm import grouped_rms_norm, rms_norm
from lncompile.lowering.stored_scale import StoredScale


@dataclass(frozen=True)
class NormCall:
    """A LayerNorm call to be lowered: its node, its arguments as graph nodes and numbers, and its dtypes.

    With ``groups`` it normalises the channels of ``[N, C, 1, ...]`` in so many groups (``group_norm``), else the
    trailing ``len(normalized_shape)`` axes. ``slices`` and ``stored_scale`` are those of `rms_norm`.
    """

    node: fx.Node
    input: fx.Node
    normalized_shape: tuple[int, ...]
    weight: Any
    bias: Any
    eps: Any
    input_dtype: torch.dtype
    output_dtype: torch.dtype
    returns_statistics: bool = False
    groups: int | None = None
    slices: int = 1
    stored_scale: StoredScale | None = None


def lower_to_rms_norm(graph: fx.Graph, calls: Iterable[NormCall]) -> None:
    """Replace LayerNorm calls whose input has zero mean by RMSNorms, written out for Inductor to fuse.

    Before::

        y = layer_norm(x, (768,), γ, β, 1e-5)

    After::

        y_mul = mul(x, x); y_mean = mean(y_mul, [-1], True); y_rsqrt = rsqrt(y_mean + 1e-5)
        y = x · y_rsqrt · γ + β

    Args:
        graph: changed in place.
        calls: the calls; all of their inputs are centered.
    """
    for call in calls:
        function: Callable[..., torch.Tensor]
        features: tuple[int, ...] | int
        if call.groups is None:
            function = functools.partial(rms_norm, slices=call.slices, stored_scale=call.stored_scale)
            features = call.normalized_shape
        else:
            function, features = grouped_rms_norm, call.groups
        with graph.inserting_before(call.node):
            result = emit(
                graph,
                call.node.name,
                function,
                call.input,
                features,
                call.weight,
                call.bias,
                call.eps,
                input_dtype=call.input_dtype,
                output_dtype=call.output_dtype,
                annotation={**call.node.meta.get("custom", {}), **FOLDED_STATISTIC},
            )
        _replace(graph, call, result)


def lower_to_aten(graph: fx.Graph, calls: Iterable[NormCall]) -> None:
    """Replace LayerNorm calls by an operator that runs ATen's eager kernel (``lnfold.nonfoldable="eager"``).

    Args:
        graph: changed in place.
        calls: the calls. One that autocast makes return another dtype than its input has stays as it is, and so does
            a group norm.
    """
    register_aten_layer_norm()
    for call in calls:
        if call.input_dtype != call.output_dtype or call.returns_statistics or call.groups is not None:
            continue
        arguments = (call.input, list(call.normalized_shape), call.weight, call.bias, call.eps)
        with graph.inserting_before(call.node):
            operator = torch.ops.lncompile.layer_norm.default
            result = graph.create_node("call_function", operator, arguments, name=f"{call.node.name}_aten")
        _replace(graph, call, result)


def register_aten_layer_norm() -> None:
    """Have torch know the operator that :func:`lower_to_aten` puts into graphs: also where code with it is loaded.

    Making an operator takes torch 50 ms, so it is made where it is asked for.
    """
    import lncompile.lowering.layer_norm  # noqa: F401  # the import registers it


def _replace(graph: fx.Graph, call: NormCall, result: fx.Node) -> None:
    if not call.returns_statistics:
        result.meta.update({k: v for k, v in call.node.meta.items() if k in ("nn_module_stack", "stack_trace")})
        call.node.replace_all_uses_with(result)
        graph.erase_node(call.node)
        return
    # native_layer_norm returns (output, mean, rstd); the uses of the output are exchanged, the rest stays if used.
    for user in list(call.node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(result)
            graph.erase_node(user)
    if not call.node.users:
        graph.erase_node(call.node)


__all__ = ["NormCall", "lower_to_aten", "lower_to_rms_norm", "register_aten_layer_norm"]
