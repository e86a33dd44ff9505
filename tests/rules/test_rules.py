"""Every rule's identity, checked by what it promises: one linear layer, the operation, a LayerNorm.

Each case builds ``LN(op(source(x), ...))`` where every operand of the operation that must be centered comes out of a
linear layer. If the rule is right the site folds and the float64 output equals eager's; if a case must not fold, the
reason is checked. A rule without a case fails ``test_every_rule_has_a_case``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import randomise
from rule_case import (
    Around,
    Case,
    D,
    aten,
    cut_token,
    filled,
    folds,
    iadd,
    inplace_relu,
    overwritten,
    overwritten_weight,
    raw_token,
    read_again,
    rows,
    scaler,
    stays,
    with_weights,
    written_mask,
    written_through_view,
)
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile import Reason
from lncompile.passes.graph.canonical import canonicalise
from lncompile.passes.rules import RULES

pytestmark = pytest.mark.usefixtures("without_inductor")


#: Rules whose cases need a group of processes: test_sharding.py and test_distributed.py have them.
OF_SEVERAL_PROCESSES = frozenset("from_local to_local redistribute all_reduce wait_tensor".split())

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
    "number_minus": folds("sub", lambda m, x, y, e: 1 - x),
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
    "div_by_features": stays("div", Reason.VARYING_SCALE, lambda m, x, y, e: x / (e["u"] + 5)),
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
    "index_tensors_apart": folds("getitem", lambda m, x, y, e: x[:, :, None][e["rows"], :, e["zeros"]]),
    "index_tensors_with_a_new_axis_between": folds("getitem", lambda m, x, y, e: x[e["rows"], None, e["columns"]]),
    "index_tensor_behind_a_slice": folds("getitem", lambda m, x, y, e: x[:, e["columns"]]),
    "index_tensor_and_number_apart": folds("getitem", lambda m, x, y, e: x[:, :, None][0, :, e["zeros"]]),
    "index_tensor_twice": folds("getitem", lambda m, x, y, e: x[e["rows"], e["rows"]]),
    "index_tensors_apart_take_features": stays(
        "getitem", Reason.DIFFERENT_AXES, lambda m, x, y, e: x + x[e["rows"], :, e["features"]].sum()),
    "boolean_index": folds("getitem", lambda m, x, y, e: x[e["mask"][:, 0, 0]]),
    "boolean_index_of_two_axes": folds("getitem", lambda m, x, y, e: x[e["mask"][..., 0]]),
    "boolean_index_behind_a_slice": folds("getitem", lambda m, x, y, e: x[:, e["mask"][0, :, 0]]),
    "boolean_index_of_features": stays(
        "getitem", Reason.DIFFERENT_AXES, lambda m, x, y, e: x + x[:, :, e["u"][0, 0] > 0.5].sum(-1, keepdim=True)),
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
    "transposed_convolution_in_groups": stays(
        "transposed_convolution", Reason.DIFFERENT_AXES, lambda m, x, y, e: m.transposed_in_groups(e["six"]).mT),
    "transposed_convolution_norm_inside_groups": folds(
        "transposed_convolution", lambda m, x, y, e: m.transposed_in_groups(e["six"]).mT.unflatten(-1, (3, 4)), norm=4),
    "transposed_convolution_norm_inside_half_groups": folds(
        "transposed_convolution", lambda m, x, y, e: m.transposed_in_groups(e["six"]).mT.unflatten(-1, (6, 2)), norm=2),
    "transposed_convolution_norm_inside_two_groups": stays(
        "transposed_convolution", Reason.DIFFERENT_AXES,
        lambda m, x, y, e: m.transposed_in_groups(e["six"]).mT.unflatten(-1, (2, 6)), norm=6),
    "transposed_convolution_aten": folds("transposed_convolution", lambda m, x, y, e: aten.conv_transpose2d.input(
        e["image"], m.transposed.weight).flatten(2).mT),
    "any_convolution": folds("any_convolution", lambda m, x, y, e: aten.convolution.default(
        e["image"], m.image_convolution.weight, m.image_convolution.bias, [2, 2], [0, 0], [1, 1], False, [0, 0], 1
        ).flatten(2).mT),
    "any_convolution_transposed": folds("any_convolution", lambda m, x, y, e: torch.convolution(
        e["image"], m.transposed.weight, m.transposed.bias, [1, 1], [0, 0], [1, 1], True, [0, 0], 1).flatten(2).mT),
    "convolution_padding_in_words": folds("convolution", lambda m, x, y, e: torch.conv1d(
        e["u"], m.convolution.weight, padding="same").mT),
    "convolution_3d": folds("convolution", lambda m, x, y, e: functional.conv3d(
        e["image"][:, None], m.image_convolution.weight[:, None], m.bias, padding="valid").flatten(2).mT),
    "convolution_unbatched": folds("convolution", lambda m, x, y, e: functional.conv1d(
        e["u"][0], m.convolution.weight, m.bias).mT),
    # --- composed sources: C(s ⊙ (Wh + b) + t) = (C diag(s) W)h + C(s ⊙ b + t) ---
    "batch_norm_over_other_axes": folds("batch_norm", lambda m, x, y, e: m.row_batch_norm(x) + y),
    "batch_norm_torch": folds("batch_norm", lambda m, x, y, e: torch.batch_norm(
        x, m.row_batch_norm.weight, None, m.row_batch_norm.running_mean, m.row_batch_norm.running_var, False, 0.1, 1e-3,
        False)),
    "batch_norm_aten": folds("batch_norm", lambda m, x, y, e: aten.batch_norm.default(
        x, None, m.row_batch_norm.bias, m.row_batch_norm.running_mean, m.row_batch_norm.running_var, False, 0.1, 1e-3,
        False)),
    "batch_norm_of_a_convolution": folds(
        "convolution", lambda m, x, y, e: m.batch_norm(m.convolution(e["u"])).transpose(1, 2)),
    "batch_norm_of_a_convolution_without_bias": folds("convolution", lambda m, x, y, e: m.batch_norm(
        functional.conv1d(e["u"], m.convolution.weight, padding=1)).transpose(1, 2)),
    "batch_norm_without_affine": folds(
        "convolution", lambda m, x, y, e: m.plain_batch_norm(m.convolution(e["u"])).transpose(1, 2)),
    "batch_norm_of_a_transposed_convolution": folds("transposed_convolution", lambda m, x, y, e: m.image_batch_norm(
        m.transposed(e["image"])).flatten(2).mT),
    "batch_norm_of_any_convolution": folds("any_convolution", lambda m, x, y, e: m.image_batch_norm(torch.convolution(
        e["image"], m.transposed.weight, None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1)).flatten(2).mT),
    "batch_norm_of_a_grouped_convolution_norm_inside_groups": folds("convolution", lambda m, x, y, e: m.batch_norm(
        m.grouped(e["six"])).mT.unflatten(-1, (3, 4)), norm=4),
    "batch_norm_of_a_transposed_grouped_convolution_norm_inside_groups": folds(
        "transposed_convolution", lambda m, x, y, e: m.batch_norm(
            m.transposed_in_groups(e["six"])).mT.unflatten(-1, (6, 2)), norm=2),
    "batch_norm_of_a_grouped_convolution": stays(
        "convolution", Reason.VARYING_SCALE, lambda m, x, y, e: m.batch_norm(m.grouped(e["six"])).mT),
    "batch_norm_of_a_linear_layer": folds("linear", lambda m, x, y, e: m.batch_norm(functional.dropout(
        m.one(e["seven"]), 0.5, False))),
    "batch_norm_of_a_linear_layer_of_tokens": folds(
        "linear", lambda m, x, y, e: m.batch_norm(m.one(e["seven"]).view(-1, D)).view(1, 2, D)),
    "batch_norm_of_addmm": folds("addmm", lambda m, x, y, e: m.batch_norm(
        torch.addmm(m.bias, torch.relu(x[0]), m.weight))),
    "batch_norm_of_addmm_with_factors": stays("addmm", Reason.VARYING_SCALE, lambda m, x, y, e: m.batch_norm(
        torch.addmm(m.bias, torch.relu(x[0]), m.weight, beta=2))),
    "batch_norm_then_layer_scale": folds("convolution", lambda m, x, y, e: m.scale * m.batch_norm(
        m.convolution(e["u"])).transpose(1, 2)),
    "layer_scale_then_batch_norm": folds("convolution", lambda m, x, y, e: m.batch_norm(
        m.scale[:, None] * m.convolution(e["u"])).transpose(1, 2)),
    "two_batch_norms": folds("convolution", lambda m, x, y, e: m.plain_batch_norm(m.batch_norm(
        m.convolution(e["u"]))).transpose(1, 2)),
    "layer_scale_of_a_convolution": folds("convolution", lambda m, x, y, e: (
        m.image_convolution(e["image"]) * m.scale[:, None, None]).flatten(2).mT),
    "layer_scale_of_matmul": folds("matmul", lambda m, x, y, e: (torch.relu(x) @ m.weight) * m.scale),
    "layer_scale_of_an_embedding": folds("embedding", lambda m, x, y, e: m.scale * m.table(e["columns"])),
    "layer_scale_by_division": folds("linear", lambda m, x, y, e: x / (m.scale + 5)),
    "layer_scale_norm_inside_heads": folds("linear", lambda m, x, y, e: (x * m.scale).unflatten(-1, (3, 4)), norm=4),
    "batch_norm_of_matmul": stays(
        "matmul", Reason.VARYING_SCALE, lambda m, x, y, e: m.batch_norm(torch.relu(x[0]) @ m.weight)),
    "layer_scale_that_widens": stays("linear", Reason.VARYING_SCALE, lambda m, x, y, e: x[:, :1] * (
        m.scale * (m.row + 2))),
    "layer_scale_along_other_channels": stays("linear", Reason.VARYING_SCALE, lambda m, x, y, e: x.view(
        2, 5, 3, 4) * m.scale.view(3, 4), norm=(3, 4)),
    "layer_scale_of_permuted_channels": stays("linear", Reason.VARYING_SCALE, lambda m, x, y, e: x.view(
        2, 5, 3, 4).mT.flatten(2) * m.scale),
    "batch_norm_in_training": stays("batch_norm", Reason.NON_COMMUTING, lambda m, x, y, e: m.training_batch_norm(
        m.convolution(e["u"])).transpose(1, 2)),
    "batch_norm_of_something_used_twice": stays("batch_norm", Reason.VARYING_SCALE, lambda m, x, y, e: m.batch_norm(
        z := m.convolution(e["u"])).transpose(1, 2) + torch.relu(z).transpose(1, 2).mean(-1, keepdim=True)),
    "batch_norm_of_a_sum": stays(
        "batch_norm", Reason.VARYING_SCALE, lambda m, x, y, e: m.batch_norm((x + y).mT).mT),
    "batch_norm_of_another_dtype": stays("batch_norm", Reason.VARYING_SCALE, lambda m, x, y, e: m.batch_norm(
        m.convolution(e["u"]).float().double()).mT),
    "batch_norm_by_tensors_of_the_caller": stays("batch_norm", Reason.VARYING_SCALE, lambda m, x, y, e:
        functional.batch_norm(m.convolution(e["u"]), e["u"][0, 0], e["u"][0, 1] ** 2).mT),
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
    "weight_written_to": stays(
        "", Reason.NON_COMMUTING, lambda m, x, y, e: functional.linear(torch.relu(x), overwritten_weight(m))),
    "weight_made_of_one_written_to": stays(
        "", Reason.NON_COMMUTING, lambda m, x, y, e: functional.linear(torch.relu(x), overwritten_weight(m) * 3)),
    "scale_written_to": stays("mul", Reason.VARYING_SCALE, lambda m, x, y, e: x * overwritten_weight(m)[0]),
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
    # --- einsum: linear in each operand, A followed through its labels ---
    "einsum": folds("einsum", lambda m, x, y, e: torch.einsum("bti,io->bto", torch.relu(x), m.weight)),
    "einsum_transposed_weight": folds("einsum", lambda m, x, y, e: torch.einsum("oi, bti", m.weight, torch.relu(x)).mT),
    "einsum_without_arrow": folds("einsum", lambda m, x, y, e: torch.einsum("ab,bc", torch.relu(x[0]), m.weight)),
    "einsum_ellipsis": folds("einsum", lambda m, x, y, e: torch.einsum("...i,oi->...o", [torch.relu(x), m.weight])),
    "einsum_ellipsis_in_both": folds("einsum", lambda m, x, y, e: torch.einsum("...st,...td->...sd", e["square"], x)),
    "einsum_heads": folds("einsum", lambda m, x, y, e: torch.einsum(
        "bthi,hio->bto", torch.relu(x).view(2, 5, 3, 4), m.weight.view(3, 4, D))),
    "einsum_split_heads": folds("einsum", lambda m, x, y, e: torch.einsum(
        "bti,hoi->btho", torch.relu(x), m.weight.view(3, 4, D)), norm=4),
    "einsum_over_all_heads": folds("einsum", lambda m, x, y, e: torch.einsum(
        "bti,hoi->btho", torch.relu(x), m.weight.view(3, 4, D)), norm=(3, 4)),
    "einsum_attention": folds("einsum", lambda m, x, y, e: torch.einsum("bst,btd->bsd", e["square"], x)),
    "einsum_three_operands": folds("einsum", lambda m, x, y, e: torch.einsum(
        "bt,bti,io->bto", e["row"][..., 0], torch.relu(x), m.weight)),
    "einsum_sum_over_tokens": folds("einsum", lambda m, x, y, e: torch.einsum("btd->bd", x)),
    "einsum_gate_of_size_one": folds("einsum", lambda m, x, y, e: torch.einsum("btd,btd->btd", x, e["row"])),
    "einsum_aten": folds("einsum", lambda m, x, y, e: aten.einsum.default("btd,b->btd", [x, e["row"][:, 0, 0]])),
    "einsum_gate_along_features": stays("einsum", Reason.VARYING_SCALE, lambda m, x, y, e: torch.einsum(
        "btd,btd->btd", x, e["u"])),
    "einsum_scale_along_features": stays("einsum", Reason.VARYING_SCALE, lambda m, x, y, e: torch.einsum(
        "btd,d->btd", x, m.scale)),
    "einsum_ellipsis_along_features": stays("einsum", Reason.VARYING_SCALE, lambda m, x, y, e: torch.einsum(
        "...,...->...", x, e["u"])),
    "einsum_of_one_tensor_twice": stays("einsum", Reason.NON_COMMUTING, lambda m, x, y, e: torch.einsum(
        "st,td->sd", (sliced := x[0, :, :5]), sliced), norm=5),
    "einsum_outer_product": stays("einsum", Reason.DIFFERENT_AXES, lambda m, x, y, e: torch.einsum(
        "bti,btj->btij", x, y), norm=(D, D)),
    "einsum_diagonal": stays("einsum", Reason.UNKNOWN_OPERATION, lambda m, x, y, e: torch.einsum(
        "btt,btd->btd", e["square"], x)),
    "einsum_sublists": stays("einsum", Reason.UNKNOWN_OPERATION, lambda m, x, y, e: torch.einsum(
        x, [0, 1, 2], [1, 0, 2])),
    "einsum_also_contracted": stays("einsum", Reason.VISIBLE, lambda m, x, y, e: x + torch.einsum(
        "btd,btd->bt", x, e["u"])[..., None]),
    "bilinear": folds("bilinear", lambda m, x, y, e: functional.bilinear(
        torch.relu(x), torch.relu(y[..., :7]), m.cube, m.bias)),
    "bilinear_no_bias": folds("bilinear", lambda m, x, y, e: torch.bilinear(
        torch.relu(x), torch.relu(y[..., :7]), m.cube, None)),
    "bilinear_reads": stays("bilinear", Reason.VISIBLE, lambda m, x, y, e: x + functional.bilinear(
        x, y[..., :7], m.cube).mean(-1, keepdim=True)),
    # --- products with vectors ---
    "mv": folds("matmul", lambda m, x, y, e: torch.mv(m.weight, e["u"][0, 0])),
    "matmul_vector": folds("matmul", lambda m, x, y, e: x.mT @ e["u"][0, :, 0]),
    "vector_matmul": folds("matmul", lambda m, x, y, e: e["row"][0, :, 0] @ x),
    "bmm": folds("matmul", lambda m, x, y, e: torch.bmm(e["square"], x)),
    "bmm_aten": folds("matmul", lambda m, x, y, e: aten.bmm.default(e["square"], mat2=x)),
    "addmv": folds("addmv", lambda m, x, y, e: torch.addmv(m.bias, m.weight, e["u"][0, 0], beta=2, alpha=3)),
    "addmv_aten": folds("addmv", lambda m, x, y, e: aten.addmv.default(m.bias, m.weight, e["u"][0, 0])),
    "matmul_vector_sees": stays("matmul", Reason.VISIBLE, lambda m, x, y, e: x + (x @ e["u"][0, 0])[..., None]),
    "embedding_torch": folds("embedding", lambda m, x, y, e: torch.embedding(m.table.weight, e["columns"])),
    "embedding_aten": folds("embedding", lambda m, x, y, e: aten.embedding.default(m.table.weight, e["columns"], 0)),
    # --- rows written into rows ---
    "scatter": folds("scatter", lambda m, x, y, e: x.scatter(1, rows(e), y)),
    "scatter_number": folds("scatter", lambda m, x, y, e: torch.scatter(x, 1, rows(e), 3.0)),
    "scatter_aten": folds("scatter", lambda m, x, y, e: aten.scatter.src(x, 1, rows(e), y)),
    "scatter_by_feature": stays(
        "scatter", Reason.VARYING_SCALE, lambda m, x, y, e: x.scatter(1, (e["u"] > 0).long(), y)),
    "scatter_a_part": stays("scatter", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.scatter(1, rows(e)[..., :7], y)),
    "scatter_along_features": stays("scatter", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.scatter(2, rows(e), y)),
    "scatter_infinity": stays(
        "scatter", Reason.NON_COMMUTING, lambda m, x, y, e: x.scatter(1, rows(e), float("-inf"))[:, 1::2]),
    "scatter_that_multiplies": stays(
        "scatter", Reason.NON_COMMUTING, lambda m, x, y, e: x.scatter(1, rows(e), y, reduce="multiply")),
    "scatter_add": folds("scatter_add", lambda m, x, y, e: x.scatter_add(1, rows(e), y)),
    "scatter_add_aten": folds("scatter_add", lambda m, x, y, e: aten.scatter_add.default(x, 1, rows(e), y)),
    "scatter_reduce": folds("scatter_reduce", lambda m, x, y, e: x.scatter_reduce(1, rows(e), y, "mean")),
    "scatter_reduce_sum": folds("scatter_reduce", lambda m, x, y, e: torch.scatter_reduce(
        x, 1, rows(e), y, reduce="sum", include_self=False)),
    "scatter_reduce_maximum": stays(
        "scatter_reduce", Reason.NON_COMMUTING, lambda m, x, y, e: x.scatter_reduce(1, rows(e), y, "amax")),
    "index_copy": folds("index_copy", lambda m, x, y, e: x.index_copy(1, e["columns"], y[:, :3])),
    "index_copy_aten": folds("index_copy", lambda m, x, y, e: aten.index_copy.default(x, 1, e["columns"], y[:, :3])),
    "index_copy_features": stays("index_copy", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.index_copy(
        2, e["columns"], y[..., :3])),
    "index_fill": folds("index_fill", lambda m, x, y, e: x.index_fill(1, e["columns"], 2.5)),
    "index_fill_nan": stays("index_fill", Reason.NON_COMMUTING, lambda m, x, y, e: x.index_fill(
        1, e["columns"], float("nan"))[:, 1::2]),
    "index_put": folds("index_put", lambda m, x, y, e: x.index_put((e["rows"][:2], e["columns"][:2]), y[0, :2])),
    "index_put_broadcast": folds("index_put", lambda m, x, y, e: torch.index_put(
        x, (e["rows"][:2], e["columns"][:2]), m.scale)),
    "index_put_number": folds("index_put", lambda m, x, y, e: x.index_put(
        (e["rows"][:2], e["columns"][:2]), e["row"][0, 0, 0])),
    "index_put_rows": folds("index_put", lambda m, x, y, e: torch.index_put(x, [e["rows"][:2]], y)),
    "index_put_accumulate": folds("index_put", lambda m, x, y, e: aten.index_put.default(
        x, [e["rows"], e["columns"]], y[0, :3], True)),
    "index_put_mask": folds("index_put", lambda m, x, y, e: x.index_put((e["mask"][..., 0],), m.scale)),
    "index_put_mask_of_features": stays("index_put", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.index_put(
        (e["u"] > 0,), e["row"][0, 0, 0])),
    "index_put_features": stays("index_put", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.index_put(
        (e["rows"], e["columns"], e["features"]), y[0, 0, :3])),
    "slice_scatter": folds("slice_scatter", lambda m, x, y, e: torch.slice_scatter(x, y[:, :2], 1, 1, 3)),
    "slice_scatter_aten": folds("slice_scatter", lambda m, x, y, e: aten.slice_scatter.default(x, y[:, 2:], 1, 2)),
    "slice_scatter_features": stays("slice_scatter", Reason.DIFFERENT_AXES, lambda m, x, y, e: torch.slice_scatter(
        x, y[..., :2], 2, 1, 3)),
    "select_scatter": folds("select_scatter", lambda m, x, y, e: x.select_scatter(y[:, 3], 1, 2)),
    "select_scatter_features": stays("select_scatter", Reason.DIFFERENT_AXES, lambda m, x, y, e: torch.select_scatter(
        x, y[..., 3], 2, 2)),
    "masked_scatter": folds("masked_scatter", lambda m, x, y, e: x.masked_scatter(
        e["mask"].expand_as(x), y.view(10, D))),
    "masked_scatter_flat": folds("masked_scatter", lambda m, x, y, e: torch.masked_scatter(
        x, e["mask"].expand_as(x).to(x.device), y.flatten())),
    "masked_scatter_two_axes": folds("masked_scatter", lambda m, x, y, e: x.view(2, 5, 3, 4).masked_scatter(
        e["mask"][..., None].expand(2, 5, 3, 4), y), norm=(3, 4)),
    "masked_scatter_narrow_mask": folds("masked_scatter", lambda m, x, y, e: x.masked_scatter(e["mask"], y)),
    "masked_scatter_by_feature": stays(
        "masked_scatter", Reason.VARYING_SCALE, lambda m, x, y, e: x.masked_scatter(e["u"] > 0, y)),
    "masked_scatter_other_axes": stays("masked_scatter", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.mT.masked_scatter(
        e["mask"].mT.expand(2, D, 5), y).mT),
    "masked_scatter_other_rows": stays("masked_scatter", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.masked_scatter(
        e["mask"].expand_as(x), y[..., :10].transpose(0, 1))),
    "take_along_dim": folds("take_along_dim", lambda m, x, y, e: torch.take_along_dim(
        x, e["columns"][None, :, None], 1)),
    "take_along_dim_expanded": folds("take_along_dim", lambda m, x, y, e: x.take_along_dim(rows(e), dim=1)),
    "take_along_features": stays("take_along_dim", Reason.VARYING_SCALE, lambda m, x, y, e: torch.take_along_dim(
        x, (e["u"] > 0).long(), 2)),
    "take_along_dim_by_feature": stays("take_along_dim", Reason.VARYING_SCALE, lambda m, x, y, e: torch.take_along_dim(
        x, (e["u"] > 0).long(), 1)),
    # --- windows, blocks, groups ---
    "unfold_tokens": folds("unfold", lambda m, x, y, e: x.unfold(1, 3, 1).transpose(-1, -2)),
    "unfold_features": stays("unfold", Reason.DIFFERENT_AXES, lambda m, x, y, e: x.unfold(2, 3, 3), norm=3),
    "unfold_image": folds("unfold_image", lambda m, x, y, e: functional.unfold(
        m.image_convolution(e["image"]), 2, padding=1).unflatten(1, (D, 4)).transpose(1, 3)),
    "unfold_image_norm_over_windows": stays("unfold_image", Reason.DIFFERENT_AXES, lambda m, x, y, e: functional.unfold(
        m.image_convolution(e["image"]), 2).mT, norm=4 * D),
    "fold_image": folds("fold_image", lambda m, x, y, e: functional.fold(
        functional.unfold(m.image_convolution(e["image"]), 2, padding=1), (2, 2), 2, padding=1).flatten(2).mT),
    "fold_image_of_a_convolution": folds("fold_image", lambda m, x, y, e: functional.fold(
        functional.conv1d(e["u"][..., :9], m.wide.view(48, 5, 1)), (4, 4), 2, padding=1, stride=2).flatten(2).mT),
    "pixel_shuffle": folds("pixel_shuffle", lambda m, x, y, e: functional.pixel_shuffle(
        functional.conv2d(e["image"], m.wide.view(48, 5)[:, :3, None, None]), 2).flatten(2).mT),
    "pixel_shuffle_over_pixels": stays(
        "pixel_shuffle", Reason.DIFFERENT_AXES, lambda m, x, y, e: functional.pixel_shuffle(
            m.image_convolution(e["image"]), 2).flatten(2).mT, norm=(16, 3)),
    "pixel_unshuffle": folds("pixel_unshuffle", lambda m, x, y, e: functional.pixel_unshuffle(
        m.image_convolution(e["image"]), 2).unflatten(1, (D, 4)).transpose(1, -1)),
    "pixel_unshuffle_norm_over_blocks": stays(
        "pixel_unshuffle", Reason.DIFFERENT_AXES, lambda m, x, y, e: functional.pixel_unshuffle(
            m.image_convolution(e["image"]), 2).flatten(1), norm=4 * D),
    "channel_shuffle": folds("channel_shuffle", lambda m, x, y, e: functional.channel_shuffle(
        m.convolution(e["u"])[..., None], 3).flatten(2).mT),
    "channel_shuffle_norm_inside_groups": folds("channel_shuffle", lambda m, x, y, e: functional.channel_shuffle(
        m.convolution(e["u"]), 3).mT.unflatten(-1, (4, 3)), norm=3),
    "channel_shuffle_norm_across_groups": stays("channel_shuffle", Reason.DIFFERENT_AXES, lambda m, x, y, e:
        functional.channel_shuffle(m.convolution(e["u"]), 4).mT.unflatten(-1, (2, 6)), norm=6),
    "tile": folds("repeat", lambda m, x, y, e: torch.tile(x, (3, 1))),
    "pad_replicate": folds("pad", lambda m, x, y, e: functional.pad(x.mT, (1, 1), mode="replicate").mT),
    "pad_circular": folds("pad", lambda m, x, y, e: functional.pad(x.mT, (1, 1), mode="circular").mT),
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


def extra_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5  # noqa: E731
    return {
        "u": rand(2, 5, D), "row": rand(2, 5, 1), "mask": rand(2, 5, 1) > 0.5, "rows": torch.tensor([1, 0, 1]),
        "columns": torch.tensor([4, 2, 0]), "features": torch.tensor([1, 5, 7]), "image": rand(2, 3, 4, 4),
        "six": rand(2, 6, 5), "zeros": torch.tensor([0, 0, 0]), "seven": rand(2, 7), "square": rand(2, 5, 5),
    }  # fmt: skip


def run(case: Case) -> tuple[Any, Tensor, Tensor]:
    module = randomise(Around(case.operation, case.norm).double())
    value = torch.randn(2, 5, 7, dtype=torch.float64)
    compiled = torch.compile(module, backend="lnfold", options={"lnfold.assist": "off"}, fullgraph=True)
    actual = compiled(value, extra_inputs())
    (report,) = lncompile.reports(compiled)
    return report, actual, module(value, extra_inputs())


@pytest.fixture(autouse=True)
def data_dependent_sizes() -> Iterator[None]:
    """A boolean index makes a tensor whose size is known at run time only; Dynamo captures it when asked to."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


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
    assert covered == set(RULES) - OF_SEVERAL_PROCESSES


def test_cases_are_what_they_say() -> None:
    """The operations a case names really stand in its graph: Dynamo may have written them in another way."""
    from graphs import capture

    for name, case in CASES.items():
        module = randomise(Around(case.operation, case.norm).double())
        graph = capture(module, torch.randn(2, 5, 7, dtype=torch.float64), extra_inputs()).graph_module.graph
        found = {operation.name for node in graph.nodes if (operation := canonicalise(node)) is not None}
        named = set(case.rules.split())
        assert not named or named & found, f"{name}: {sorted(found)}"
