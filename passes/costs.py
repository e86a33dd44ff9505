"""What placement weighs: memory traffic in bytes, as formulas in the graph's dynamic sizes.

A LayerNorm reads its row once more than an RMSNorm does, for the mean: folding a site saves one pass over its input. A
centering at run time costs one pass over what it centers, and a second where the raw tensor is read too, because then
both have to be written. A parameter is centered once and not per call: it costs nothing.

Training is another matter: a weight that changes at every step is centered at every step, and its gradient with it
(``∂L/∂W = C ∂L/∂(CW)``). That reads and writes as many bytes as the weight has, twice over, whatever the number of
tokens; what a norm saves grows with the tokens. So training gains where a step has many more tokens than
a weight has rows.

Amounts are formulas (sympy) where sizes are dynamic; decisions are made with the values those sizes had when the graph
was traced, as Inductor makes its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lncompile.lowering import torch_private
from lncompile.passes.axes import Size, size_of

# Stands in for a dynamic size that nothing is known of; the same number Inductor uses.
UNKNOWN_SIZE_HINT = 8192


@dataclass(frozen=True)
class Bytes:
    """An amount of memory traffic.

    Attributes:
        formula: an int, or a sympy expression in the dynamic sizes.
        hint: its value at the sizes the graph was traced with.

    Example:
        >>> str(Bytes(4, 4) * 2 + Bytes(1, 1))
        '9'
    """

    formula: Size
    hint: int

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.formula + other.formula, self.hint + other.hint)

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.formula - other.formula, self.hint - other.hint)

    def __mul__(self, times: int) -> Bytes:
        return Bytes(self.formula * times, self.hint * times)

    def __str__(self) -> str:
        return str(self.formula)


NOTHING = Bytes(0, 0)

# A parameter expression is centered once; this mark prefers to center the parameters it is made of.
A_MARK = Bytes(1, 1)


def one_pass(tensor: Tensor) -> Bytes:
    """The bytes of a tensor: what it costs to read or to write it once."""
    amount = Bytes(tensor.element_size(), tensor.element_size())
    for size in tensor.shape:
        hint = torch_private.size_hint(size, UNKNOWN_SIZE_HINT)
        amount = Bytes(amount.formula * size_of(size), amount.hint * hint)
    return amount


@dataclass(frozen=True)
class CostModel:
    """What placement weighs in a graph for inference, or for training.

    Attributes:
        training: whether gradients are computed: everything is then done once more backwards.
        weighs_weights: whether centering trained weights counts. Without, they are centered wherever they can be.
    """

    training: bool = False
    weighs_weights: bool = True

    def norm(self, tensor: Tensor) -> Bytes:
        """What folding a norm saves: one pass over its input, for the mean, and in training one over its gradient."""
        return one_pass(tensor) * (2 if self.training else 1)

    def activation(self, tensor: Tensor, raw_is_read: bool) -> Bytes:
        """What centering an activation at run time costs."""
        # A centered copy next to a raw value that others still read is written to memory as well as reduced.
        return one_pass(tensor) * ((2 if raw_is_read else 1) + (1 if self.training else 0))

    def weight(self, tensor: Tensor, trained: bool) -> Bytes:
        """What centering a parameter costs at each call: its value and its gradient are read and written."""
        return one_pass(tensor) * 4 if trained and self.weighs_weights else NOTHING
