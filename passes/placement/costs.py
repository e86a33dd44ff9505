"""What placement weighs: memory traffic in bytes, as formulas in the graph's dynamic sizes.

A LayerNorm reads its row once more than an RMSNorm does, for the mean: folding a site saves one pass over its input. A
centering at run time costs one pass over what it centers, and a second where the raw tensor is read too, because then
both have to be written. A parameter is centered once and not per call: it costs nothing.

Training is another matter: a weight that changes at every step is centered at every step, and its gradient with it
(``∂L/∂W = C ∂L/∂(CW)``). That reads and writes as many bytes as the weight has, twice over, whatever the number of
tokens; what a norm saves grows with the tokens. So training gains where a step has many more tokens than
a weight has rows.

What changes the kernels themselves (``affine``, ``deferral``) has a :class:`Balance`: the bytes that a call moves less,
the kernels that it launches less, and the bytes of weights that are kept for it. It is made only where no kernel is
added and a call saves traffic, and more of it than is kept: a copy of a weight pays if one call saves its bytes. The
device is asked for its bandwidth, to say what that is in time; no decision hangs on it, and what a launch costs no
device says.

Amounts are formulas (sympy) where sizes are dynamic; decisions are made with the values those sizes had when the graph
was traced, as Inductor makes its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lncompile.lowering import torch_private
from lncompile.passes.graph.sizes import Size, size_of

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


@dataclass(frozen=True)
class Device:
    """What is known of a device.

    Attributes:
        name: as the driver gives it.
        bandwidth: of its memory at its nominal clock, in bytes a second; None where the driver does not say.
    """

    name: str
    bandwidth: float | None

    @classmethod
    def of(cls, device: torch.device) -> Device | None:
        """Return what ``torch.cuda`` says of a device; None for others, whose bandwidth is not known."""
        if device.type != "cuda" or not torch.cuda.is_available():
            return None
        return cls.from_properties(torch.cuda.get_device_properties(device))

    @classmethod
    def from_properties(cls, properties: object) -> Device:
        """Read the properties of a CUDA device: ``memory_clock_rate`` in kHz, two transfers a tick, bus width in bits.

        Example:
            >>> Device.from_properties(torch.cuda.get_device_properties(0)).bandwidth / 1e12   # an H200
            4.9
        """
        clock, width = (getattr(properties, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
        bandwidth = 2e3 * clock * width / 8 if clock and width else None
        return cls(str(getattr(properties, "name", "")), bandwidth)


@dataclass(frozen=True)
class Balance:
    """What a rewrite of kernels saves and costs.

    Attributes:
        traffic: bytes of memory traffic that a call saves; negative where it moves more.
        memory: bytes of weights that are kept for it alone.
        launches: kernels that a call launches less; negative where it launches more.
    """

    traffic: Bytes = NOTHING
    memory: Bytes = NOTHING
    launches: int = 0

    def __add__(self, other: Balance) -> Balance:
        return Balance(self.traffic + other.traffic, self.memory + other.memory, self.launches + other.launches)

    @property
    def wins(self) -> bool:
        """Whether the rewrite is made: no kernel more, traffic saved, and more of it in one call than is kept."""
        return self.launches >= 0 and self.traffic.hint > max(0, self.memory.hint)

    def in_words(self, device: Device | None = None) -> str:
        """Say it, with the time that the traffic takes on a device whose bandwidth is known.

        Example:
            >>> Balance(Bytes(96, 96), Bytes(4, 4), -1).in_words()
            'moves 96 bytes less a call, keeps 4 bytes of weights more, launches 1 kernel more'
        """
        saves = self.traffic.hint >= 0
        moved = f"moves {self.traffic if saves else NOTHING - self.traffic} bytes {'less' if saves else 'more'} a call"
        if device is not None and device.bandwidth:
            moved += f" ({abs(self.traffic.hint) / device.bandwidth * 1e6:.2f} µs of {device.name}'s bandwidth)"
        words = [moved, f"keeps {self.memory} bytes of weights more"]
        if self.launches:
            count = abs(self.launches)
            words.append(f"launches {count} kernel{'s' if count > 1 else ''} {'less' if self.launches > 0 else 'more'}")
        return ", ".join(words)
