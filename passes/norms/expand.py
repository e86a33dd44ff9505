"""Opaque operators with LayerNorms inside, written out so that the passes can see them.

In eval mode under ``no_grad`` an ``nn.TransformerEncoderLayer`` is one ATen operator of twenty arguments, with its
norms and weights among them. It is written out as the operations it stands for, masks and all; the pipeline keeps it so
only where that lets a norm fold, and hands it to Inductor as it was otherwise.

An ``nn.TransformerEncoder`` called with ``mask`` but without ``is_causal`` is out of reach: it asks for the mask's
values, and torch.compile runs it eagerly then. With ``is_causal=False`` (or True, if it is) it is one graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from lncompile.lowering import emit, target_of, torch_private
from lncompile.passes.decisions import Reason, Verdict
from lncompile.passes.graph import provenance
from lncompile.passes.graph.canonical import tensor_of
from lncompile.passes.norms.sites import SITE_NAME

# Where the operator's mask stands among its arguments, and then its type.
_MASK, _MASK_TYPE = 18, 19
# The types, and the rank of the mask each goes with.
_OVER_POSITIONS, _OVER_KEYS, _OVER_ALL = 0, 1, 2
_MASK_RANKS = {_OVER_POSITIONS: 2, _OVER_KEYS: 2, _OVER_ALL: 4}

# Nodes of an operator that was written out keep its name here.
EXPANDED_FROM = "lnfold_expanded_from"


def transformer_encoder_layer(
    source: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    projection_weight: Tensor,
    projection_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """What ``nn.TransformerEncoderLayer`` computes in eval mode, ``[batch, sequence, embed_dim]``.

    Pre-norm: ``x + attention(LN(x))`` then ``x + ffn(LN(x))``; post-norm: ``LN(x + attention(x))``, ``LN(x + ffn(x))``.

    Args (those whose names do not say it):
        mask: what no query may look at, of any dtype: whatever is not zero is hidden, however large or small. So
            0 and -∞ mean what they usually do; a bias for the scores, ALiBi's say, hides everything, as it does there.
        mask_type: 0 for a mask of ``[sequence, sequence]``, the same for each batch item and head; 1 for one over
            keys, ``[batch, sequence]``; 2 for ``[batch, num_heads, sequence, sequence]``.

    A query all of whose keys are hidden gets NaN: the operator's softmax of nothing is 0/0.
    """

    def attention(value: Tensor) -> Tensor:
        projected = functional.linear(value, qkv_weight, qkv_bias)
        split = torch.unflatten(projected, -1, (3, num_heads, embed_dim // num_heads))
        heads = split.permute(2, 0, 3, 1, 4)
        mixed = masked_attention(heads[0], heads[1], heads[2], mask, mask_type)
        return functional.linear(mixed.transpose(1, 2).flatten(2), projection_weight, projection_bias)

    def feed_forward(value: Tensor) -> Tensor:
        inner = functional.linear(value, ffn_weight_1, ffn_bias_1)
        activated = functional.gelu(inner) if use_gelu else functional.relu(inner)
        return functional.linear(activated, ffn_weight_2, ffn_bias_2)

    def norm_1(value: Tensor) -> Tensor:
        return functional.layer_norm(value, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(value: Tensor) -> Tensor:
        return functional.layer_norm(value, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        hidden = source + attention(norm_1(source))
        return hidden + feed_forward(norm_2(hidden))
    hidden = norm_1(source + attention(source))
    return norm_2(hidden + feed_forward(hidden))


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mask_type: int | None) -> Tensor:
    """Attention of ``[batch, heads, sequence, features]`` with a mask as :func:`transformer_encoder_layer` takes it.

    .. math:: softmax(q kᵀ / \\sqrt{d} + m) v  with  m = -∞  where  mask ≠ 0,  else 0
    """
    if mask is None:
        return functional.scaled_dot_product_attention(query, key, value)
    hidden = mask.to(torch.bool)
    if mask_type == _OVER_KEYS:
        hidden = hidden.unsqueeze(1).unsqueeze(1)
    mixed = functional.scaled_dot_product_attention(query, key, value, torch.logical_not(hidden))
    # Torch's attention gives zeros to a query without keys.
    return torch.masked_fill(mixed, torch.all(hidden, -1, True), torch.nan)


def _arguments(node: fx.Node) -> list[Any] | None:
    """The operator's twenty arguments in order, or None where the call is not one we know."""
    names = [argument.name for argument in torch_private.schema_of(torch_private.TRANSFORMER_ENCODER_LAYER).arguments]
    if len(node.args) > len(names) or not set(node.kwargs) <= set(names):
        return None
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name) for name in names]


