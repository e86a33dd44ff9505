"""The labels of an Einstein sum, read from its equation."""

from __future__ import annotations

from collections.abc import Sequence

from lncompile.passes.decisions import Blocked, Reason

# A label of one dimension: a letter, or the number of a dimension of the ellipsis, counted from the right.
Label = str | int
_ELLIPSIS = "..."


def einsum_labels(equation: str, ranks: Sequence[int], result_rank: int) -> tuple[list[list[Label]], list[Label]]:
    """Labels of each dimension of each operand and of the result.

    Args:
        equation: as ``torch.einsum`` takes it.
        ranks: the number of dimensions of each operand.
        result_rank: that of the result.

    Raises:
        Blocked: for what is not understood.

    Example:
        >>> einsum_labels("...d->...", [3], 2)
        ([[1, 0, 'd']], [1, 0])
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise Blocked(Reason.UNKNOWN_OPERATION, f"the equation '{equation}' of an einsum")
    inputs = [_term(term, rank) for term, rank in zip(terms, ranks, strict=True)]
    if any(len(set(term)) != len(term) for term in inputs):
        raise Blocked(Reason.UNKNOWN_OPERATION, f"the diagonal that the einsum '{equation}' takes")
    if not arrow:
        # Without an arrow: the ellipsis, then the letters that stand once, in alphabetical order.
        letters = sorted(label for label in left if label.isalpha() and left.count(label) == 1)
        right = (_ELLIPSIS if _ELLIPSIS in left else "") + "".join(letters)
    return inputs, _term(right, result_rank)


def _term(term: str, rank: int) -> list[Label]:
    before, ellipsis, after = term.partition(_ELLIPSIS)
    hidden = rank - len(before) - len(after)
    if hidden < 0 or (hidden and not ellipsis) or (not (before + after).isalpha() and before + after):
        raise Blocked(Reason.UNKNOWN_OPERATION, f"the labels '{term}' of an einsum")
    return [*before, *range(hidden - 1, -1, -1), *after]
