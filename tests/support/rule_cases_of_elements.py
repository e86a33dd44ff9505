"""Cases of rules: sums, scalings, casts, masks, views, permutations, expansions, joins, cuts, and reductions."""

from __future__ import annotations

import torch
from rule_case import (
    D,
    aten,
    folds,
    iadd,
    scaler,
    stays,
)
from torch.nn import functional

from lncompile import Reason

# m: the module (for parameters); x, y: streams [2, 5, 12]; e: other inputs.
ELEMENTS = {
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
    "aten_index": folds("index", lambda m, x, y, e: aten.index.Tensor(x, [e["rows"]])),
    "aten_index_behind_a_whole_dimension": folds(
        "index", lambda m, x, y, e: aten.index.Tensor(x, [None, e["columns"]])),
    "aten_indices": folds("index", lambda m, x, y, e: aten.index.Tensor(x, [e["rows"], e["columns"]])),
    "aten_indices_apart": folds(
        "index", lambda m, x, y, e: aten.index.Tensor(x[:, :, None], [e["rows"], None, e["zeros"]])),
    "aten_index_of_a_mask": folds("index", lambda m, x, y, e: aten.index.Tensor(x, [e["mask"][..., 0]])),
    "aten_index_of_features": stays(
        "index", Reason.DIFFERENT_AXES, lambda m, x, y, e: aten.index.Tensor(x, [None, None, e["features"]]), norm=3),
    "aten_index_of_features_behind_rows": stays("index", Reason.DIFFERENT_AXES, lambda m, x, y, e: (
        x + aten.index.Tensor(x, [e["rows"], None, e["features"]]).sum())),
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
}  # fmt: skip
