"""The centering operator ``C``, as pure tensor functions: for weights (once, exact) and for activations (per call)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lncompile.passes.axes import Axes, Factor

#: In which weights are centered that are centered once: whatever they are kept in, they are rounded once.
EXACT = torch.float64


def training_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which weights of a dtype are centered where that happens at every step: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _subtract_mean(value: Tensor, axes: Axes) -> Tensor:
    if not axes.normalised_dimensions and not axes.partial:
        return torch.sub(value, value)  # a norm over a single element; a mean over no dimensions would be one over all
    if axes.whole:
        return torch.sub(value, torch.mean(value, list(axes.normalised_dimensions), True))
    # Dimensions normalised in part are unfolded into their factors: [tokens, 12·64] → [tokens, 12, 64]. Read from the
    # right, so that positions to the left stay valid.
    unfolded = value
    for dimension in reversed(range(axes.rank)):
        factors = axes.dimensions[dimension]
        if len(factors) > 1:
            # A size that is not known is what the others leave over.
            sizes = [factor.size if isinstance(factor.size, int) else -1 for factor in factors]
            unfolded = torch.unflatten(unfolded, dimension, sizes)
    flat = [factor for dimension in axes.dimensions for factor in dimension or (Factor(1, False),)]
    over = [index for index, factor in enumerate(flat) if factor.normalised]
    if axes.partial:
        centered = _subtract_chosen_mean(unfolded, flat, over)
    else:
        centered = torch.sub(unfolded, torch.mean(unfolded, over, True))
    for dimension in range(axes.rank):
        if len(axes.dimensions[dimension]) > 1:
            centered = centered.flatten(dimension, dimension + len(axes.dimensions[dimension]) - 1)
    return centered


def _subtract_chosen_mean(value: Tensor, factors: Sequence[Factor], over: list[int]) -> Tensor:
    """Center what is chosen along every factor, and leave the rest as it is."""
    chosen = None
    count = 1
    for index, factor in enumerate(factors):
        count *= int(factor.count) if factor.normalised else 1
        if factor.chosen is None:
            continue
        flags = [False] * int(factor.size)
        for i in factor.chosen:
            flags[i] = True
        sizes = [1] * len(factors)
        sizes[index] = -1
        along = value.new_tensor(flags, dtype=torch.bool).reshape(sizes)
        chosen = along if chosen is None else torch.logical_and(chosen, along)
    assert chosen is not None  # what makes axes partial
    # Over no dimensions every element is its own mean; torch would sum all of them.
    mean = torch.sum(torch.where(chosen, value, 0.0), over, True) / count if over else value
    return torch.where(chosen, torch.sub(value, mean), value)


def center_weight(
    weight: Tensor,
    axes: Axes | Sequence[Axes],
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype = EXACT,
) -> Tensor:
    """Center a weight: column-based weight centering (CBWC) of arXiv 2605.14521.

    .. math:: W ← CW = W - \\frac{1}{d} 1 1ᵀ W

    so that ``(CW)h + Cb = C(Wh + b)`` has zero mean for every ``h``. Computed in float64 and rounded once to the
    weight's dtype: doing it twice changes nothing but the last bit. As an operation of a graph that is trained it gives
    the original model's gradient, ``∂L/∂W = C ∂L/∂(CW)``: the model is the same function of ``W``.

    Args:
        weight: a parameter of any floating dtype.
        axes: which of its elements are centered together, ``A`` seen on this parameter; several where parts of it are
            centered apart (the rows of queries and those of keys in a joint projection).
        dtype: dtype of the result, by default that of ``weight``. What is cast up is rounded after the cast.
        compute_dtype: dtype of the arithmetic; :func:`training_dtype` where it happens at every step.

    Returns:
        A new tensor of the same shape and device.

    Example:
        >>> weight = torch.randn(768, 3072)                       # [out, in] of a Linear
        >>> center_weight(weight, Axes.of(weight.shape, [0])).mean(0).abs().max() < 1e-7
        tensor(True)
    """
    centered = weight.to(compute_dtype)
    for part in (axes,) if isinstance(axes, Axes) else axes:
        centered = _subtract_mean(centered, part)
    return centered.to(dtype or weight.dtype)


def channel_scale(scale: Tensor, divides: bool = False, compute_dtype: torch.dtype = EXACT) -> Tensor:
    """The scale of LayerScale as a row of channels: ``s``, or ``1 / s`` where the graph divides by it.

    Args:
        scale: ``s`` with any number of dimensions of size 1 beside the channels, of any floating dtype.
        divides: whether the graph divides by it.
        compute_dtype: as in :func:`center_weight`.

    Returns:
        ``[channels]`` in ``compute_dtype``.
    """
    row = scale.to(compute_dtype).reshape([-1])
    return torch.reciprocal(row) if divides else row


def batch_norm_scale(
    running_var: Tensor, weight: Tensor | None, eps: float, compute_dtype: torch.dtype = EXACT
) -> Tensor:
    """What a batch norm in evaluation multiplies each channel by: ``s = γ / sqrt(var + ε)``.

    Args:
        running_var: ``[channels]``, of any floating dtype.
        weight: γ ``[channels]``, or None for ones.
        eps: ε.
        compute_dtype: as in :func:`center_weight`.

    Returns:
        ``[channels]`` in ``compute_dtype``.
    """
    scale = torch.rsqrt(torch.add(running_var.to(compute_dtype), eps))
    return scale if weight is None else torch.mul(weight.to(compute_dtype), scale)


def batch_norm_shift(
    running_mean: Tensor, bias: Tensor | None, scale: Tensor, compute_dtype: torch.dtype = EXACT
) -> Tensor:
    """What a batch norm in evaluation adds to each channel: ``t = β - s ⊙ mean``.

    Args:
        running_mean: ``[channels]``, of any floating dtype.
        bias: β ``[channels]``, or None for zeros.
        scale: ``s``, from :func:`batch_norm_scale`.
        compute_dtype: as in :func:`center_weight`.

    Returns:
        ``[channels]`` in ``compute_dtype``.
    """
    moved = torch.mul(scale, running_mean.to(compute_dtype))
    return torch.neg(moved) if bias is None else torch.sub(bias.to(compute_dtype), moved)


def compose_scales(outer: Tensor, inner: Tensor) -> Tensor:
    """Two scales in a row: ``s₂ ⊙ (s₁ ⊙ x + t₁) + t₂`` scales x by ``s₂ ⊙ s₁``. ``[channels]`` each."""
    return torch.mul(outer, inner)


def compose_shifts(outer_scale: Tensor, inner: Tensor, outer: Tensor | None) -> Tensor:
    """Two shifts in a row: ``s₂ ⊙ (s₁ ⊙ x + t₁) + t₂`` shifts by ``s₂ ⊙ t₁ + t₂``. ``[channels]`` each."""
    scaled = torch.mul(outer_scale, inner)
    return scaled if outer is None else torch.add(scaled, outer)


def center_scaled_weight(
    weight: Tensor,
    scale: Tensor,
    dimension: int,
    axes: Axes,
    dtype: torch.dtype | None = None,
    groups: int = 1,
    compute_dtype: torch.dtype = EXACT,
) -> Tensor:
    """Compose a scale into a weight, then center it: ``W ← C diag(s) W`` (LayerScale, batch norm).

    Args:
        weight: a parameter of any floating dtype.
        scale: ``s``, one number for each channel.
        dimension: the dimension of ``weight`` that ``s`` multiplies.
        axes: which elements of the weight are centered together.
        dtype: dtype of ``weight``, as in :func:`center_weight`.
        groups: in how many groups the channels lie, where ``dimension`` holds those of one group and the first
            dimension holds the groups (transposed convolutions: ``[groups · in, out / groups, ...]``).
        compute_dtype: as in :func:`center_weight`.

    Returns:
        A new tensor of the weight's shape and dtype, rounded once.
    """
    wide, row = weight.to(compute_dtype), scale.to(compute_dtype)
    if groups == 1:
        sizes = [1] * axes.rank
        sizes[dimension] = -1
        scaled = torch.mul(wide, row.reshape(sizes))
    else:
        sizes = [1] * (axes.rank + 1)
        sizes[0], sizes[dimension + 1] = groups, -1
        scaled = torch.mul(torch.unflatten(wide, 0, [groups, -1]), row.reshape(sizes)).flatten(0, 1)
    return _subtract_mean(scaled, axes).to(dtype or weight.dtype)


def center_composed_bias(
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    axes: Axes,
    dtype: torch.dtype,
    compute_dtype: torch.dtype = EXACT,
) -> Tensor:
    """Compose a scale and a shift into a bias, then center it: ``b ← C(s ⊙ b + t)``.

    Args:
        bias: ``[channels]`` of any floating dtype, or None for zeros.
        scale: ``s``, one number for each channel, in ``compute_dtype``.
        shift: ``t`` likewise, or None for zeros. Not None where ``bias`` is.
        axes: which channels are centered together.
        dtype: dtype of the result.
        compute_dtype: as in :func:`center_weight`.

    Returns:
        ``[channels]``, rounded once.
    """
    composed = shift
    if bias is not None:
        scaled = torch.mul(bias.to(compute_dtype), scale)
        composed = scaled if shift is None else torch.add(scaled, shift)
    if composed is None:
        raise ValueError("there is neither a bias nor a shift to compose")
    return _subtract_mean(composed, axes).to(dtype)


def center_activation(
    value: Tensor, axes: Axes, input_dtype: torch.dtype | None = None, output_dtype: torch.dtype | None = None
) -> Tensor:
    """Center an activation at run time: ``u - mean_A(u)``, in float32 (float64 for float64), rounded once.

    Args:
        value: the tensor, of any floating dtype.
        axes: which of its elements are centered together.
        input_dtype: dtype of ``value``; given by callers that trace this function with FX proxies.
        output_dtype: dtype of the result; by default that of ``value``.

    Returns:
        A new tensor of the same shape.
    """
    input_dtype = input_dtype or value.dtype
    compute_dtype = training_dtype(input_dtype)
    wide = value if input_dtype == compute_dtype else value.to(compute_dtype)
    return _subtract_mean(wide, axes).to(output_dtype or input_dtype)
