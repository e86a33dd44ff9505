"""Other ways to the same end, to be timed beside lnfold: PyTorch's RMSNorm, Liger's kernels, a rewrite by hand."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from lncompile import safety_net
from lncompile.backend import lnfold
from lncompile.comparisons.no_norm import NormsReplaced
from lncompile.lowering import NormCall, emit
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.pipeline import rewriting


class Unavailable(Exception):
    """A peer that cannot be timed here. The message says why."""


# --- RMSNorms of others, on the weights that lnfold centers ----------------------------------------------------------

#: ``(x, normalized_shape, γ, β, ε) → y``, of graph nodes as well as of tensors.
RmsNorm = Callable[[Any, Sequence[int], Any, Any, float], Any]


def folded_with(norm: RmsNorm, mode: str | None = None) -> Callable[..., Callable[..., Any]]:
    """Return a Dynamo backend that is lnfold in all but what a folded norm becomes.

    Args:
        norm: what it becomes.
        mode: as for ``torch.compile``.
    """

    def lower(graph: fx.Graph, calls: Iterable[NormCall]) -> None:
        for call in calls:
            if call.returns_statistics or call.groups is not None or call.input_dtype != call.output_dtype:
                raise Unavailable(f"'{call.node.name}' is more than a plain norm of trailing axes")
            with graph.inserting_before(call.node):
                arguments = (call.input, call.normalized_shape, call.weight, call.bias, call.eps)
                result = emit(graph, call.node.name, norm, *arguments)
            call.node.replace_all_uses_with(result)
            graph.erase_node(call.node)

    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        # Everything but this one function is to be lnfold's, so it is exchanged for the moment and nothing is copied.
        # Without the safety net, which would time stock torch.compile under the peer's name where the peer fails.
        with (
            mock.patch.object(rewriting, "lower_to_rms_norm", lower),
            mock.patch.object(safety_net, "enabled", False),
        ):
            return lnfold(graph_module, example_inputs, mode=mode)

    return backend


def torch_rms_norm(input: Any, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    """What ``nn.RMSNorm`` calls, and β, which it does not have."""
    output = nn.functional.rms_norm(input, list(normalized_shape), weight, eps)
    return output if bias is None else output + bias


# --- Liger -----------------------------------------------------------------------------------------------------------


@functools.cache
def _liger() -> tuple[Any, Any]:
    """Liger's LayerNorm and RMSNorm as operators.

    Raises:
        Unavailable: without CUDA or without liger-kernel.
    """
    if not torch.cuda.is_available():
        raise Unavailable("Liger's kernels need a GPU")
    try:
        layer_norm = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        rms_norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not installed (pip install liger-kernel): {error}") from error
    return operators(layer_norm.apply, rms_norm.apply)


def operators(layer_norm: Callable[..., Tensor], rms_norm: Callable[..., Tensor]) -> tuple[Any, Any]:
    """Make operators of two kernels, which a compiled graph calls as they are.

    Args:
        layer_norm: ``(x, γ, β, ε) → y``.
        rms_norm: ``(x, γ, ε) → y``.
    """

    @torch.library.custom_op("lncompile_benchmarks::liger_layer_norm", mutates_args=())
    def liger_layer_norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return layer_norm(input, weight, bias, eps)

    @torch.library.custom_op("lncompile_benchmarks::liger_rms_norm", mutates_args=())
    def liger_rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(input, weight, eps)

    liger_layer_norm.register_fake(lambda input, weight, bias, eps: input.new_empty(input.shape))
    liger_rms_norm.register_fake(lambda input, weight, eps: input.new_empty(input.shape))
    return liger_layer_norm, liger_rms_norm


def liger_layer_norm(mode: str | None = None) -> NormsReplaced:
    """Return a Dynamo backend: Inductor, with Liger's LayerNorm kernel for every norm.

    Args:
        mode: as for ``torch.compile``.

    Raises:
        Unavailable: without CUDA or without liger-kernel.
    """
    operator, _ = _liger()

    def replacement(graph: fx.Graph, site: NormSite) -> fx.Node:
        operation = site.current()
        arguments = (operation["input"], operation["weight"], operation["bias"], site.eps)
        if len(site.normalized_shape) != 1 or any(argument is None for argument in arguments):
            raise Unavailable(f"Liger's LayerNorm takes one axis, γ and β: '{site.name}' has others")
        return emit(graph, site.node.name, operator, *arguments)

    return NormsReplaced(replacement, mode)


def liger_rms_norm(mode: str | None = None) -> Callable[..., Callable[..., Any]]:
    """Return a Dynamo backend: lnfold, with Liger's RMSNorm kernel for every folded norm.

    Args:
        mode: as for ``torch.compile``.

    Raises:
        Unavailable: without CUDA or without liger-kernel.
    """
    _, operator = _liger()

    def norm(input: Any, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
        if len(normalized_shape) != 1 or weight is None:
            raise Unavailable("Liger's RMSNorm takes one axis and γ")
        output = operator(input, weight, eps)
        return output if bias is None else output + bias

    return folded_with(norm, mode)


# --- By hand ---------------------------------------------------------------------------------------------------------


class RMSNormWithBias(nn.RMSNorm):
    """``nn.RMSNorm`` with a β."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, norm.eps)
        self.weight = norm.weight
        self.bias = norm.bias

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the trailing axes."""
        return torch_rms_norm(input, self.normalized_shape, self.weight, self.bias, self.eps or 0.0)  # type: ignore[no-any-return]


def pre_rms_norm_by_hand(model: nn.Module) -> nn.Module:
    """Rewrite GPT-2 as somebody would who knows the model: Pre-RMSNorm (Jiang et al., NeurIPS 2023, arXiv:2305.14858).

    What is added to the residual stream is centered once: embeddings, and the outputs of each attention and MLP. Then
    every LayerNorm is an RMSNorm.

    Args:
        model: a ``GPT2LMHeadModel``; not changed.

    Returns:
        A copy.

    Raises:
        Unavailable: for another model.
    """
    if type(model).__name__ != "GPT2LMHeadModel":
        raise Unavailable(f"written for GPT2LMHeadModel, not for {type(model).__name__}")
    rewritten: Any = copy.deepcopy(model)
    # The head shares its weight with the embedding, and does not read the stream itself.
    rewritten.lm_head.weight = nn.Parameter(rewritten.lm_head.weight.detach().clone())
    body = rewritten.transformer
    blocks = list(body.h)
    layers = [body.wte, body.wpe, *(block.attn.c_proj for block in blocks), *(block.mlp.c_proj for block in blocks)]
    with torch.no_grad():
        for layer in layers:
            # Rows of an embedding, and of a Conv1D's [in, out], lie along the stream.
            for parameter in layer.parameters():
                wide = parameter.float() if parameter.dtype != torch.float64 else parameter
                parameter.copy_(wide - wide.mean(-1, keepdim=True))
    for block in blocks:
        block.ln_1, block.ln_2 = RMSNormWithBias(block.ln_1), RMSNormWithBias(block.ln_2)
    body.ln_f = RMSNormWithBias(body.ln_f)
    return rewritten.eval()  # type: ignore[no-any-return]
