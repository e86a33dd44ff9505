"""The operations that are known: each a stub with its name and parameters, its spellings listed by a decorator."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.nn import functional

from lncompile.lowering import rms_norm as folded_norm_function
from lncompile.lowering import torch_private
from lncompile.passes.graph.registry import FUNCTIONS, METHODS, spelled
from lncompile.passes.graph.sharding import FROM_LOCAL

# The registry, which the stubs below fill.
__all__ = ["FUNCTIONS", "METHODS", "aten"]

aten: Any = torch.ops.aten
bindings = torch_private.NN_BINDINGS


# --- linear and the same on every element of A ---


@spelled(operator.add, torch.add, aten.add.Tensor, aten.add.Scalar, methods="add add_ __add__ __radd__",
         in_place=(operator.iadd, aten.add_.Tensor, aten.add_.Scalar))  # fmt: skip
def add(input: Any, other: Any, *, alpha: Any = 1) -> None: ...
@spelled(operator.sub, torch.sub, torch.subtract, aten.sub.Tensor, aten.sub.Scalar, methods="sub sub_ subtract",
         in_place=(operator.isub, aten.sub_.Tensor))  # fmt: skip
def sub(input: Any, other: Any, *, alpha: Any = 1) -> None: ...
@spelled(torch.rsub, aten.rsub.Scalar, aten.rsub.Tensor, methods="__rsub__")
def rsub(input: Any, other: Any, alpha: Any = 1) -> None: ...
@spelled(operator.neg, torch.neg, aten.neg.default, methods="neg neg_ negative")
def neg(input: Any) -> None: ...
@spelled(operator.pos, torch.positive, methods="positive")
def identity(input: Any) -> None: ...
@spelled(operator.mul, torch.mul, torch.multiply, aten.mul.Tensor, aten.mul.Scalar,
         methods="mul mul_ multiply __rmul__", in_place=(operator.imul, aten.mul_.Tensor))  # fmt: skip
def mul(input: Any, other: Any) -> None: ...
@spelled(operator.truediv, torch.div, torch.divide, torch.true_divide, aten.div.Tensor, aten.div.Scalar,
         methods="div div_ divide true_divide", in_place=(operator.itruediv, aten.div_.Tensor))  # fmt: skip
def div(input: Any, other: Any, *, rounding_mode: Any = None) -> None: ...


# --- casts and copies ---


@spelled(torch.ops.prims.convert_element_type.default, torch_private.ATEN_TO_COPY, aten.to.dtype,
         aten.to.dtype_layout, aten.to.device, aten.to.other, methods="to type")  # fmt: skip
def to(input: Any, *rest: Any, dtype: Any = None, **keywords: Any) -> None: ...
@spelled(torch.clone, torch.detach, aten.clone.default, aten.detach.default, aten.alias.default,
         aten.contiguous.default, methods="float half bfloat16 double contiguous clone detach cpu cuda")  # fmt: skip
def cast(input: Any, **keywords: Any) -> None: ...
@spelled(torch_private.functional_collective("all_reduce"))
def all_reduce(input: Any, reduce_op: Any, *group: Any) -> None: ...
@spelled(torch_private.functional_collective("wait_tensor"))
def wait_tensor(input: Any) -> None: ...
@spelled(methods="redistribute")
def redistribute(input: Any, device_mesh: Any = None, placements: Any = None, **keywords: Any) -> None: ...
@spelled(methods="to_local")
def to_local(input: Any, **keywords: Any) -> None: ...
@spelled(FROM_LOCAL)
def from_local(input: Any, device_mesh: Any = None, placements: Any = None, run_check: Any = False,
               shape: Any = None, stride: Any = None, grad_placements: Any = None) -> None: ...  # fmt: skip
@spelled(aten.type_as.default, methods="type_as")
def type_as(input: Any, other: Any) -> None: ...
@spelled(functional.dropout, torch.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d,
         functional.alpha_dropout, functional.feature_dropout if hasattr(functional, "feature_dropout") else None,
         aten.dropout.default, in_place=(torch.dropout_,))  # fmt: skip
def dropout(input: Any, probability: Any = 0.5, training: Any = True, inplace: Any = False) -> None: ...


# --- views ---


@spelled(aten.view.default, torch_private.ATEN_UNSAFE_VIEW, methods="view")
def view(input: Any, *shape: Any) -> None: ...
@spelled(torch.reshape, aten.reshape.default, methods="reshape")
def reshape(input: Any, *shape: Any) -> None: ...
@spelled(methods="view_as reshape_as")
def view_as(input: Any, other: Any) -> None: ...
@spelled(torch.flatten, aten.flatten.using_ints, methods="flatten")
def flatten(input: Any, start_dim: Any = 0, end_dim: Any = -1) -> None: ...
@spelled(torch.unflatten, aten.unflatten.int, methods="unflatten")
def unflatten(input: Any, dim: Any, shape: Any) -> None: ...
@spelled(torch.squeeze, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, methods="squeeze")
def squeeze(input: Any, dim: Any = None) -> None: ...
@spelled(torch.unsqueeze, aten.unsqueeze.default, methods="unsqueeze")
def unsqueeze(input: Any, dim: Any) -> None: ...
@spelled(torch.permute, aten.permute.default, methods="permute")
def permute(input: Any, *dim: Any) -> None: ...
@spelled(torch.transpose, torch.swapaxes, torch.swapdims, aten.transpose.int, methods="transpose swapaxes swapdims")
def transpose(input: Any, dim0: Any, dim1: Any) -> None: ...
@spelled(torch.t, aten.t.default, aten.numpy_T.default, methods="t")
def t(input: Any) -> None: ...
@spelled(aten.mT.default)
def mT(input: Any) -> None: ...
@spelled(torch.movedim, torch.moveaxis, aten.movedim.int, aten.movedim.intlist, methods="movedim moveaxis")
def movedim(input: Any, source: Any, destination: Any) -> None: ...
@spelled(aten.expand.default, methods="expand")
def expand(input: Any, *shape: Any) -> None: ...
@spelled(aten.expand_as.default, methods="expand_as")
def expand_as(input: Any, other: Any) -> None: ...
@spelled(aten.repeat.default, torch.tile, methods="repeat tile")
def repeat(input: Any, *repeats: Any) -> None: ...


# --- along other axes ---


@spelled(torch.cat, torch.concat, torch.concatenate, aten.cat.default)
def cat(tensors: Any, dim: Any = 0) -> None: ...
@spelled(torch.stack, aten.stack.default)
def stack(tensors: Any, dim: Any = 0) -> None: ...
@spelled(torch.split, torch.functional.split, aten.split.Tensor, aten.split_with_sizes.default,
         methods="split split_with_sizes")  # fmt: skip
def split(input: Any, split_size: Any, dim: Any = 0) -> None: ...
@spelled(torch.chunk, aten.chunk.default, methods="chunk")
def chunk(input: Any, chunks: Any, dim: Any = 0) -> None: ...
@spelled(torch.unbind, aten.unbind.int, methods="unbind")
def unbind(input: Any, dim: Any = 0) -> None: ...
@spelled(operator.getitem)
def getitem(input: Any, index: Any) -> None: ...
@spelled(methods="__setitem__", in_place=(operator.setitem,))
def setitem(input: Any, index: Any, value: Any) -> None: ...
@spelled(aten.index.Tensor)
def index(input: Any, indices: Any) -> None: ...
@spelled(torch.narrow, aten.narrow.default, methods="narrow")
def narrow(input: Any, dim: Any, start: Any, length: Any) -> None: ...
@spelled(aten.slice.Tensor)
def slice_(input: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> None: ...
@spelled(torch.select, aten.select.int, methods="select")
def select(input: Any, dim: Any, index: Any) -> None: ...
@spelled(torch.index_select, aten.index_select.default, methods="index_select")
def index_select(input: Any, dim: Any, index: Any) -> None: ...
@spelled(torch.roll, aten.roll.default, methods="roll")
def roll(input: Any, shifts: Any, dim: Any = None) -> None: ...
@spelled(torch.flip, aten.flip.default, methods="flip")
def flip(input: Any, *dim: Any) -> None: ...
@spelled(torch.mean, aten.mean.dim, aten.mean.default, methods="mean")
def mean(input: Any, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> None: ...
@spelled(torch.sum, aten.sum.dim_IntList, aten.sum.default, methods="sum")
def sum_(input: Any, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> None: ...
@spelled(torch.repeat_interleave, aten.repeat_interleave.self_int, methods="repeat_interleave")
def repeat_interleave(input: Any, repeats: Any, dim: Any = None, *, output_size: Any = None) -> None: ...
@spelled(torch.gather, aten.gather.default, methods="gather")
def gather(input: Any, dim: Any, index: Any, *, sparse_grad: Any = False) -> None: ...
@spelled(torch.index_add, aten.index_add.default, methods="index_add index_add_")
def index_add(input: Any, dim: Any, index: Any, source: Any, *, alpha: Any = 1) -> None: ...
@spelled(torch.cumsum, aten.cumsum.default, methods="cumsum")
def cumsum(input: Any, dim: Any, *, dtype: Any = None) -> None: ...
@spelled(torch.lerp, aten.lerp.Scalar, aten.lerp.Tensor, methods="lerp")
def lerp(input: Any, end: Any, weight: Any) -> None: ...
@spelled(functional.pad, bindings.pad)
def pad(input: Any, pad: Any, mode: Any = "constant", value: Any = None) -> None: ...
@spelled(functional.avg_pool1d, torch.avg_pool1d, functional.adaptive_avg_pool1d, torch.adaptive_avg_pool1d)
def average_pool_1d(input: Any, *rest: Any, **keywords: Any) -> None: ...
@spelled(functional.avg_pool2d, bindings.avg_pool2d, functional.adaptive_avg_pool2d, bindings.adaptive_avg_pool2d)
def average_pool_2d(input: Any, *rest: Any, **keywords: Any) -> None: ...
@spelled(functional.avg_pool3d, bindings.avg_pool3d, functional.adaptive_avg_pool3d, bindings.adaptive_avg_pool3d)
def average_pool_3d(input: Any, *rest: Any, **keywords: Any) -> None: ...
@spelled(functional.interpolate)
def interpolate(input: Any, *rest: Any, **keywords: Any) -> None: ...
@spelled(torch.var, aten.var.correction, methods="var")
def var(input: Any, dim: Any = None, unbiased: Any = None, keepdim: Any = False, *, correction: Any = None) -> None: ...
@spelled(torch.std, aten.std.correction, methods="std")
def std(input: Any, dim: Any = None, unbiased: Any = None, keepdim: Any = False, *, correction: Any = None) -> None: ...
@spelled(torch.var_mean, aten.var_mean.correction)
def var_mean(
    input: Any, dim: Any = None, unbiased: Any = None, keepdim: Any = False, *, correction: Any = None
) -> None: ...
@spelled(torch.std_mean, aten.std_mean.correction)
def std_mean(
    input: Any, dim: Any = None, unbiased: Any = None, keepdim: Any = False, *, correction: Any = None
) -> None: ...
@spelled(torch.where, aten.where.self)
def where(condition: Any, input: Any, other: Any) -> None: ...
@spelled(torch.scatter, aten.scatter.src, aten.scatter.value, methods="scatter")
def scatter(input: Any, dim: Any, index: Any, source: Any, *, reduce: Any = None) -> None: ...
@spelled(torch.scatter_add, aten.scatter_add.default, methods="scatter_add")
def scatter_add(input: Any, dim: Any, index: Any, source: Any) -> None: ...
@spelled(torch.scatter_reduce, aten.scatter_reduce.two, methods="scatter_reduce")
def scatter_reduce(
    input: Any, dim: Any, index: Any, source: Any, reduce: Any, *, include_self: Any = True
) -> None: ...  # fmt: skip
@spelled(torch.index_copy, aten.index_copy.default, methods="index_copy")
def index_copy(input: Any, dim: Any, index: Any, source: Any) -> None: ...
@spelled(torch.index_fill, aten.index_fill.int_Scalar, methods="index_fill")
def index_fill(input: Any, dim: Any, index: Any, value: Any) -> None: ...
@spelled(torch.index_put, aten.index_put.default, methods="index_put")
def index_put(input: Any, indices: Any, values: Any, accumulate: Any = False) -> None: ...
@spelled(torch.slice_scatter, aten.slice_scatter.default, methods="slice_scatter")
def slice_scatter(
    input: Any, source: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1
) -> None: ...  # fmt: skip
@spelled(torch.select_scatter, aten.select_scatter.default, methods="select_scatter")
def select_scatter(input: Any, source: Any, dim: Any, index: Any) -> None: ...
@spelled(torch.masked_scatter, aten.masked_scatter.default, methods="masked_scatter")
def masked_scatter(input: Any, mask: Any, source: Any) -> None: ...
@spelled(torch.take_along_dim, aten.take_along_dim.default, methods="take_along_dim")
def take_along_dim(input: Any, indices: Any, dim: Any = None) -> None: ...
@spelled(aten.unfold.default, methods="unfold")
def unfold(input: Any, dim: Any, size: Any, step: Any) -> None: ...
@spelled(functional.unfold, aten.im2col.default)
def unfold_image(
    input: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> None: ...  # fmt: skip
@spelled(functional.fold, aten.col2im.default)
def fold_image(
    input: Any, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> None: ...  # fmt: skip
@spelled(functional.pixel_shuffle, torch.pixel_shuffle, aten.pixel_shuffle.default)
def pixel_shuffle(input: Any, factor: Any) -> None: ...
@spelled(functional.pixel_unshuffle, torch.pixel_unshuffle, aten.pixel_unshuffle.default)
def pixel_unshuffle(input: Any, factor: Any) -> None: ...
@spelled(functional.channel_shuffle, torch.channel_shuffle, aten.channel_shuffle.default)
def channel_shuffle(input: Any, groups: Any) -> None: ...
@spelled(torch.masked_fill, aten.masked_fill.Scalar, methods="masked_fill masked_fill_")
def masked_fill(input: Any, mask: Any, value: Any) -> None: ...


# --- what hand-written norms are made of ---


@spelled(operator.pow, torch.pow, aten.pow.Tensor_Scalar, methods="pow __pow__")
def pow_(input: Any, exponent: Any) -> None: ...
@spelled(torch.addcmul, aten.addcmul.default, methods="addcmul")
def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> None: ...
@spelled(torch.addcdiv, aten.addcdiv.default, methods="addcdiv")
def addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> None: ...
@spelled(torch.square, aten.square.default, methods="square")
def square(input: Any) -> None: ...
@spelled(torch.sqrt, aten.sqrt.default, methods="sqrt")
def sqrt(input: Any) -> None: ...
@spelled(torch.rsqrt, aten.rsqrt.default, methods="rsqrt")
def rsqrt(input: Any) -> None: ...
@spelled(torch.reciprocal, aten.reciprocal.default, methods="reciprocal")
def reciprocal(input: Any) -> None: ...


# --- linear maps with parameters ---


@spelled(functional.linear, bindings.linear, aten.linear.default)
def linear(input: Any, weight: Any, bias: Any = None) -> None: ...
@spelled(torch.addmm, aten.addmm.default, methods="addmm")
def addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> None: ...
@spelled(torch.baddbmm, aten.baddbmm.default, methods="baddbmm")
def baddbmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> None: ...
@spelled(operator.matmul, torch.matmul, torch.mm, torch.bmm, torch.mv, torch.linalg.matmul, aten.mm.default,
         aten.bmm.default, aten.mv.default, aten.matmul.default, methods="matmul mm bmm mv __matmul__")  # fmt: skip
def matmul(input: Any, other: Any) -> None: ...
@spelled(torch.addmv, aten.addmv.default, methods="addmv")
def addmv(input: Any, mat: Any, vec: Any, *, beta: Any = 1, alpha: Any = 1) -> None: ...
@spelled(torch.einsum, aten.einsum.default)
def einsum(equation: Any, *operands: Any, path: Any = None) -> None: ...
@spelled(functional.bilinear, torch.bilinear, aten.bilinear.default)
def bilinear(input: Any, input2: Any, weight: Any, bias: Any = None) -> None: ...
@spelled(torch.embedding, aten.embedding.default)
def embedding_(
    weight: Any, input: Any, padding_idx: Any = -1, scale_grad_by_freq: Any = False, sparse: Any = False, *,
    max_norm: Any = None
) -> None: ...  # fmt: skip
@spelled(functional.embedding)
def embedding(
    input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, norm_type: Any = 2.0,
    scale_grad_by_freq: Any = False, sparse: Any = False
) -> None: ...  # fmt: skip
@spelled(functional.conv1d, functional.conv2d, functional.conv3d, torch.conv1d, torch.conv2d, torch.conv3d,
         aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
         aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)  # fmt: skip
def convolution(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> None: ...


@spelled(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d,
         torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
         aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)  # fmt: skip
def transposed_convolution(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: Any = 1, dilation: Any = 1
) -> None: ...  # fmt: skip
@spelled(torch.convolution, aten.convolution.default)
def any_convolution(
    input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: Any, output_padding: Any,
    groups: Any
) -> None: ...  # fmt: skip
@spelled(functional.embedding_bag)
def embedding_bag(
    input: Any, weight: Any, offsets: Any = None, max_norm: Any = None, norm_type: Any = 2,
    scale_grad_by_freq: Any = False, mode: Any = "mean", sparse: Any = False, per_sample_weights: Any = None,
    include_last_offset: Any = False, padding_idx: Any = None
) -> None: ...  # fmt: skip
@spelled(functional.multi_head_attention_forward)
def multi_head_attention(
    query: Any, key: Any, value: Any, embed_dim: Any, num_heads: Any, in_projection_weight: Any,
    in_projection_bias: Any, bias_k: Any, bias_v: Any, add_zero_attention: Any, dropout_p: Any,
    out_proj_weight: Any, out_proj_bias: Any, *rest: Any, **keywords: Any
) -> None: ...  # fmt: skip
@spelled(torch_private.WEIGHT_NORM)
def weight_norm(v: Any, g: Any, dim: Any = 0) -> None: ...


# --- norms and other shift-invariant operations ---


@spelled(functional.batch_norm)
def batch_norm(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: Any = False,
    momentum: Any = 0.1, eps: Any = 1e-5
) -> None: ...  # fmt: skip
@spelled(torch.batch_norm, aten.batch_norm.default)
def batch_norm_(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: Any, momentum: Any, eps: Any,
    cudnn_enable: Any = True
) -> None: ...  # fmt: skip


@spelled(functional.layer_norm, torch.layer_norm, aten.layer_norm.default)
def layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn_enable: Any = True
) -> None: ...
@spelled(torch.native_layer_norm, aten.native_layer_norm.default)
def native_layer_norm(input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any) -> None: ...
@spelled(functional.group_norm, torch.group_norm, aten.group_norm.default)
def group_norm(
    input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn_enabled: Any = True
) -> None: ...
@spelled(torch.native_group_norm, aten.native_group_norm.default)
def native_group_norm(
    input: Any, weight: Any, bias: Any, batch: Any, channels: Any, spatial: Any, num_groups: Any, eps: Any
) -> None: ...
@spelled(functional.rms_norm, torch.rms_norm, aten.rms_norm.default)
def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> None: ...
@spelled(folded_norm_function)
def folded_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, input_dtype: Any = None,
    output_dtype: Any = None
) -> None: ...  # fmt: skip
@spelled(functional.normalize)
def normalize(input: Any, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12, out: Any = None) -> None: ...
@spelled(functional.softmax, torch.softmax, aten.softmax.int, torch_private.ATEN_SOFTMAX, methods="softmax")
def softmax(input: Any, dim: Any = None, *rest: Any, **keywords: Any) -> None: ...
@spelled(functional.log_softmax, torch.log_softmax, aten.log_softmax.int, torch_private.ATEN_LOG_SOFTMAX,
         methods="log_softmax")  # fmt: skip
def log_softmax(input: Any, dim: Any = None, *rest: Any, **keywords: Any) -> None: ...


@spelled(functional.cross_entropy)
def cross_entropy(input: Any, target: Any, *rest: Any, **keywords: Any) -> None: ...


# --- reads of shape, dtype and device only ---


@spelled(torch.zeros, torch.zeros_like, aten.zeros.default, aten.zeros_like.default, methods="new_zeros")
def zeros(*rest: Any, **keywords: Any) -> None: ...
@spelled(torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like, aten.sym_size.int,
         torch.numel, torch.is_tensor, torch.is_floating_point, torch.result_type,
         methods="size dim ndimension numel new_ones new_full new_empty new_tensor is_floating_point "
                 "get_device element_size")  # fmt: skip
def metadata(input: Any, *rest: Any, **keywords: Any) -> None: ...
