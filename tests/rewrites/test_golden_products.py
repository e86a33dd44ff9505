"""What becomes of weights and of the products that read a norm, as text: the docstring's before and after, with every name in it.

Each test runs the pipeline on a small model up to one pass, and compares the graph in front of the pass and behind it
with what stands here. The graphs are run as well (``golden.before_and_after``). ``expectations`` says how the texts are
written anew.
"""

# ruff: noqa: E501

from __future__ import annotations

import torch
from expectations import assert_expected
from golden import D, Plain, before_and_after, ready, rows
from torch import Tensor, nn
from torch.nn import functional
from torch_versions import unless_old

from lncompile.lowering.target import compiled_for

pytestmark = unless_old("Dynamo spells some graphs otherwise")


class Block(nn.Module):
    """The end of GPT-2's block: a stream, what is added to it, a norm, and a product that reads the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.projection = nn.Embedding(7, D), nn.Linear(D, D)
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        stream = self.table(ids) + self.projection(x)
        return self.down(functional.gelu(self.up(self.norm(stream))))


IDS = torch.tensor([1, 5, 2])


def test_absorb() -> None:
    """``W diag(γ)`` and ``b + Wβ``: the norm hands out the normalised row."""
    before, after = before_and_after("absorb", ready(Block()), IDS, rows(), absorb_affine="on")
    assert_expected(
        before,
        """
            forward(table_weight, ids, projection_weight, projection_bias, x, norm_weight, norm_bias, up_weight,
            up_bias, down_weight, down_bias):
            projection_bias_centered_to = projection_bias.to(float64)
            projection_bias_centered_mean = torch.mean(projection_bias_centered_to, [0], True)
            projection_bias_centered_sub = torch.sub(projection_bias_centered_to, projection_bias_centered_mean)
            projection_bias_centered_to_1 = projection_bias_centered_sub.to(float64)  # f64[4]
            projection_weight_centered_to = projection_weight.to(float64)
            projection_weight_centered_mean = torch.mean(projection_weight_centered_to, [0], True)
            projection_weight_centered_sub = torch.sub(projection_weight_centered_to, projection_weight_centered_mean)
            projection_weight_centered_to_1 = projection_weight_centered_sub.to(float64)  # f64[4, 4]
            table_weight_centered_to = table_weight.to(float64)
            table_weight_centered_mean = torch.mean(table_weight_centered_to, [1], True)
            table_weight_centered_sub = torch.sub(table_weight_centered_to, table_weight_centered_mean)
            table_weight_centered_to_1 = table_weight_centered_sub.to(float64)  # f64[7, 4]
            embedding = functional.embedding(ids, table_weight_centered_to_1, None, None, 2.0, False, False)  # f64[3, 4]
            linear = functional.linear(x, projection_weight_centered_to_1, projection_bias_centered_to_1)  # f64[3, 4]
            stream = embedding + linear  # f64[3, 4]
            layer_norm = functional.layer_norm(stream, (4,), norm_weight, norm_bias, 1e-05)  # f64[3, 4]
            linear_1 = functional.linear(layer_norm, up_weight, up_bias)  # f64[3, 8]
            gelu = functional.gelu(linear_1)  # f64[3, 8]
            linear_2 = functional.linear(gelu, down_weight, down_bias)  # f64[3, 5]
            return (linear_2,)
        """,
    )
    assert_expected(
        after,
        """
            forward(table_weight, ids, projection_weight, projection_bias, x, norm_weight, norm_bias, up_weight,
            up_bias, down_weight, down_bias):
            up_bias_affine_bias_to = up_weight.to(float64)
            up_bias_affine_bias_movedim = torch.movedim(up_bias_affine_bias_to, 1, -1)
            up_bias_affine_bias_to_1 = norm_bias.to(float64)
            up_bias_affine_bias_matmul = torch.matmul(up_bias_affine_bias_movedim, up_bias_affine_bias_to_1)
            up_bias_affine_bias_unsqueeze = torch.unsqueeze(up_bias_affine_bias_matmul, -1)
            up_bias_affine_bias_flatten = torch.flatten(up_bias_affine_bias_unsqueeze, 1)
            up_bias_affine_bias_sum = torch.sum(up_bias_affine_bias_flatten, 1)
            up_bias_affine_bias_to_2 = up_bias.to(float64)
            up_bias_affine_bias_add = torch.add(up_bias_affine_bias_to_2, up_bias_affine_bias_sum)
            up_bias_affine_bias_to_3 = up_bias_affine_bias_add.to(float64)  # f64[8]
            up_weight_affine_to = up_weight.to(float64)
            up_weight_affine_movedim = torch.movedim(up_weight_affine_to, 1, -1)
            up_weight_affine_to_1 = norm_weight.to(float64)
            up_weight_affine_mul = torch.mul(up_weight_affine_movedim, up_weight_affine_to_1)
            up_weight_affine_movedim_1 = torch.movedim(up_weight_affine_mul, -1, 1)
            up_weight_affine_to_2 = up_weight_affine_movedim_1.to(float64)  # f64[8, 4]
            projection_bias_centered_to = projection_bias.to(float64)
            projection_bias_centered_mean = torch.mean(projection_bias_centered_to, [0], True)
            projection_bias_centered_sub = torch.sub(projection_bias_centered_to, projection_bias_centered_mean)
            projection_bias_centered_to_1 = projection_bias_centered_sub.to(float64)  # f64[4]
            projection_weight_centered_to = projection_weight.to(float64)
            projection_weight_centered_mean = torch.mean(projection_weight_centered_to, [0], True)
            projection_weight_centered_sub = torch.sub(projection_weight_centered_to, projection_weight_centered_mean)
            projection_weight_centered_to_1 = projection_weight_centered_sub.to(float64)  # f64[4, 4]
            table_weight_centered_to = table_weight.to(float64)
            table_weight_centered_mean = torch.mean(table_weight_centered_to, [1], True)
            table_weight_centered_sub = torch.sub(table_weight_centered_to, table_weight_centered_mean)
            table_weight_centered_to_1 = table_weight_centered_sub.to(float64)  # f64[7, 4]
            embedding = functional.embedding(ids, table_weight_centered_to_1, None, None, 2.0, False, False)  # f64[3, 4]
            linear = functional.linear(x, projection_weight_centered_to_1, projection_bias_centered_to_1)  # f64[3, 4]
            stream = embedding + linear  # f64[3, 4]
            layer_norm = functional.layer_norm(stream, (4,), None, None, 1e-05)  # f64[3, 4]
            linear_1 = functional.linear(layer_norm, up_weight_affine_to_2, up_bias_affine_bias_to_3)  # f64[3, 8]
            gelu = functional.gelu(linear_1)  # f64[3, 8]
            linear_2 = functional.linear(gelu, down_weight, down_bias)  # f64[3, 5]
            return (linear_2,)
        """,
    )


def test_hoist() -> None:
    """What is computed of parameters alone becomes an extra input."""
    before, after = before_and_after("hoist", ready(Plain()), rows())
    assert_expected(
        before,
        """
            forward(linear_weight, linear_bias, x, norm_weight, norm_bias):
            linear_bias_centered_to = linear_bias.to(float64)
            linear_bias_centered_mean = torch.mean(linear_bias_centered_to, [0], True)
            linear_bias_centered_sub = torch.sub(linear_bias_centered_to, linear_bias_centered_mean)
            linear_bias_centered_to_1 = linear_bias_centered_sub.to(float64)  # f64[4]
            linear_weight_centered_to = linear_weight.to(float64)
            linear_weight_centered_mean = torch.mean(linear_weight_centered_to, [0], True)
            linear_weight_centered_sub = torch.sub(linear_weight_centered_to, linear_weight_centered_mean)
            linear_weight_centered_to_1 = linear_weight_centered_sub.to(float64)  # f64[4, 4]
            linear = functional.linear(x, linear_weight_centered_to_1, linear_bias_centered_to_1)  # f64[3, 4]
            layer_norm = functional.layer_norm(linear, (4,), norm_weight, norm_bias, 1e-05)  # f64[3, 4]
            return (layer_norm,)
        """,
    )
    assert_expected(
        after,
        """
            forward(linear_weight, linear_bias, x, norm_weight, norm_bias,
            linear_weight_centered_to_1_materialized, linear_bias_centered_to_1_materialized):
            linear = functional.linear(x, linear_weight_centered_to_1_materialized, linear_bias_centered_to_1_materialized)  # f64[3, 4]
            layer_norm = functional.layer_norm(linear, (4,), norm_weight, norm_bias, 1e-05)  # f64[3, 4]
            return (layer_norm,)
        """,
    )


def test_defer() -> None:
    """``s ⊙ (x W)`` in the place of ``(s ⊙ x) W``: the normalised tensor is never written."""
    before, after = before_and_after("defer", ready(Block()), IDS, rows(), defer="on")
    assert_expected(
        before,
        """
            forward(table_weight, ids, projection_weight, projection_bias, x, norm_weight, norm_bias, up_weight,
            up_bias, down_weight, down_bias, table_weight_centered_to_1_materialized,
            projection_weight_centered_to_1_materialized, projection_bias_centered_to_1_materialized,
            up_weight_affine_to_2_materialized, up_bias_affine_bias_to_3_materialized):
            embedding = functional.embedding(ids, table_weight_centered_to_1_materialized, None, None, 2.0, False, False)  # f64[3, 4]
            linear = functional.linear(x, projection_weight_centered_to_1_materialized, projection_bias_centered_to_1_materialized)  # f64[3, 4]
            stream = embedding + linear  # f64[3, 4]
            layer_norm = functional.layer_norm(stream, (4,), None, None, 1e-05)  # f64[3, 4]
            linear_1 = functional.linear(layer_norm, up_weight_affine_to_2_materialized, up_bias_affine_bias_to_3_materialized)  # f64[3, 8]
            gelu = functional.gelu(linear_1)  # f64[3, 8]
            linear_2 = functional.linear(gelu, down_weight, down_bias)  # f64[3, 5]
            return (linear_2,)
        """,
    )
    assert_expected(
        after,
        """
            forward(table_weight, ids, projection_weight, projection_bias, x, norm_weight, norm_bias, up_weight,
            up_bias, down_weight, down_bias, table_weight_centered_to_1_materialized,
            projection_weight_centered_to_1_materialized, projection_bias_centered_to_1_materialized,
            up_weight_affine_to_2_materialized, up_bias_affine_bias_to_3_materialized):
            embedding = functional.embedding(ids, table_weight_centered_to_1_materialized, None, None, 2.0, False, False)  # f64[3, 4]
            linear = functional.linear(x, projection_weight_centered_to_1_materialized, projection_bias_centered_to_1_materialized)  # f64[3, 4]
            stream = embedding + linear  # f64[3, 4]
            layer_norm_scale_to = stream.to(float64)  # f64[3, 4]
            layer_norm_scale_mul = torch.mul(layer_norm_scale_to, layer_norm_scale_to)  # f64[3, 4]
            layer_norm_scale_mean = torch.mean(layer_norm_scale_mul, [-1], True)  # f64[3, 1]
            layer_norm_scale_add = torch.add(layer_norm_scale_mean, 1e-05)  # f64[3, 1]
            layer_norm_scale_rsqrt = torch.rsqrt(layer_norm_scale_add)  # f64[3, 1]
            layer_norm_scale_contiguous = layer_norm_scale_rsqrt.contiguous()  # f64[3, 1]
            layer_norm_scale_as_strided = torch.as_strided(layer_norm_scale_contiguous, (3, 1), (1, 1), 0)  # f64[3, 1]
            layer_norm_rows_contiguous = stream.contiguous()  # f64[3, 4]
            linear_1 = functional.linear(layer_norm_rows_contiguous, up_weight_affine_to_2_materialized, None)  # f64[3, 8]
            linear_1_scaled_to = linear_1.to(float64)  # f64[3, 8]
            linear_1_scaled_mul = torch.mul(linear_1_scaled_to, layer_norm_scale_as_strided)  # f64[3, 8]
            linear_1_scaled_add = torch.add(linear_1_scaled_mul, up_bias_affine_bias_to_3_materialized)  # f64[3, 8]
            linear_1_scaled_to_1 = linear_1_scaled_add.to(float64)  # f64[3, 8]
            gelu = functional.gelu(linear_1_scaled_to_1)  # f64[3, 8]
            linear_2 = functional.linear(gelu, down_weight, down_bias)  # f64[3, 5]
            return (linear_2,)
        """,
    )


def test_matrix_vector() -> None:
    """A product of one row is a sum, and on a GPU its norm is computed inside."""
    with compiled_for(torch.device("cuda")):
        before, after = before_and_after("matrix_vector", ready(Block()), IDS[:1], rows()[:1], matrix_vector="on")
    assert_expected(
        before,
        """
            forward(table_weight, ids, projection_weight, projection_bias, x, norm_weight, norm_bias, up_weight,
            up_bias, down_weight, down_bias, table_weight_centered_to_1_materialized,
            projection_weight_centered_to_1_materialized, projection_bias_centered_to_1_materialized):
            embedding = functional.embedding(ids, table_weight_centered_to_1_materialized, None, None, 2.0, False, False)  # f64[1, 4]
            linear = functional.linear(x, projection_weight_centered_to_1_materialized, projection_bias_centered_to_1_materialized)  # f64[1, 4]
            stream = embedding + linear  # f64[1, 4]
            layer_norm = functional.layer_norm(stream, (4,), norm_weight, norm_bias, 1e-05)  # f64[1, 4]
            linear_1 = functional.linear(layer_norm, up_weight, up_bias)  # f64[1, 8]
            gelu = functional.gelu(linear_1)  # f64[1, 8]
            linear_2 = functional.linear(gelu, down_weight, down_bias)  # f64[1, 5]
            return (linear_2,)
        """,
    )
    assert_expected(
        after,
        """
            forward(table_weight, ids, projection_weight, projection_bias, x, norm_weight, norm_bias, up_weight,
            up_bias, down_weight, down_bias, table_weight_centered_to_1_materialized,
            projection_weight_centered_to_1_materialized, projection_bias_centered_to_1_materialized):
            embedding = functional.embedding(ids, table_weight_centered_to_1_materialized, None, None, 2.0, False, False)  # f64[1, 4]
            linear_reshape = torch.reshape(x, [1, -1])  # f64[1, 4]
            linear_to = linear_reshape.to(float64)  # f64[1, 4]
            linear_to_1 = projection_weight_centered_to_1_materialized.to(float64)  # f64[4, 4]
            linear_mul = torch.mul(linear_to_1, linear_to)  # f64[4, 4]
            linear_sum = torch.sum(linear_mul, [1])  # f64[4]
            linear_add = torch.add(linear_sum, projection_bias_centered_to_1_materialized)  # f64[4]
            linear_to_2 = linear_add.to(float64)  # f64[4]
            linear_reshape_1 = torch.reshape(linear_to_2, (1, 4))  # f64[1, 4]
            linear_reshape_1_as_strided = torch.as_strided(linear_reshape_1, (1, 4), (4, 1), 0)  # f64[1, 4]
            stream = embedding + linear_reshape_1_as_strided  # f64[1, 4]
            stream_as_strided = torch.as_strided(stream, (1, 4), (4, 1), 0)  # f64[1, 4]
            linear_1_to = up_weight.to(float64)  # f64[8, 4]
            linear_1_reshape = torch.reshape(stream_as_strided, [1, -1])  # f64[1, 4]
            linear_1_to_1 = linear_1_reshape.to(float64)  # f64[1, 4]
            linear_1_mul = torch.mul(linear_1_to_1, linear_1_to_1)  # f64[1, 4]
            linear_1_expand = linear_1_mul.expand((8, 4))  # f64[8, 4]
            linear_1_mean = torch.mean(linear_1_expand, [1])  # f64[8]
            linear_1_mul_1 = torch.mul(linear_1_to_1, norm_weight)  # f64[1, 4]
            linear_1_mul_2 = torch.mul(linear_1_to, linear_1_mul_1)  # f64[8, 4]
            linear_1_sum = torch.sum(linear_1_mul_2, [1])  # f64[8]
            linear_1_add = torch.add(linear_1_mean, 1e-05)  # f64[8]
            linear_1_rsqrt = torch.rsqrt(linear_1_add)  # f64[8]
            linear_1_mul_3 = torch.mul(linear_1_sum, linear_1_rsqrt)  # f64[8]
            linear_1_mul_4 = torch.mul(linear_1_to, norm_bias)  # f64[8, 4]
            linear_1_sum_1 = torch.sum(linear_1_mul_4, [1])  # f64[8]
            linear_1_add_1 = torch.add(linear_1_mul_3, linear_1_sum_1)  # f64[8]
            linear_1_add_2 = torch.add(linear_1_add_1, up_bias)  # f64[8]
            linear_1_to_2 = linear_1_add_2.to(float64)  # f64[8]
            linear_1_reshape_1 = torch.reshape(linear_1_to_2, (1, 8))  # f64[1, 8]
            linear_1_reshape_1_as_strided = torch.as_strided(linear_1_reshape_1, (1, 8), (8, 1), 0)  # f64[1, 8]
            gelu = functional.gelu(linear_1_reshape_1_as_strided)  # f64[1, 8]
            gelu_as_strided = torch.as_strided(gelu, (1, 8), (8, 1), 0)  # f64[1, 8]
            linear_2_reshape = torch.reshape(gelu_as_strided, [1, -1])  # f64[1, 8]
            linear_2_to = linear_2_reshape.to(float64)  # f64[1, 8]
            linear_2_to_1 = down_weight.to(float64)  # f64[5, 8]
            linear_2_mul = torch.mul(linear_2_to_1, linear_2_to)  # f64[5, 8]
            linear_2_sum = torch.sum(linear_2_mul, [1])  # f64[5]
            linear_2_add = torch.add(linear_2_sum, down_bias)  # f64[5]
            linear_2_to_2 = linear_2_add.to(float64)  # f64[5]
            linear_2_reshape_1 = torch.reshape(linear_2_to_2, (1, 5))  # f64[1, 5]
            linear_2_reshape_1_as_strided = torch.as_strided(linear_2_reshape_1, (1, 5), (5, 1), 0)  # f64[1, 5]
            return (linear_2_reshape_1_as_strided,)
        """,
    )


class Transposed(nn.Module):
    """A norm in front of a weight that is kept as ``[in, out]``, as GPT-2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(5, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) @ self.head.weight


