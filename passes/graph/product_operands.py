"""Where products have their operands: one table for all that rewrites weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProductOperands:
    """Where an operation has its operands, by the names of its parameters, and the dimensions of its weight.

    Attributes:
        input: the activation.
        weight: the weight.
        incoming: the weight's dimension of the features that are summed over.
        outgoing: the weight's dimension of the features that result.
        bias: what is added; None for what has none.
    """

    input: str
    weight: str
    incoming: int
    outgoing: int
    bias: str | None


#: By the canonical name. ``embedding`` is a product with one-hot rows; a weight of ``matmul`` may be a vector.
PRODUCTS = {
    "linear": ProductOperands("input", "weight", 1, 0, "bias"),
    "addmm": ProductOperands("mat1", "mat2", 0, 1, "input"),
    "matmul": ProductOperands("input", "other", 0, -1, None),
    "embedding": ProductOperands("input", "weight", 0, 1, None),
    "convolution": ProductOperands("input", "weight", 1, 0, "bias"),
    "transposed_convolution": ProductOperands("input", "weight", 0, 1, "bias"),
}
