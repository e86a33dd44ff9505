"""The device that code is generated for: a tensor's own, unless its graph is compiled for another one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_TARGET: ContextVar[torch.device | None] = ContextVar("lncompile_target", default=None)


def target_of(device: torch.device) -> torch.device:
    """The device that the kernels of tensors on this device will run on. What is chosen by device asks this.

    Args:
        device: where the tensors of a graph are while it is traced.

    Returns:
        ``device``; inside :func:`compiled_for` the device named there.

    Example:
        >>> target_of(torch.device("cpu"))
        device(type='cpu')
    """
    return _TARGET.get() or device


@contextlib.contextmanager
def compiled_for(device: torch.device) -> Iterator[None]:
    """Context in which graphs are traced on one device and compiled for another (``triton_without_gpu``).

    Args:
        device: what they are compiled for.

    Example:
        >>> with compiled_for(torch.device("cuda")):
        ...     target_of(torch.device("cpu"))
        device(type='cuda')
    """
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)


__all__ = ["compiled_for", "target_of"]
