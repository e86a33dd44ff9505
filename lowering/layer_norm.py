"""What a site that is not folded becomes under ``lnfold.nonfoldable="eager"``: ATen's own LayerNorm kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("lncompile::layer_norm", mutates_args=())
def aten_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm by ATen's eager kernel: an operator Inductor cannot see into, so it calls it as it is.

    Arguments, dtypes and result are those of ``torch.nn.functional.layer_norm``.
    """
    return torch.nn.functional.layer_norm(input, list(normalized_shape), weight, bias, eps)


@aten_layer_norm.register_fake
def _(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _keep_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    input, normalized_shape, weight, bias, eps = inputs
    ctx.save_for_backward(input, weight, bias)
    ctx.normalized_shape, ctx.eps = list(normalized_shape), eps  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias = ctx.saved_tensors  # type: ignore[attr-defined]
    shape, eps = ctx.normalized_shape, ctx.eps  # type: ignore[attr-defined]
    _, mean, rstd = torch.ops.aten.native_layer_norm.default(input, shape, weight, bias, eps)
    mask = [True, weight is not None, bias is not None]
    gradients = torch.ops.aten.native_layer_norm_backward.default(
        gradient, input, shape, mean, rstd, weight, bias, mask
    )
    return gradients[0], None, gradients[1] if mask[1] else None, gradients[2] if mask[2] else None, None


aten_layer_norm.register_autograd(_backward, setup_context=_keep_for_backward)
