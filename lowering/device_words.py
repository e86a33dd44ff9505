"""Words of a GPU's memory at listed addresses: kept, and compared by a small kernel that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def record_words(addresses: Tensor, masks: Tensor, expected: Tensor) -> None:
    """Keep what stands at some addresses at this moment of the current stream.

    Args:
        addresses: int64 ``[count]`` on a GPU, of aligned 4-byte words in its memory.
        masks: int32 ``[count]`` on the same GPU: the bits of each word that count.
        expected: int32 ``[count]`` on the same GPU; written.

    Raises:
        ImportError: Triton is not installed.
    """
    _launch(addresses, masks, expected, expected, record=True)


def compare_words(addresses: Tensor, masks: Tensor, expected: Tensor, flag: Tensor) -> None:
    """Set a flag if other words stand at some addresses, at this moment of the current stream, than were kept.

    The host does not wait: the flag is set once the stream has come to this point.

    Args:
        addresses: as for :func:`record_words`.
        masks: likewise.
        expected: what :func:`record_words` kept.
        flag: int32 ``[1]``, in pinned memory of the host or on the GPU. It becomes 1 or stays what it is.

    Raises:
        ImportError: Triton is not installed.
    """
    _launch(addresses, masks, expected, flag, record=False)


def _launch(addresses: Tensor, masks: Tensor, expected: Tensor, flag: Tensor, *, record: bool) -> None:
    from lncompile.lowering.device_words_kernel import BLOCK, read_words

    count = addresses.numel()
    grid = ((count + BLOCK - 1) // BLOCK,)
    if addresses.device.type != "cuda" or addresses.device.index == torch.cuda.current_device():
        read_words[grid](addresses, masks, expected, flag, count, RECORD=record, BLOCK=BLOCK)
        return
    with torch.cuda.device(addresses.device):  # Triton launches on the current device
        read_words[grid](addresses, masks, expected, flag, count, RECORD=record, BLOCK=BLOCK)
