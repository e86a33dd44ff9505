"""Inputs to race with: what the graph writes into is a copy, which is as it was before each call."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lncompile.lowering import torch_private


class WorkingInputs:
    """The inputs of a call, with copies in the place of those that the call writes into.

    Tensors that share memory share that of the copy as well, with their offsets and strides. What is not written into
    is passed as it is.

    Attributes:
        arguments: to call with.

    Example:
        >>> inputs = WorkingInputs([weight, cache], written={1})
        >>> inputs.restore(); graph(*inputs.arguments)      # writes into a copy of the cache
    """

    def __init__(self, arguments: Sequence[Any], written: Collection[int]) -> None:
        """Copy what is written.

        Args:
            arguments: the caller's.
            written: positions of those that are written into.
        """
        self.arguments = list(arguments)
        self._copies: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        copied: dict[int, torch.UntypedStorage] = {}
        with torch_private.as_plain_tensors():
            for position in written:
                if isinstance(arguments[position], Tensor):
                    original = arguments[position].untyped_storage()
                    identity = torch_private.storage_identity(arguments[position])
                    if identity is not None and identity not in copied:
                        copied[identity] = original.clone()
                        self._copies.append((copied[identity], original))
            for position, value in enumerate(arguments):
                identity = torch_private.storage_identity(value) if isinstance(value, Tensor) else None
                if identity in copied:
                    self.arguments[position] = _on(copied[identity], value)

    def restore(self) -> None:
        """Give the copies the values of what they are copies of."""
        for copy, original in self._copies:
            copy.copy_(original)


def _on(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    """A tensor on another storage, that lies there as one lies on its own."""
    empty = torch.empty(0, dtype=like.dtype, device=like.device)
    return empty.set_(storage, like.storage_offset(), like.shape, like.stride())


@contextlib.contextmanager
def kept_random_state(devices: Collection[torch.device]) -> Iterator[None]:
    """Context behind which random numbers go on as if nothing had been drawn inside.

    Args:
        devices: whose generators are kept, beside that of the CPU.
    """
    gpus = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus):
        yield
