"""Every rule's identity, checked by what it promises: one linear layer, the operation, a LayerNorm.

Each case builds ``LN(op(source(x), ...))`` where every operand of the operation that must be centered comes out of a
linear layer. If the rule is right the site folds and the float64 output equals eager's; if a case must not fold, the
reason is checked. A rule without a case fails ``test_every_rule_has_a_case``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile import Reason
from lncompile.passes.canonical import canonicalise
from lncompile.passes.rules import RULES

pytestmark = pytest.mark.usefixtures("without_inductor")

D = 12
aten = torch.ops.aten


class Around(nn.Module):
    """Two streams ``[2, 5, 12]`` out of linear layers, an operation, and a LayerNorm over the last axes."""

    def __init__(self, operation: Callable[..., Tensor], norm: int | tuple[int, ...] = D) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, D), nn.Linear(7, D)
        self.norm = nn.LayerNorm(norm)
        self.scale = nn.Parameter(torch.zeros(D))
        self.row = nn.Parameter(torch.zeros(1, 5, 1))
        self.table = nn.Embedding(9, D, padding_idx=0)
        self.weight = nn.Parameter(torch.zeros(D, D))
        self.bias = nn.Parameter(torch.zeros(D))
        self.convolution = nn.Conv1d(5, D, 3, padding=1)
        self.image_convolution = nn.Conv2d(3, D, 2, stride=2)
        self.grouped = nn.Conv1d(6, D, 3, padding=1, groups=3)
        self.transposed = nn.ConvTranspose2d(3, D, 2)
        self.attention = nn.MultiheadAttention(D, 3, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))
        self.operation = operation

    def forward(self, value: Tensor, extra: dict[str, Tensor]) -> Tensor:
        return self.norm(self.operation(self, self.one(value), self.two(value), extra))


@dataclass(frozen=True)
class Case:
    rules: str
    operation: Callable[..., Tensor]
    reason: Reason | None = None
    norm: int | tuple[int, ...] = D


def written_mask(mask: Tensor) -> Tensor:
    mask = mask.expand(2, 5, D).clone()
    mask[..., :3] = ~mask[..., :3]
    return mask


def filled(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:] = y[:, 1:]
    return x


def cut_token(m: Around) -> Tensor:
    token = m.scale.expand(5, D).reshape(12, 5)
    return token + torch.relu(token).mean(-1, keepdim=True)


def raw_token(m: Around, x: Tensor) -> Tensor:
    token = m.scale[None, None].expand(2, 1, -1)
    return torch.cat((token, x), 1) + torch.relu(token).mean(-1, keepdim=True)


def with_weights(m: Around, x: Tensor) -> Tensor:
    output, weights = m.attention(torch.relu(x), torch.relu(x), torch.relu(x), need_weights=True)
    return output + weights.sum(-1, keepdim=True)


def iadd(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def folds(rules: str, operation: Callable[..., Tensor], norm: int | tuple[int, ...] = D) -> Case:
    return Case(rules, operation, None, norm)


def stays(rules: str, reason: Reason, operation: Callable[..., Tensor], norm: int | tuple[int, ...] = D) -> Case:
    return Case(rules, operation, reason, norm)


# m: the module (for parameters); x, y: streams [2, 5, 12]; e: other inputs.
CASES = {
    # --- sums: C(x ± αy) = Cx ± αCy ---
    "operator_add": folds("add", lambda m, x, y, e: x + y),
    "torch_add_alpha": folds("add", lambda m, x, y, e: torch.add(x, y, alpha=3)),
    "method_add": folds("add", lambda m, x, y, e: x.add(y, alpha=-2)),
    "aten_add": folds("add", lambda m, x, y, e: aten.add.Tensor(x, y)),
    "iadd": folds("add", lambda m, x, y, e: iadd(x, y)),
    "add_in_place": folds("add", lambda m, x, y, e: x.add_(y)),
    "add_number": folds("add", lambda m, x, y, e: 2.5 + x),
    "add_number_in_place": folds("add", lambda m, x, y, e: iadd(x, 2)),
    "add_row_constant_along_features": folds("add", lambda m, x, y, e: x + e["row"]),
    "add_parameter": folds("add", lambda m, x, y, e: x + m.scale),
    "add_row_parameter": folds("add", lambda m, x, y, e: x + m.row),
    "add_itself": folds("add", lambda m, x, y, e: x + x),
    "sub": folds("sub", lambda m, x, y, e: x - y),
    "number_minus": folds("sub rsub", lambda m, x, y, e: 1 - x),
    "torch_rsub": folds("rsub", lambda m, x, y, e: torch.rsub(x, y)),
    "neg": folds("neg", lambda m, x, y, e: -x),
    "positive": folds("identity", lambda m, x, y, e: torch.positive(x)),
    # --- scalings: C(s ⊙ x) = s ⊙ Cx for s constant along A ---
    "mul_number": folds("mul", lambda m, x, y, e: 0.5 * x),
    "mul_gate_per_token": folds("mul", lambda m, x, y, e: e["row"] * x),
    "mul_computed_gate_per_token": folds("mul", lambda m, x, y, e: x * torch.sigmoid(e["u"].mean(-1, keepdim=True))),
    "mul_row_parameter": folds("mul", lambda m, x, y, e: x * m.row),
    "div": folds("div", lambda m, x, y, e: x / e["row"]),
    "idiv": folds("div", lambda m, x, y, e: x.div_(1.5)),
    "layer_scale": folds("mul", lambda m, x, y, e: y + functional.dropout(x, 0.1, False) * m.scale),
    "layer_scale_first": folds("mul", lambda m, x, y, e: m.scale * x),
    "mul_gate_along_features": stays("mul", Reason.VARYING_SCALE, lambda m, x, y, e: x * e["u"]),
    "mul_two_streams": stays("mul", Reason.VARYING_SCALE, lambda m, x, y, e: x * y),
    "square": stays("mul", Reason.VARYING_SCALE, lambda m, x, y, e: x * x),
    "layer_scale_on_a_sum": stays("mul", Reason.VARYING_SCALE, lambda m, x, y, e: (x + y) * m.scale),
    "layer_scale_of_something_used_twice": stays(
        "mul", Reason.VARYING_SCALE, lambda m, x, y, e: x * m.scale + torch.relu(x).mean(-1, keepdim=True)),
    "div_by_features": stays("div", Reason.VARYING_SCALE, lambda m, x, y, e: x / (m.scale + 5)),
    "div_rounding": stays("div", Reason.NON_COMMUTING, lambda m, x, y, e: torch.div(x, 0.1, rounding_mode="floor")),
    "number_over": stays("div", Reason.VARYING_SCALE, lambda m, x, y, e: 1 / x),
    # --- casts, copies, dropout ---
    "to_and_back": folds("to cast", lambda m, x, y, e: x.to(torch.float64).double().contiguous().clone().detach()),
    "to_keyword": folds("to", lambda m, x, y, e: x.to(dtype=torch.float64, copy=True)),
    "type_as": folds("type_as", lambda m, x, y, e: x.type_as(e["u"])),
    "type_as_of_stream": folds("type_as", lambda m, x, y, e: x + e["u"].mean(-1, keepdim=True).type_as(x)),
    "dropout_eval": folds("dropout", lambda m, x, y, e: functional.dropout(x, 0.5, training=False)),
    "dropout_eval_in_place": folds("dropout", lambda m, x, y, e: functional.dropout(x, 0.5, False, True) + x),
    "dropout_training_p0": folds("dropout", lambda m, x, y, e: functional.dropout(x, 0.0, training=True)),
    "cast_to_integers": stays("to", Reason.UNKNOWN_OPERATION, lambda m, x, y, e: x.to(torch.int64).to(torch.float64)),
    # --- masks ---
    "where": folds("where", lambda m, x, y, e: torch.where(e["mask"], x, y)),
    "where_number": folds("where", lambda m, x, y, e: torch.where(e["mask"], x, 0.5)),
    "where_along_features": stays("where", Reason.VARYING_SCALE, lambda m, x, y, e: torch.where(e["u"] > 0, x, y)),
    "masked_fill": folds("masked_fill", lambda m, x, y, e: x.masked_fill(e["mask"], 3.0)),
    "masked_fill_along_features": stays(
        "masked_fill", Reason.VARYING_SCALE, lambda m, x, y, e: x.masked_fill(e["u"] > 0, 3.0)),
    # --- views ---
    "view": folds("view", lambda m, x, y, e: x.view(10, D)),
    "view_infer": folds("view", lambda m, x, y, e: x.view(-1, D).view([2, 5, D])),
    "split_features_and_merge": folds("view flatten", lambda m, x, y, e: x.view(2, 5, 3, 4).flatten(2)),
    "reshape": folds("reshape", lambda m, x, y, e: torch.reshape(x, (5, 2, D))),
    "view_as": folds("view_as", lambda m, x, y, e: x.view_as(e["u"])),
    "flatten": folds("flatten", lambda m, x, y, e: x.flatten(0, 1)),
    "unflatten": folds("unflatten", lambda m, x, y, e: x.unflatten(1, (5, 1))),
    "squeeze": folds("squeeze unsqueeze", lambda m, x, y, e: x.unsqueeze(1).squeeze(1)),
    "norm_over_heads": folds("view", lambda m, x, y, e: x.view(2, 5, 3, 4), norm=4),
    "norm_over_two_axes": folds("view", lambda m, x, y, e: x.view(2, 5, 3, 4), norm=(3, 4)),
    "view_cuts_features": stays("reshape", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.reshape(2, 4, 15), norm=15),
    "view_joins_tokens": stays("reshape", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.reshape(2, 60), norm=60),
    # --- permutations ---
    "permute": folds("permute", lambda m, x, y, e: x.permute(1, 0, 2)),
    "permute_there_and_back": folds(
        "permute transpose movedim", lambda m, x, y, e: x.permute(2, 0, 1).transpose(0, 1).movedim(1, -1)),
    "permute_list": folds("permute", lambda m, x, y, e: torch.permute(x, dims=(1, 0, 2))),
    "mT": folds("mT transpose", lambda m, x, y, e: x.mT.transpose(-1, -2)),
    "t": folds("t", lambda m, x, y, e: x[0].t().t()),
    "T_attribute": folds("t", lambda m, x, y, e: x[0].T.T),
    # Centering over the tokens passes the linear layer on another axis and reaches the caller's tensor.
    "transposed_norm": stays("transpose", Reason.USER_TENSOR, lambda m, x, y, e: x.transpose(1, 2), norm=5),
    # --- expansions ---
    "expand": folds("expand", lambda m, x, y, e: x[:, :1].expand(-1, 5, -1) + y),
    "expand_as": folds("expand_as", lambda m, x, y, e: x[:, :1].expand_as(y)),
    "expand_along_features": folds("expand", lambda m, x, y, e: x + e["row"].expand(2, 5, D)),
    "repeat": folds("repeat", lambda m, x, y, e: x.repeat(1, 2, 1)),
    "repeat_new_axis": folds("repeat", lambda m, x, y, e: x.repeat(3, 1, 1, 1)),
    "repeat_features": stays("repeat", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.repeat(1, 1, 2), norm=2 * D),
    # --- joins and cuts ---
    "cat": folds("cat", lambda m, x, y, e: torch.cat((x, y), dim=1)),
    "cat_parameter": folds("cat expand", lambda m, x, y, e: torch.cat([m.scale.expand(2, 1, -1), x], 1)),
    "cat_features": stays("cat", Reason.DIFFERENT_AXES, lambda m, x, y, e: torch.cat((x, y), -1), norm=2 * D),
    "stack": folds("stack", lambda m, x, y, e: torch.stack((x, y), dim=1)),
    "stack_features": stays(
        "stack", Reason.DIFFERENT_AXES, lambda m, x, y, e: torch.stack((x, y), dim=-1).flatten(-2), norm=2 * D),
    "split": folds("split getitem", lambda m, x, y, e: x.split([2, 3], dim=1)[1]),
    "chunk": folds("chunk getitem", lambda m, x, y, e: sum(torch.cat((x, y), 1).chunk(2, dim=1))),
    "unbind": folds("unbind getitem", lambda m, x, y, e: x.unbind(1)[2]),
    "chunk_features": folds("chunk", lambda m, x, y, e: x.chunk(2, dim=-1)[0], norm=6),
    "slice": folds("getitem", lambda m, x, y, e: x[:, 1:4]),
    "class_token": folds("getitem", lambda m, x, y, e: x[:, 0]),
    "ellipsis": folds("getitem", lambda m, x, y, e: x[..., 1:3, :]),
    "new_axis": folds("getitem", lambda m, x, y, e: x[:, None, 1:, :]),
    "index_tensor": folds("getitem", lambda m, x, y, e: x[e["rows"]]),
    "index_tensors": folds("getitem", lambda m, x, y, e: x[e["rows"], e["columns"]]),
    "index_tensor_and_number": folds("getitem", lambda m, x, y, e: x[0, e["columns"]]),
    "slice_features": folds("getitem", lambda m, x, y, e: x[..., :6], norm=6),
    "index_features": stays("getitem", Reason.DIFFERENT_AXES, lambda m, x, y, e: x[:, :, e["features"]], norm=3),
    "boolean_index": stays(
        "getitem", Reason.UNKNOWN_OPERATION, lambda m, x, y, e: x[torch.tensor([True, False])]),
    "narrow": folds("narrow", lambda m, x, y, e: x.narrow(1, 1, 3)),
    "aten_slice": folds("slice", lambda m, x, y, e: aten.slice.Tensor(x, 1, 1, 4)),
    "select": folds("select", lambda m, x, y, e: x.select(1, 2)),
    "index_select": folds("index_select", lambda m, x, y, e: torch.index_select(x, 1, e["columns"])),
    "roll": folds("roll", lambda m, x, y, e: torch.roll(x, (1, 2), dims=(0, 1))),
    "flip": folds("flip", lambda m, x, y, e: x.flip(0, 1)),
    "roll_features": stays("roll", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.roll(1, -1)),
    # --- reductions over other axes ---
    "mean_pooling": folds("mean", lambda m, x, y, e: x.mean(1)),
    "mean_keepdim": folds("mean", lambda m, x, y, e: x.mean(dim=(0, 1), keepdim=True)),
    "sum": folds("sum", lambda m, x, y, e: x.sum(1, keepdim=True) + y),
    "mean_over_features": stays("mean", Reason.DIFFERENT_AXES, lambda m, x, y, e: x - 2 * x.mean(-1, keepdim=True)),
    "mean_taken_out_and_kept": stays("mean", Reason.DIFFERENT_AXES, lambda m, x, y, e: scaler(x)),
    "centered_by_hand": folds("", lambda m, x, y, e: x + (e["u"] - e["u"].mean(-1, keepdim=True))),
    # --- products ---
    "linear": folds("linear", lambda m, x, y, e: functional.linear(torch.relu(x), m.weight, m.bias)),
    "linear_no_bias": folds("linear", lambda m, x, y, e: functional.linear(torch.relu(x), m.weight)),
    "linear_scaled_weight": folds("linear", lambda m, x, y, e: functional.linear(torch.relu(x), m.weight * 2, m.bias)),
    "linear_expression": folds(
        "linear mul", lambda m, x, y, e: functional.linear(torch.relu(x), m.weight * m.scale[:, None], m.bias)),
    "addmm": folds("addmm", lambda m, x, y, e: torch.addmm(m.bias, torch.relu(x[0]), m.weight)),
    "addmm_of_an_activation": folds("addmm", lambda m, x, y, e: torch.addmm(y[0], torch.relu(x[0]), m.weight, alpha=2)),
    "baddbmm": folds(
        "baddbmm", lambda m, x, y, e: torch.baddbmm(y, torch.relu(x), m.weight.expand(2, D, D), beta=0.5)),
    "matmul": folds("matmul", lambda m, x, y, e: torch.relu(x) @ m.weight),
    "matmul_transposed": folds("matmul t", lambda m, x, y, e: torch.relu(x) @ m.weight.T),
    "attention": folds("matmul", lambda m, x, y, e: torch.softmax(e["u"] @ e["u"].mT, -1) @ x),
    "token_mixing": folds("linear transpose", lambda m, x, y, e: functional.linear(
        torch.cat((x, y, x[:, :2]), 1).transpose(1, 2), m.weight, m.bias).transpose(1, 2)),
    "matmul_of_streams": stays("matmul", Reason.USER_TENSOR, lambda m, x, y, e: x @ y.mT, norm=5),
    "product_with_itself": stays(
        "matmul", Reason.NON_COMMUTING, lambda m, x, y, e: (sliced := x[:, :, :5]) @ sliced, norm=5),
    "embedding": folds("embedding", lambda m, x, y, e: m.table(e["columns"]) + x[0, :3]),
    "embedding_max_norm": stays(
        "embedding", Reason.MUTATION, lambda m, x, y, e: functional.embedding(e["columns"], m.weight, max_norm=1.0)),
    "convolution": folds("convolution", lambda m, x, y, e: m.convolution(e["u"]).transpose(1, 2)),
    "image_stem": folds(
        "convolution flatten", lambda m, x, y, e: m.image_convolution(e["image"]).flatten(2).transpose(1, 2)),
    "grouped_convolution": stays(
        "convolution", Reason.DIFFERENT_AXES, lambda m, x, y, e: m.grouped(e["six"]).transpose(1, 2)),
    "grouped_convolution_norm_inside_groups": folds(
        "convolution", lambda m, x, y, e: m.grouped(e["six"]).transpose(1, 2).unflatten(-1, (3, 4)), norm=4),
    "norm_over_channels_and_pixels": stays(
        "convolution", Reason.DIFFERENT_AXES, lambda m, x, y, e: m.image_convolution(e["image"]), norm=(D, 2, 2)),
    "transposed_convolution": folds(
        "transposed_convolution", lambda m, x, y, e: m.transposed(e["image"]).flatten(2).transpose(1, 2)),
    "embedding_bag": folds("embedding_bag", lambda m, x, y, e: functional.embedding_bag(
        e["columns"][None].expand(2, 3), m.table.weight, mode="sum")),
    "embedding_bag_max": stays("embedding_bag", Reason.NON_COMMUTING, lambda m, x, y, e: functional.embedding_bag(
        e["columns"][None].expand(2, 3), m.table.weight, mode="max")),
    "multi_head_attention": folds("multi_head_attention getitem", lambda m, x, y, e: x + m.attention(y, y, y)[0]),
    "multi_head_attention_with_weights": folds("multi_head_attention getitem", lambda m, x, y, e: with_weights(m, x)),
    "weight_norm": folds("linear", lambda m, x, y, e: m.normed(torch.relu(x))),
    # --- fixed coefficients along other axes ---
    "average_pool_1d": folds("average_pool_1d", lambda m, x, y, e: functional.avg_pool1d(x.mT, 2, 1, 1).mT),
    "adaptive_pool_1d": folds("average_pool_1d", lambda m, x, y, e: functional.adaptive_avg_pool1d(x.mT, 3).mT),
    "average_pool_2d": folds("average_pool_2d", lambda m, x, y, e: functional.avg_pool2d(
        m.image_convolution(e["image"]), 2, 1, ceil_mode=True).flatten(2).mT),
    "adaptive_pool_2d": folds("average_pool_2d", lambda m, x, y, e: nn.AdaptiveAvgPool2d(1)(
        m.image_convolution(e["image"])).flatten(1)),
    "average_pool_3d": folds("average_pool_3d", lambda m, x, y, e: functional.avg_pool3d(
        x.mT[..., None, None], (2, 1, 1)).flatten(2).mT),
    "average_pool_over_features": stays(
        "average_pool_1d", Reason.DIFFERENT_AXES, lambda m, x, y, e: functional.avg_pool1d(x, 3, 1, 1)),
    "interpolate": folds("interpolate", lambda m, x, y, e: functional.interpolate(
        m.image_convolution(e["image"]), size=(3, 5), mode="bicubic", align_corners=False).flatten(2).mT),
    "interpolate_features": stays(
        "interpolate", Reason.DIFFERENT_AXES, lambda m, x, y, e: functional.interpolate(x, scale_factor=2), norm=24),
    "pad": folds("pad", lambda m, x, y, e: functional.pad(x, (0, 0, 1, 2))),
    "pad_with_a_value": folds("pad", lambda m, x, y, e: functional.pad(x, (0, 0, 1, 2), value=3.0)),
    "pad_reflect": folds("pad", lambda m, x, y, e: functional.pad(x.mT, (1, 1), mode="reflect").mT),
    "pad_features": stays("pad", Reason.DIFFERENT_AXES, lambda m, x, y, e: functional.pad(x, (1, 2)), norm=15),
    "cumsum": folds("cumsum", lambda m, x, y, e: x.cumsum(1)),
    "cumsum_of_features": stays("cumsum", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.cumsum(-1)),
    "repeat_interleave": folds("repeat_interleave", lambda m, x, y, e: torch.repeat_interleave(x, 2, dim=0)),
    "index_add": folds("index_add", lambda m, x, y, e: x.index_add(1, e["columns"], y[:, :3])),
    "gather": folds("gather", lambda m, x, y, e: torch.gather(
        x, 1, e["columns"][None, :, None].expand(2, 3, D))),
    "gather_repeated_index": folds("gather", lambda m, x, y, e: torch.gather(
        x, 1, e["columns"].view(1, 3, 1).repeat(2, 1, D))),
    "gather_by_feature": stays("gather", Reason.VARYING_SCALE, lambda m, x, y, e: torch.gather(
        x, 1, (e["u"] > 0).long())),
    "gather_then_view_upstream": folds("gather", lambda m, x, y, e: torch.gather(
        x.view(2, 5, 3, 4).flatten(2), 1, e["columns"][None, :2, None].expand(2, 2, D))),
    "zeros": folds(
        "", lambda m, x, y, e: torch.zeros_like(e["u"]) + x + x.new_zeros(D) + torch.zeros(2, 5, D).double()),
    "zeros_written_to": folds("", lambda m, x, y, e: filled(torch.zeros_like(x), y) + x),
    "parameter_cut_and_read_raw": stays("", Reason.DIFFERENT_AXES, lambda m, x, y, e: cut_token(m), norm=5),
    "parameter_expanded_and_read_raw": folds("expand", lambda m, x, y, e: raw_token(m, x)),
    "lerp": folds("lerp", lambda m, x, y, e: torch.lerp(x, y, e["row"])),
    "lerp_number": folds("lerp", lambda m, x, y, e: x.lerp(y, 0.25)),
    "lerp_by_feature": stays("lerp", Reason.VARYING_SCALE, lambda m, x, y, e: torch.lerp(x, y, e["u"])),
    "where_expanded_mask": folds("where", lambda m, x, y, e: torch.where(
        ~e["mask"].expand(2, 5, D), x, y)),
    "where_expanded_mask_that_is_written_to": stays("where", Reason.VARYING_SCALE, lambda m, x, y, e: torch.where(
        written_mask(e["mask"]), x, y)),
    # --- traps and other blockers ---
    "activation": stays("", Reason.NON_COMMUTING, lambda m, x, y, e: functional.gelu(x)),
    "input": stays("", Reason.USER_TENSOR, lambda m, x, y, e: e["u"]),
    "norm_output": stays("", Reason.NORM_OUTPUT, lambda m, x, y, e: x + m.norm(y)),
    "read_by_an_activation": stays("", Reason.VISIBLE, lambda m, x, y, e: x + torch.relu(x).mean(-1, keepdim=True)),
    "read_by_a_linear_layer": stays(
        "", Reason.VISIBLE, lambda m, x, y, e: x + functional.linear(x, m.weight).mean(-1, keepdim=True)),
    "max_pooling": stays("", Reason.NON_COMMUTING, lambda m, x, y, e: functional.max_pool1d(x.mT, 2).mT),
    "softmax_sees_no_shift": folds(
        "", lambda m, x, y, e: y + torch.softmax(x, -1).mean(-1, keepdim=True)),
    "softmax_over_tokens_does": stays(
        "", Reason.DIFFERENT_AXES, lambda m, x, y, e: x + torch.softmax(x, 1).mean(-1, keepdim=True)),
    "another_norm_sees_no_shift": folds(
        "", lambda m, x, y, e: x + functional.layer_norm(x, (D,)).mean(-1, keepdim=True)),
    "centering_sees_no_shift": folds(
        "", lambda m, x, y, e: y + torch.relu(x - x.mean(-1, keepdim=True)).mean(-1, keepdim=True)),
    "variance_sees_no_shift": folds(
        "", lambda m, x, y, e: x + x.var(-1, keepdim=True) + torch.std(x, -1, keepdim=True)),
    "variance_over_tokens_does": stays("", Reason.DIFFERENT_AXES, lambda m, x, y, e: x + x.var(1, keepdim=True)),
    "metadata_sees_nothing": folds("", lambda m, x, y, e: x + torch.zeros_like(x).mean(-1, keepdim=True)),
    "plain_norm_output_has_zero_mean": folds("", lambda m, x, y, e: x + functional.layer_norm(e["u"], (D,))),
    # --- writes ---
    "stream_overwritten": folds("", lambda m, x, y, e: overwritten(x, y)),
    "written_and_read_by_the_old_name": folds("", lambda m, x, y, e: read_again(x, y)),
    "written_through_a_view": stays("", Reason.MUTATION, lambda m, x, y, e: written_through_view(x, y)),
    "inplace_activation": stays("", Reason.MUTATION, lambda m, x, y, e: inplace_relu(x)),
}  # fmt: skip


def overwritten(x: Tensor, y: Tensor) -> Tensor:
    x[:, 0] = y[:, 1]
    return x


def read_again(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1.0
    z.add_(y)
    return z


def written_through_view(x: Tensor, y: Tensor) -> Tensor:
    view = x.view(10, D)
    view += y.view(10, D)
    return x


def scaler(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return torch.relu(x - mean) * mean + x


def inplace_relu(x: Tensor) -> Tensor:
    functional.relu(x, inplace=True)
    return x


def extra_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5  # noqa: E731
    return {
        "u": rand(2, 5, D), "row": rand(2, 5, 1), "mask": rand(2, 5, 1) > 0.5, "rows": torch.tensor([1, 0, 1]),
        "columns": torch.tensor([4, 2, 0]), "features": torch.tensor([1, 5, 7]), "image": rand(2, 3, 4, 4),
        "six": rand(2, 6, 5),
    }  # fmt: skip


def run(case: Case) -> tuple[Any, Tensor, Tensor]:
    module = randomise(Around(case.operation, case.norm).double())
    value = torch.randn(2, 5, 7, dtype=torch.float64)
    compiled = torch.compile(module, backend="lnfold", options={"lnfold.assist": False}, fullgraph=True)
    actual = compiled(value, extra_inputs())
    (report,) = lncompile.reports(compiled)
    return report, actual, module(value, extra_inputs())


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    case = CASES[name]
    report, actual, expected = run(case)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    site = report.sites[-1]
    assert site.reason is case.reason, site.detail
    assert site.folded == (case.reason is None)


def test_every_rule_has_a_case() -> None:
    covered = {rule for case in CASES.values() if case.reason is None for rule in case.rules.split()}
    assert covered == set(RULES)


def test_cases_are_what_they_say() -> None:
    """The operations a case names really stand in its graph: Dynamo may have written them in another way."""
    from graphs import capture

    for name, case in CASES.items():
        module = randomise(Around(case.operation, case.norm).double())
        graph = capture(module, torch.randn(2, 5, 7, dtype=torch.float64), extra_inputs()).graph_module.graph
        found = {operation.name for node in graph.nodes if (operation := canonicalise(node)) is not None}
        named = set(case.rules.split())
        assert not named or named & found, f"{name}: {sorted(found)}"