def test_transpose() -> None:
    """A sum reads the rows of its weight one after the other, from a copy where they lie otherwise."""
    before, after = before_and_after("transpose", ready(Transposed()), rows()[:1], matrix_vector="on")
    assert_expected(
        before,
        """
            forward(linear_weight, linear_bias, x, norm_weight, norm_bias, head_weight):
            linear_bias_centered_to = linear_bias.to(float64)
            linear_bias_centered_mean = torch.mean(linear_bias_centered_to, [0], True)
            linear_bias_centered_sub = torch.sub(linear_bias_centered_to, linear_bias_centered_mean)
            linear_bias_centered_to_1 = linear_bias_centered_sub.to(float64)  # f64[4]
            linear_weight_centered_to = linear_weight.to(float64)
            linear_weight_centered_mean = torch.mean(linear_weight_centered_to, [0], True)
            linear_weight_centered_sub = torch.sub(linear_weight_centered_to, linear_weight_centered_mean)
            linear_weight_centered_to_1 = linear_weight_centered_sub.to(float64)  # f64[4, 4]
            linear = functional.linear(x, linear_weight_centered_to_1, linear_bias_centered_to_1)  # f64[1, 4]
            layer_norm = functional.layer_norm(linear, (4,), norm_weight, norm_bias, 1e-05)  # f64[1, 4]
            matmul = layer_norm @ head_weight  # f64[1, 5]
            return (matmul,)
        """,
    )
    assert_expected(
        after,
        """
            forward(linear_weight, linear_bias, x, norm_weight, norm_bias, head_weight):
            linear_bias_centered_to = linear_bias.to(float64)
            linear_bias_centered_mean = torch.mean(linear_bias_centered_to, [0], True)
            linear_bias_centered_sub = torch.sub(linear_bias_centered_to, linear_bias_centered_mean)
            linear_bias_centered_to_1 = linear_bias_centered_sub.to(float64)  # f64[4]
            linear_weight_centered_to = linear_weight.to(float64)
            linear_weight_centered_mean = torch.mean(linear_weight_centered_to, [0], True)
            linear_weight_centered_sub = torch.sub(linear_weight_centered_to, linear_weight_centered_mean)
            linear_weight_centered_to_1 = linear_weight_centered_sub.to(float64)  # f64[4, 4]
            linear = functional.linear(x, linear_weight_centered_to_1, linear_bias_centered_to_1)  # f64[1, 4]
            layer_norm = functional.layer_norm(linear, (4,), norm_weight, norm_bias, 1e-05)  # f64[1, 4]
            head_weight_transposed_t = torch.t(head_weight)  # f64[5, 4]
            head_weight_transposed_contiguous = head_weight_transposed_t.contiguous()  # f64[5, 4]
            head_weight_turned_t = torch.t(head_weight_transposed_contiguous)  # f64[4, 5]
            matmul = layer_norm @ head_weight_turned_t  # f64[1, 5]
            return (matmul,)
        """,
    )
