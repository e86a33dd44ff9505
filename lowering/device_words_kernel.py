"""The kernel of :mod:`.device_words`, in a module of its own because only a machine with Triton can import it."""

from __future__ import annotations

import triton
import triton.language as tl

#: Words that one program compares: with one or two programs a launch takes about as long as an empty kernel.
BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def read_words(addresses, masks, expected, flag, count, RECORD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read the 4-byte word at each address and keep it (``RECORD``), or set the flag where it is not the expected one.

    Args:
        addresses: int64 ``[count]``, of words in the device's memory.
        masks: int32 ``[count]``, the bits of each word that count.
        expected: int32 ``[count]``.
        flag: one int32, possibly in pinned memory of the host.
        count: how many there are.
        RECORD: whether to write ``expected`` or to compare with it.
        BLOCK: words of one program.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < count
    places = tl.load(addresses + index, mask=exists, other=0).to(tl.pointer_type(tl.int32))
    words = tl.load(places, mask=exists, other=0) & tl.load(masks + index, mask=exists, other=0)
    if RECORD:
        tl.store(expected + index, words, mask=exists)
    else:
        wanted = tl.load(expected + index, mask=exists, other=0)
        # Every program that sees a difference writes the same number.
        tl.store(flag + tl.zeros_like(index), 1, mask=exists & (words != wanted))
