"""A test of every architecture in every dtype, of which CI runs a part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_each_dtype(by_default: Callable[[str, torch.dtype], bool]) -> pytest.MarkDecorator:
    """Parametrize ``architecture`` and ``dtype``.

    Args:
        by_default: whether a pair, given by the architecture's name and the dtype, runs where slow tests do not.
    """
    return pytest.mark.parametrize(
        ("architecture", "dtype"),
        [
            pytest.param(
                architecture,
                dtype,
                id=f"{architecture.name}-{str(dtype).removeprefix('torch.')}",
                marks=[] if by_default(architecture.name, dtype) else [pytest.mark.slow],
            )
            for architecture in ARCHITECTURES
            for dtype in DTYPES
        ],
    )


__all__ = ["DTYPES", "in_each_dtype"]
