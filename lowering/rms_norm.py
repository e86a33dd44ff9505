"""The RMSNorm that takes a folded LayerNorm's place, as pure tensor functions."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lncompile.lowering.stored_scale import StoredScale
from lncompile.lowering.target import target_of


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    input_dtype: torch.dtype | None = None,
    output_dtype: torch.dtype | None = None,
    slices: int = 1,
    stored_scale: StoredScale | None = None,
) -> Tensor:
    """RMSNorm with bias: what LayerNorm is on an input whose mean is zero.

    .. math:: y = γ ⊙ x / \\sqrt{mean(x²) + ε} + β

    With ``Cx`` for ``x`` this is LayerNorm, since ``var(x) = mean((Cx)²)`` (arXiv 2605.14521). Unlike
    ``torch.nn.functional.rms_norm`` it takes a bias, and ``eps`` is always the LayerNorm's own, inside the root.

    The arithmetic follows ATen's ``layer_norm``: everything in float32 (float64 for float64 input), one rounding at
    the end. It is spelled in plain ``torch`` functions, which Inductor fuses into a single kernel with one reduction,
    together with the residual add before it.

    Args:
        input: ``[..., *normalized_shape]``, floating point, zero mean over the trailing ``len(normalized_shape)`` axes.
        normalized_shape: sizes of the normalised trailing axes.
        weight: γ of shape ``normalized_shape``, or None for 1.
        bias: β of shape ``normalized_shape``, or None for 0.
        eps: ε, added to the mean of squares.
        input_dtype: dtype of ``input``; given by callers that trace this function with FX proxies, which know no dtype.
        output_dtype: dtype of the result; by default that of ``input``.
        slices: from :func:`slices_of_row`; more than 1 only with one axis, whose size it divides.
        stored_scale: from :func:`lncompile.lowering.stored_scale_of`; only with one axis.

    Returns:
        A contiguous tensor of ``input``'s shape and of ``output_dtype``.

    Example:
        >>> x = torch.randn(4, 8); x = x - x.mean(-1, keepdim=True)
        >>> torch.allclose(rms_norm(x, (8,)), torch.nn.functional.layer_norm(x, (8,)), atol=1e-6)
        True
    """
    input_dtype = input_dtype or input.dtype
    axes = [-i for i in range(len(normalized_shape), 0, -1)]
    output = _normalise(input, axes, eps, input_dtype, slices, stored_scale)
    if weight is not None:
        output = torch.mul(output, weight)
    if bias is not None:
        output = torch.add(output, bias)
    # Always emitted: a weight of a wider dtype promotes, and `.to` of the same dtype costs nothing once compiled.
    # LayerNorm's result is contiguous whatever its input's strides are, and a view of it may count on that.
    return output.to(output_dtype or input_dtype).contiguous()


def row_scale(
    input: Tensor,
    eps: float,
    input_dtype: torch.dtype,
    slices: int = 1,
    stored_scale: StoredScale | None = None,
) -> Tensor:
    """``1 / sqrt(mean(x²) + ε)`` of each row, what a deferred RMSNorm leaves of the norm.

    Args:
        input: ``[..., features]``, floating point, zero mean over the last axis.
        eps: ε, added to the mean of squares.
        input_dtype: dtype of ``input``.
        slices: from :func:`slices_of_row`.
        stored_scale: from :func:`lncompile.lowering.scale_stored_apart`.

    Returns:
        ``[..., 1]`` in float32, in float64 for float64 input.
    """
    return _scale(input.to(compute_dtype_of(input_dtype)), [-1], eps, slices, stored_scale)


def scale_rows(
    product: Tensor, scale: Tensor, bias: Tensor | None, flattened: bool, dtype: torch.dtype, scale_dtype: torch.dtype
) -> Tensor:
    """``scale ⊙ product + bias``, in the scale's dtype and rounded once: the end of a deferred RMSNorm.

    Args:
        product: ``x W`` of shape ``[..., out]``, of rows that are not normalised.
        scale: ``[..., 1]``, from :func:`row_scale`.
        bias: ``[out]``, or None for zeros.
        flattened: whether ``product`` is ``[rows, out]`` where ``scale`` still has the dimensions of the rows.
        dtype: dtype of the result.
        scale_dtype: dtype of ``scale``.
    """
    rows = torch.reshape(scale, [-1, 1]) if flattened else scale
    scaled = torch.mul(product.to(scale_dtype), rows)
    return (scaled if bias is None else torch.add(scaled, bias)).to(dtype)


def compute_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """What norms of a dtype are computed in: float32, as ATen does; float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slices_of_row(value: Tensor) -> int:
    """In how many slices a norm over the last axis sums its row at once, in one loop over the elements of a slice.

    On a CPU Inductor sums more than 4096 float32 elements in cascades, whose bookkeeping takes longer than the sum
    itself. Slices of at most 4096 elements, squared and added element by element, leave one plain sum, in which no more
    roundings follow each other than Inductor allows in any.

    Args:
        value: ``[..., features]``, the norm's input or a fake tensor of its kind.

    Returns:
        The smallest divisor of ``features`` that makes slices of at most 4096 elements and of whole vectors; 1 where
        none up to 8 does, and where slices would not help: on other devices, in rows that are short, dynamic or
        float64, and where gradients are taken (the gradient of a slice is a row of zeros around it).

    Example:
        >>> slices_of_row(torch.empty(2, 16384))
        4
    """
    width = value.shape[-1]
    if (
        target_of(value.device).type != "cpu"
        or value.requires_grad
        or compute_dtype_of(value.dtype) != torch.float32
        or not isinstance(width, int)
    ):
        return 1
    return slices_without_cascades(width)


