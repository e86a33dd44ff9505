"""The centering operator ``C``, as pure tensor functions: for weights (once, exact) and for activations (per call)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.factors import Factor

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
    unfolded, factors, over = _unfold(value, axes)
    if axes.partial:
        chosen, count = _chosen(value, factors)
        # Over no dimensions every element is its own mean; torch would sum all of them.
        mean = torch.sum(torch.where(chosen, unfolded, 0.0), over, True) / count if over else unfolded
        centered = torch.where(chosen, torch.sub(unfolded, mean), unfolded)
    else:
        centered = torch.sub(unfolded, torch.mean(unfolded, over, True))
    return _fold(centered, axes)


def _unfold(value: Tensor, axes: Axes) -> tuple[Tensor, list[Factor], list[int]]:
    """Split dimensions normalised in part, [tokens, 12·64] → [tokens, 12, 64]; the factors, and which to mean over."""
    unfolded = value
    # Read from the right, so that positions to the left stay valid.
    for dimension in reversed(range(axes.rank)):
        factors = axes.dimensions[dimension]
        if len(factors) > 1:
            # A size that is not known is what the others leave over.
            sizes = [factor.size if isinstance(factor.size, int) else -1 for factor in factors]
            unfolded = torch.unflatten(unfolded, dimension, sizes)
    flat = [factor for dimension in axes.dimensions for factor in dimension or (Factor(1, False),)]
    return unfolded, flat, [index for index, factor in enumerate(flat) if factor.normalised]


def _fold(unfolded: Tensor, axes: Axes) -> Tensor:
    """The way back from :func:`_unfold`."""
    for dimension in range(axes.rank):
        if len(axes.dimensions[dimension]) > 1:
            unfolded = unfolded.flatten(dimension, dimension + len(axes.dimensions[dimension]) - 1)
    return unfolded


def _chosen(value: Tensor, factors: Sequence[Factor]) -> tuple[Tensor, int]:
    """Which elements are centered, where some are not, and over how many of them each mean goes."""
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
    return chosen, count


def means_of(weight: Tensor, axes: Axes) -> Tensor:
    """The means that :func:`center_weight` takes from a weight, in float64: for ``[d, k]`` centered along ``d``, ``k``.

    Args:
        weight: of any floating dtype.
        axes: which of its elements are centered together. At least one dimension of it has a mean.
    """
    unfolded, factors, over = _unfold(weight.to(EXACT), axes)
    if axes.partial:
        chosen, count = _chosen(weight, factors)
        return torch.sum(torch.where(chosen, unfolded, 0.0), over, True) / count
    return torch.mean(unfolded, over, True)


def is_centered(weight: Tensor, axes: Axes | Sequence[Axes]) -> bool:
    """Whether a weight is centered already, to the rounding of its dtype: then centering it again changes nothing.

    What is left of a mean by rounding n centered numbers is at most ε/2 times the mean of their sizes, where ε is the
    spacing of the dtype's numbers at 1, and far less for large n, because roundings go either way: with standard
    deviation ε r / sqrt(12 n) at most, for numbers of root mean square r. Eight of these are allowed.

    Args:
        weight: of any floating dtype.
        axes: as in :func:`center_weight`. At least one dimension of each has a mean.
    """
    with torch.no_grad():
        return all(_is_centered(weight, part) for part in ((axes,) if isinstance(axes, Axes) else axes))


def _is_centered(weight: Tensor, axes: Axes) -> bool:
    if weight.numel() == 0:
        return True
    information = torch.finfo(weight.dtype)
    means = means_of(weight, axes)
    if means.abs().max() > 4 * information.eps * weight.abs().max() + information.smallest_normal:
        return False  # nearly always, and for a third of the work
    # Numbers below the smallest normal one are spaced evenly.
    spacing = 0.5 * information.smallest_normal * information.eps
    bound = 0.5 * information.eps * means_of(weight.abs(), axes)
    deviation = information.eps * means_of(weight.to(EXACT).square(), axes).sqrt() / math.sqrt(12 * int(axes.count))
    allowed = torch.minimum(bound, 8 * deviation) + spacing
    # Of numbers in float64 the means are rounded as well.
    slack = 32.0 if weight.dtype == EXACT else 1.0 + 1e-6
    return bool((means.abs() <= slack * allowed).all())


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
