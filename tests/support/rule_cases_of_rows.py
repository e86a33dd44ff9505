"""Cases of rules: rows written into rows, windows, blocks and groups, and the traps: other blockers, and writes."""

from __future__ import annotations

import torch
from rule_case import (
    D,
    aten,
    folds,
    inplace_relu,
    overwritten,
    read_again,
    rows,
    stays,
    written_through_view,
)
from torch.nn import functional

from lncompile import Reason

# m: the module (for parameters); x, y: streams [2, 5, 12]; e: other inputs.
ROWS = {
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
