"""torch's private names for watching copies between tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CopiesFromMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode in which copying a tensor without values into one with values changes nothing, where torch would raise.

    Args:
        told: called with the destination and the source of each such copy.

    Example:
        >>> with CopiesFromMeta(lambda destination, source: print(source.shape)):
        ...     torch.zeros(3).copy_(torch.empty(3, device="meta"))
    """

    def __init__(self, told: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.told = told

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or leave it out."""
        if func is torch.ops.aten.copy_.default and args[1].device.type == "meta" != args[0].device.type:
            self.told(args[0], args[1])
            return args[0]
        return func(*args, **(kwargs or {}))
