"""The product of one row with a matrix as a sum that Inductor generates, with the RMSNorm in front of it inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lncompile.lowering.rms_norm import compute_dtype_of


def matrix_vector(row: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``W x + b`` for one row.

    .. math:: y_n = \\sum_k W_{nk} x_k + b_n

    Summed in float32 (float64 for float64) and rounded once. An extern product is a kernel that nothing can be fused
    into; into this one go what is computed from its result, and the norm that its row comes from
    (:func:`normed_matrix_vector`).

    Args:
        row: ``[1, ..., 1, in]``.
        weight: ``[out, in]``.
        bias: ``[out]``, or None for zeros.
        sizes: of the result, ``[1, ..., 1, out]``.
        dtype: of ``row`` and of the result.

    Example:
        >>> row, weight = torch.randn(1, 1, 8), torch.randn(4, 8)
        >>> torch.allclose(matrix_vector(row, weight, None, (1, 1, 4), row.dtype), row @ weight.T, atol=1e-6)
        True
    """
    wide = compute_dtype_of(dtype)
    total = torch.sum(torch.mul(weight.to(wide), torch.reshape(row, [1, -1]).to(wide)), [1])
    return _finished(total, bias, sizes, dtype)


def normed_matrix_vector(
    row: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: Any,
    features: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """``W RMSNorm(x) + b`` for one row of zero mean: three sums over the same elements, one pass over the weight.

    .. math:: y_n = s \\sum_k W_{nk} γ_k x_k + \\sum_k W_{nk} β_k + b_n, \\quad s = 1 / \\sqrt{mean(x²) + ε}

    The mean of squares is the same number for every ``n``. It is written as a sum over the weight's elements all the
    same, because only sums over the same elements become one kernel; the row is read from a cache.

    Args:
        row: ``[1, ..., 1, in]``, zero mean.
        weight: ``[out, in]``.
        bias: ``[out]``, or None for zeros.
        gamma: γ of the norm, ``[in]``, or None for 1.
        beta: β of the norm, ``[in]``, or None for 0.
        eps: ε, added to the mean of squares.
        features: ``(out, in)``.
        sizes: of the result, ``[1, ..., 1, out]``.
        dtype: of ``row`` and of the result.
    """
    wide = compute_dtype_of(dtype)
    matrix, value = weight.to(wide), torch.reshape(row, [1, -1]).to(wide)
    mean_square = torch.mean(torch.mul(value, value).expand(tuple(features)), [1])
    scaled = value if gamma is None else torch.mul(value, gamma)
    total = torch.mul(torch.sum(torch.mul(matrix, scaled), [1]), torch.rsqrt(torch.add(mean_square, eps)))
    if beta is not None:
        total = torch.add(total, torch.sum(torch.mul(matrix, beta), [1]))
    return _finished(total, bias, sizes, dtype)


def transposed_copy(weight: Tensor) -> Tensor:
    """``[in, out]`` as ``[out, in]``: a sum along rows in memory is one kernel, across them it is cut into two."""
    return torch.t(weight).contiguous()


def _finished(total: Tensor, bias: Tensor | None, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.reshape((total if bias is None else torch.add(total, bias)).to(dtype), tuple(sizes))
