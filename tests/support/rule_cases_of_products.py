"""Cases of rules: products with weights, what they are composed of, einsum, and coefficients along other axes."""

from __future__ import annotations

import torch
from rule_case import (
    D,
    aten,
    cut_token,
    filled,
    folds,
    overwritten_weight,
    raw_token,
    stays,
    with_weights,
    written_mask,
)
from torch import nn
from torch.nn import functional

from lncompile import Reason

# m: the module (for parameters); x, y: streams [2, 5, 12]; e: other inputs.
PRODUCTS = {
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
}  # fmt: skip