def slices_without_cascades(width: int) -> int:
    """In how many equal slices of whole vectors a CPU sums so many elements without cascades: 1 to 8.

    Example:
        >>> slices_without_cascades(768), slices_without_cascades(8192), slices_without_cascades(8193)
        (1, 2, 1)
    """
    if width <= _LONGEST_PLAIN_SUM or width % _WIDEST_VECTOR:
        return 1
    vectors = width // _WIDEST_VECTOR
    return next((n for n in range(2, 9) if vectors % n == 0 and width // n <= _LONGEST_PLAIN_SUM), 1)


#: Elements that Inductor adds without cascades (``chunk_size`` in torch/_inductor/codegen/cpp.py).
_LONGEST_PLAIN_SUM = 4096
#: Elements that one step of Inductor's loop takes at most: 16-bit elements in a vector of 512 bits.
_WIDEST_VECTOR = 32


def _mean_square(value: Tensor, axes: list[int], slices: int) -> Tensor:
    """``mean(x²)`` over these axes, which are kept; in slices only where there is one axis."""
    if slices == 1:
        return torch.mean(torch.mul(value, value), axes, True)
    row = torch.unflatten(value, -1, (slices, -1))
    squares = [torch.mul(part, part) for part in (torch.select(row, -2, index) for index in range(slices))]
    return torch.div(torch.mean(functools.reduce(torch.add, squares), [-1], True), slices)


def _normalise(
    input: Tensor,
    axes: list[int],
    eps: float,
    input_dtype: torch.dtype,
    slices: int = 1,
    stored_scale: StoredScale | None = None,
) -> Tensor:
    """``x / sqrt(mean(x²) + ε)`` over these axes, in float32 (float64 for float64 input) and not yet rounded."""
    compute_dtype = compute_dtype_of(input_dtype)
    value = input if input_dtype == compute_dtype else input.to(compute_dtype)
    return torch.mul(value, _scale(value, axes, eps, slices, stored_scale))


def _scale(value: Tensor, axes: list[int], eps: float, slices: int, stored_scale: StoredScale | None) -> Tensor:
    """``1 / sqrt(mean(x²) + ε)`` over these axes, which are kept; in memory if it is said how."""
    scale = torch.rsqrt(torch.add(_mean_square(value, axes, slices), eps))
    return scale if stored_scale is None else stored_scale.keep(scale)


def grouped_rms_norm(
    input: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    input_dtype: torch.dtype | None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm of channels in groups (LN-G): what ``group_norm`` over channels is where each group's mean is zero.

    .. math:: y_c = γ_c x_c / \\sqrt{mean_{c' ∈ g(c)}(x_{c'}²) + ε} + β_c

    Args:
        input: ``[N, C]`` or ``[N, C, 1, ...]``, floating point, zero mean over each group of ``C / groups`` channels.
        groups: number of groups; divides ``C``.
        weight: γ of shape ``[C]``, or None for 1.
        bias: β of shape ``[C]``, or None for 0.
        eps: ε, added to the mean of squares.
        input_dtype: dtype of ``input``, as in :func:`rms_norm`.
        output_dtype: dtype of the result; by default that of ``input``.

    Returns:
        A tensor of ``input``'s shape and of ``output_dtype``.

    Example:
        >>> x = torch.randn(4, 3, 8); x = (x - x.mean(-1, keepdim=True)).flatten(1)
        >>> torch.allclose(grouped_rms_norm(x, 3), torch.nn.functional.group_norm(x, 3), atol=1e-6)
        True
    """
    input_dtype = input_dtype or input.dtype
    in_groups = torch.unflatten(torch.flatten(input, 1), 1, (groups, -1))
    output = _normalise(in_groups, [-1], eps, input_dtype)
    if weight is not None:
        output = torch.mul(output, torch.unflatten(weight, 0, (groups, -1)))
    if bias is not None:
        output = torch.add(output, torch.unflatten(bias, 0, (groups, -1)))
    return output.reshape_as(input).to(output_dtype or input_dtype).contiguous()
