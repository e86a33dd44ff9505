"""Opaque operators with LayerNorms inside, written out so that the passes can see them.

In eval mode under ``no_grad`` an ``nn.TransformerEncoderLayer`` is one ATen operator of twenty arguments, with its
norms and weights among them. It is written out as the operations it stands for; the pipeline keeps it so only where
that lets a norm fold, and hands it to Inductor as it was otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional

from lncompile.lowering import emit, torch_private
from lncompile.passes import provenance
from lncompile.passes.canonical import tensor_of
from lncompile.passes.sites import SITE_NAME

# Where the operator's mask stands among its arguments; what follows it describes the mask.
_MASK = 18

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
) -> Tensor:
    """What ``nn.TransformerEncoderLayer`` computes in eval mode without a mask, ``[batch, sequence, embed_dim]``.

    Pre-norm: ``x + attention(LN(x))`` then ``x + ffn(LN(x))``; post-norm: ``LN(x + attention(x))``, ``LN(x + ffn(x))``.
    """

    def attention(value: Tensor) -> Tensor:
        projected = functional.linear(value, qkv_weight, qkv_bias)
        split = torch.unflatten(projected, -1, (3, num_heads, embed_dim // num_heads))
        heads = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
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


def find_opaque_layers(graph: fx.Graph) -> list[fx.Node]:
    """Return the encoder-layer operators of a graph that can be written out: dense input, no mask."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and node.target is torch_private.TRANSFORMER_ENCODER_LAYER_FORWARD
        and len(node.args) >= _MASK
        and all(argument is None for argument in node.args[_MASK:])
        and not any(value is not None for value in node.kwargs.values())
        and isinstance(node.args[0], fx.Node)
        and tensor_of(node.args[0]) is not None
        and tensor_of(node.args[0]).dim() == 3  # type: ignore[union-attr]
    ]


def expand_opaque_layers(graph: fx.Graph, names: Collection[str]) -> None:
    """Write out the encoder-layer operators of these node names.

    Before::

        y = _transformer_encoder_layer_fwd(x, 512, 8, W_qkv, ..., True, True, 1e-5, γ1, β1, γ2, β2, W1, b1, W2, b2)

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
            result = emit(graph, node.name, transformer_encoder_layer, *node.args[:_MASK])
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
