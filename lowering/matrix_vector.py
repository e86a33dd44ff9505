"""The product of one row with a matrix as a sum that Inductor generates, with the RMSNorm in front of it inside."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lncompile.lowering import torch_private_inductor
from lncompile.lowering.rms_norm import compute_dtype_of, slices_without_cascades
from lncompile.lowering.target import target_of


def matrix_vector(
    row: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    features: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
    blocks: int = 1,
) -> Tensor:
    """``W x + b`` for one row.

    .. math:: y_n = \\sum_k W_{nk} x_k + b_n

    Summed in float32 (float64 for float64) and rounded once. An extern product is a kernel that nothing can be fused
    into; into this one go what is computed from its result, and the norm that its row comes from
    (:func:`normed_matrix_vector`).

    Args:
        row: ``[1, ..., 1, in]``.
        weight: ``[out, in]``.
        bias: ``[out]``, or None for zeros.
        features: ``(out, in)``.
        sizes: of the result, ``[1, ..., 1, out]``.
        dtype: of ``row`` and of the result.
        blocks: of rows of the weight that are read side by side, from :func:`blocks_of_weight`.

    Example:
        >>> row, weight = torch.randn(1, 1, 8), torch.randn(4, 8)
        >>> torch.allclose(matrix_vector(row, weight, None, (4, 8), (1, 1, 4), row.dtype), row @ weight.T, atol=1e-6)
        True
    """
    wide = compute_dtype_of(dtype)
    value = torch.reshape(row, [1, -1]).to(wide)
    if blocks == 1:
        return _finished(torch.sum(torch.mul(weight.to(wide), value), [1]), bias, sizes, dtype)
    outputs, incoming = features
    height = outputs // blocks
    starts = [height * block for block in range(blocks)] + [height * blocks] * bool(outputs % blocks)
    columns = incoming // slices_without_cascades(incoming)
    totals = []
    for start, end in itertools.pairwise([*starts, outputs]):
        parts = [
            torch.mul(weight[start:end, first : first + columns].to(wide), value[:, first : first + columns])
            for first in range(0, incoming, columns)
        ]
        totals.append(torch.sum(functools.reduce(torch.add, parts), [1]))
    return _finished(torch.cat(totals), bias, sizes, dtype)


def is_faster_as_sum(product: Tensor, config_patches: Mapping[str, Any]) -> bool:
    """Whether a product of one row is known to be faster as a sum.

    On a CPU it was measured (``benchmarks/README.md``), on x86 processors with AVX-512 and with products that Inductor
    hands to a library as they are: not with weights that it packs (``freezing``), nor with kernels that it generates
    and tunes (``max_autotune``). On a GPU it was not: there it is what Inductor holds to be faster.

    Args:
        product: the result, or a fake tensor of its kind.
        config_patches: what differs from Inductor's own configuration.
    """
    device = target_of(product.device)
    if device.type == "cpu":
        measured = torch.backends.cpu.get_cpu_capability() == "AVX512" and product.dtype in _FASTER_ON_A_CPU
        tuned = torch_private_inductor.tunes_products(config_patches)
        packed = torch_private_inductor.freezes_weights(config_patches)
        return measured and not tuned and not packed
    return torch_private_inductor.writes_products_as_sums(config_patches, device)


_FASTER_ON_A_CPU = frozenset({torch.float32, torch.bfloat16, torch.float16})


def blocks_of_weight(weight: Tensor) -> int:
    """In how many blocks of rows a CPU reads a weight in one loop, a row of each at a time.

    The sum over one row waits for each of its additions, and reads memory in one stream. Rows of several blocks wait
    side by side, and the elements that they are multiplied with are loaded once for all of them.

    Args:
        weight: ``[out, in]``, or a fake tensor of its kind.

    Returns:
        4; 1 on other devices, and where the weight is small enough to lie in a cache.

    Example:
        >>> blocks_of_weight(torch.empty(768, 768)), blocks_of_weight(torch.empty(64, 64))
        (4, 1)
    """
    outputs, incoming = weight.shape
    is_large = outputs * incoming >= _SMALLEST_IN_BLOCKS and outputs >= _LEAST_ROWS
    return _BLOCKS if is_large and target_of(weight.device).type == "cpu" else 1


# Sums and elements of a block take two registers each in 16 bits: those of four fit into 16, as AVX2 has.
_BLOCKS = 4
# Elements of a weight.
_SMALLEST_IN_BLOCKS = 1 << 18
# Below, blocks have too few rows to give every thread some.
_LEAST_ROWS = 64


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
