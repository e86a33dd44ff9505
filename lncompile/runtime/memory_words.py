"""This process's memory as arrays, so that NumPy gathers words at many addresses in one go.

Reading by address, and not through views of tensors, has two reasons: a view keeps memory alive that its owner has
given up, and a gather from 200 views takes ten times as long. The reader has to know that memory is there.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def _whole_memory(dtype: type[np.unsignedinteger[Any]]) -> Any:
    size = np.dtype(dtype).itemsize

    class Memory:
        # It begins at the second word: NumPy takes no address 0.
        __array_interface__ = {  # noqa: RUF012  # NumPy's protocol
            "version": 3,
            "typestr": np.dtype(dtype).str,
            "shape": (2**62 // size,),
            "data": (size, True),
        }

    return np.asarray(Memory())


#: Aligned words of 8 bytes.
WORDS: Any = _whole_memory(np.uint64)
#: Aligned words of 4 bytes.
HALF_WORDS: Any = _whole_memory(np.uint32)


def index_of_word(address: int) -> int:
    """Return where an address stands in :data:`WORDS`."""
    return address // 8 - 1


def index_of_half_word(address: int) -> int:
    """Return where an address stands in :data:`HALF_WORDS`."""
    return address // 4 - 1
