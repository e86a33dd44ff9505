"""What is written out before anything is decided, as text: the docstring's before and after, with every name in it.

Each test runs the pipeline on a small model up to one pass, and compares the graph in front of the pass and behind it
with what stands here. The graphs are run as well (``golden.before_and_after``). ``expectations`` says how the texts are
written anew.
"""

# ruff: noqa: E501

from __future__ import annotations

import torch
from expectations import assert_expected
from golden import D, before_and_after, ready, rows
from torch import Tensor, nn
from torch_versions import unless_old

pytestmark = unless_old("Dynamo spells some graphs otherwise")


class Region(nn.Module):
    """A block that is compiled once and called often."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def test_regions() -> None:
    """Each call of a region is written out with the weights it has."""
    before, after = before_and_after("regions", ready(nn.Sequential(Region(), Region())), rows())
    assert_expected(
        before,
        """
            forward(args_0, 0_norm_weight, 0_norm_bias, 0_linear_weight, 0_linear_bias, 1_norm_weight,
            1_norm_bias, 1_linear_weight, 1_linear_bias):
            subgraph_0 = self.subgraph_0
            invoke_subgraph = torch.ops.higher_order.invoke_subgraph(subgraph_0, 'subgraph_0', args_0, 0_norm_weight, 0_norm_bias, 0_linear_weight, 0_linear_bias)  # (f64[3, 4])
            input_1 = invoke_subgraph[0]  # f64[3, 4]
            subgraph_1 = self.subgraph_0
            invoke_subgraph_1 = torch.ops.higher_order.invoke_subgraph(subgraph_1, 'subgraph_0', input_1, 1_norm_weight, 1_norm_bias, 1_linear_weight, 1_linear_bias)  # (f64[3, 4])
            input_2 = invoke_subgraph_1[0]  # f64[3, 4]
            return (input_2,)
        """,
    )
    assert_expected(
        after,
        """
            forward(args_0, 0_norm_weight, 0_norm_bias, 0_linear_weight, 0_linear_bias, 1_norm_weight,
            1_norm_bias, 1_linear_weight, 1_linear_bias):
            layer_norm = functional.layer_norm(args_0, (4,), 0_norm_weight, 0_norm_bias, 1e-05)  # f64[3, 4]
            linear = functional.linear(layer_norm, 0_linear_weight, 0_linear_bias)  # f64[3, 4]
            add = args_0 + linear  # f64[3, 4]
            layer_norm_1 = functional.layer_norm(add, (4,), 1_norm_weight, 1_norm_bias, 1e-05)  # f64[3, 4]
            linear_1 = functional.linear(layer_norm_1, 1_linear_weight, 1_linear_bias)  # f64[3, 4]
            add_1 = add + linear_1  # f64[3, 4]
            return (add_1,)
        """,
    )


def test_expand() -> None:
    """The one operator that an encoder layer is in evaluation, written out."""
    layer = nn.TransformerEncoderLayer(D, 2, 6, batch_first=True, norm_first=True)
    before, after = before_and_after("expand", ready(layer), rows()[None])
    assert_expected(
        before,
        """
            forward(args_0, self_attn_in_proj_bias, self_attn_in_proj_weight, self_attn_out_proj_weight,
            self_attn_out_proj_bias, norm1_weight, norm1_bias, norm2_weight, norm2_bias, linear1_weight,
            linear1_bias, linear2_weight, linear2_bias):
            _transformer_encoder_layer_fwd = torch._transformer_encoder_layer_fwd(args_0, 4, 2, self_attn_in_proj_weight, self_attn_in_proj_bias, self_attn_out_proj_weight, self_attn_out_proj_bias, False, True, 1e-05, norm1_weight, norm1_bias, norm2_weight, norm2_bias, linear1_weight, linear1_bias, linear2_weight, linear2_bias, None, None)  # f64[1, 3, 4]
            return (_transformer_encoder_layer_fwd,)
        """,
    )
    assert_expected(
        after,
        """
            forward(args_0, self_attn_in_proj_bias, self_attn_in_proj_weight, self_attn_out_proj_weight,
            self_attn_out_proj_bias, norm1_weight, norm1_bias, norm2_weight, norm2_bias, linear1_weight,
            linear1_bias, linear2_weight, linear2_bias):
            layer_layer_norm = functional.layer_norm(args_0, (4,), weight=norm1_weight, bias=norm1_bias, eps=1e-05)  # f64[1, 3, 4]
            layer_linear = functional.linear(layer_layer_norm, self_attn_in_proj_weight, self_attn_in_proj_bias)  # f64[1, 3, 12]
            layer_unflatten = torch.unflatten(layer_linear, -1, (3, 2, 2))  # f64[1, 3, 3, 2, 2]
            layer_permute = layer_unflatten.permute(2, 0, 3, 1, 4)  # f64[3, 1, 2, 3, 2]
            layer_getitem = layer_permute[0]  # f64[1, 2, 3, 2]
            layer_getitem_1 = layer_permute[1]  # f64[1, 2, 3, 2]
            layer_getitem_2 = layer_permute[2]  # f64[1, 2, 3, 2]
            layer_scaled_dot_product_attention = functional.scaled_dot_product_attention(layer_getitem, layer_getitem_1, layer_getitem_2)  # f64[1, 2, 3, 2]
            layer_transpose = layer_scaled_dot_product_attention.transpose(1, 2)  # f64[1, 3, 2, 2]
            layer_flatten = layer_transpose.flatten(2)  # f64[1, 3, 4]
            layer_linear_1 = functional.linear(layer_flatten, self_attn_out_proj_weight, self_attn_out_proj_bias)  # f64[1, 3, 4]
            layer_add = args_0 + layer_linear_1  # f64[1, 3, 4]
            layer_layer_norm_1 = functional.layer_norm(layer_add, (4,), weight=norm2_weight, bias=norm2_bias, eps=1e-05)  # f64[1, 3, 4]
            layer_linear_2 = functional.linear(layer_layer_norm_1, linear1_weight, linear1_bias)  # f64[1, 3, 6]
            layer_relu = functional.relu(layer_linear_2, inplace=False)  # f64[1, 3, 6]
            layer_linear_3 = functional.linear(layer_relu, linear2_weight, linear2_bias)  # f64[1, 3, 4]
            layer_add_1 = layer_add + layer_linear_3  # f64[1, 3, 4]
            return (layer_add_1,)
        """,
    )