def _why_closed(node: fx.Node) -> str | None:
    """Why an encoder-layer operator cannot be written out; None if it can."""
    arguments = _arguments(node)
    if arguments is None:
        return "with arguments of another version"
    source, mask, mask_type = arguments[0], arguments[_MASK], arguments[_MASK_TYPE]
    tensor = tensor_of(source) if isinstance(source, fx.Node) else None
    if tensor is None or tensor.is_nested or tensor.dim() != 3:
        return "that reads a nested tensor"
    if mask is None:
        return None
    held = tensor_of(mask) if isinstance(mask, fx.Node) else None
    if held is None or mask_type not in _MASK_RANKS or held.dim() != _MASK_RANKS[mask_type]:
        return f"with a mask of type {mask_type} in a shape that is not known"
    return None


def _encoder_layers(graph: fx.Graph) -> list[fx.Node]:
    targets = (torch_private.TRANSFORMER_ENCODER_LAYER_FORWARD, torch_private.TRANSFORMER_ENCODER_LAYER)
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def find_opaque_layers(graph: fx.Graph) -> list[fx.Node]:
    """Return the encoder-layer operators of a graph that can be written out: dense input, a mask that is understood."""
    return [node for node in _encoder_layers(graph) if _why_closed(node) is None]


def layers_kept_closed(graph: fx.Graph, switched_off: bool = False) -> dict[str, str]:
    """Return why operators are not written out that could be, in words, by the operator's node name.

    On a CPU the operator computes attention in 16 bits as two products and a softmax; torch's fused attention, which is
    what it would be written out with, takes longer there: encoders 64 and 256 wide took 1.09 and 1.10 times as long
    as the operator, all norms folded (bfloat16, AVX-512, by hand, one process;
    ``benchmarks/results/latency-narrow.json`` has such a model). In float32 they took 0.97 and 0.99 times as long.

    Args:
        graph: the graph.
        switched_off: whether the pass that writes them out is.
    """
    return {
        node.name: "that pass 'expand' would write out, which is switched off" if switched_off else _FASTER_CLOSED
        for node in find_opaque_layers(graph)
        if switched_off or _is_in_16_bits_on_a_cpu(node)
    }


_FASTER_CLOSED = "that is faster in 16 bits on a CPU than what it stands for"


def _is_in_16_bits_on_a_cpu(node: fx.Node) -> bool:
    source = tensor_of((_arguments(node) or [None])[0])
    return source is not None and source.element_size() == 2 and target_of(source.device).type == "cpu"


def closed_norms(graph: fx.Graph, kept_closed: Mapping[str, str] = MappingProxyType({})) -> dict[str, list[Verdict]]:
    """Return verdicts on the norms inside operators that are not written out, by the operator's node name.

    Args:
        graph: the graph.
        kept_closed: what :func:`layers_kept_closed` returned; by default all are written out that can be.
    """
    verdicts: dict[str, list[Verdict]] = {}
    for node in _encoder_layers(graph):
        why = _why_closed(node) or kept_closed.get(node.name)
        if not why:
            continue
        layer, location = provenance.module_path(node) or node.name, provenance.location(node)
        detail = f"it stands inside one opaque operator {why}: {provenance.describe(node)}"
        verdicts[node.name] = [
            Verdict(f"{layer}.norm{index}", location, False, "layer_norm", Reason.UNKNOWN_OPERATION, detail, ())
            for index in (1, 2)
        ]
    return verdicts


def expand_opaque_layers(graph: fx.Graph, names: Collection[str]) -> None:
    """Write out the encoder-layer operators of these node names.

    Before::

        y = _transformer_encoder_layer_fwd(x, 512, 8, W_qkv, ..., True, True, 1e-5, γ1, β1, ..., b2, mask, 1)

    After (pre-norm)::

        n = layer_norm(x, (512,), γ1, β1, 1e-5)
        h = x + linear(attention(linear(n, W_qkv, b_qkv)), W_o, b_o); ...

    Args:
        graph: changed in place.
        names: which of :func:`find_opaque_layers` to write out.
    """
    for node in find_opaque_layers(graph):
        if node.name not in names:
            continue
        before = set(graph.nodes)
        with graph.inserting_before(node):
            result = emit(graph, node.name, transformer_encoder_layer, *(_arguments(node) or ()))
        added = [new for new in graph.nodes if new not in before]
        _inherit(node, added)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _inherit(origin: fx.Node, added: Sequence[fx.Node]) -> None:
    """Give new nodes the provenance of the operator they were written out of, and norms a name of their own."""
    layer = provenance.module_path(origin) or origin.name
    norms = 0
    for node in added:
        node.meta[EXPANDED_FROM] = origin.name
        node.meta.update({k: origin.meta[k] for k in ("nn_module_stack", "stack_trace") if k in origin.meta})
        if node.target is functional.layer_norm:
            norms += 1
            node.meta[SITE_NAME] = f"{layer}.norm{norms}"
