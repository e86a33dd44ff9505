"""A few elements of every weight, looked at again before each call: they show the writes that torch does not count.

torch's version counter sees a write through the parameter itself. It does not see ``.data.copy_``, NumPy, DLPack, a
flat buffer that parameters are views of, collectives, another process or a replayed CUDA graph. All of these leave the
parameter where it is and change its elements, so a few elements at fixed, scattered places tell.

What is unseen: a write that leaves every sampled element of every weight of a graph as it was. If a write changes each
element with probability ``f``, it is unseen with probability::

    (1 - f)^k        k = the number of elements looked at in all weights of the graph, about 2000 in float32

so a write to whole tensors cannot be missed. Of one weight alone 12 to 32 elements are looked at (float32), at 3 to 8
places. A write to a single row of a table that has ``V`` rows changes no other weight and meets one of the table's
``p`` places with probability ``p / V``: that needs the version counter, or :func:`lncompile.refresh`.

On a CPU the look is one gather from memory by address and one comparison, and its answer holds for the call behind it.
On a GPU a kernel of one or two programs is launched before each call and sets a flag in pinned memory; the next call
reads the flag. The host never waits. So a write is noticed by the first call whose predecessor the GPU has begun.
"""

from __future__ import annotations

import collections
import itertools
import logging
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lncompile.lowering import compare_words, record_words, torch_private
from lncompile.passes.graph.sharding import is_sharded
from lncompile.runtime.memory_words import HALF_WORDS, index_of_half_word

log = logging.getLogger("lncompile")

# Bytes of a word, the unit that is read. An aligned word that holds a byte of a tensor can be read whole: it does not
# reach into another page of memory.
_WORD = 4
# Places in each weight: at least, at most, and in all weights together where that lies between. A place costs a miss of
# the cache, about 50 ns on a CPU.
_LEAST, _MOST, _TOGETHER = 3, 8, 512
# Bytes that are read at a place, aligned, so that they are in one line of the cache: more of them cost no other miss.
_BLOCK = 16
# Knuth's multiplicative hash: scatters the places, so that they do not all stand at the beginning of a row or a head.
_SCATTER = 2654435761
_LITTLE = sys.byteorder == "little"
_ALL_BITS = 0xFFFFFFFF


def place_count(weights: int) -> int:
    """Return at how many places each of so many weights is looked at."""
    return min(_MOST, max(_LEAST, _TOGETHER // max(weights, 1)))


def local(tensor: Tensor) -> Tensor:
    """The tensor in this process's memory that holds the elements of a weight: of a sharded one the shard."""
    return torch_private.local_tensor(tensor) if is_sharded(tensor) else tensor


def lies_within(tensor: Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether a tensor's elements lie within a storage: not where it was given back (``storage.resize_(0)``)."""
    extent = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    end = (tensor.storage_offset() + extent) * tensor.element_size()
    return tensor.numel() == 0 or (tensor.data_ptr() != 0 and end <= storage.nbytes())


def word_places(tensor: Tensor, places: int) -> dict[int, int]:
    """Return the addresses of the words that hold some elements of a tensor, scattered over it, and which bits are its.

    Args:
        tensor: strided, with memory of its own; views and transposed tensors as well.
        places: how many elements; all of them where there are fewer. Of a contiguous tensor those beside them as well.

    Returns:
        For each address of a word a mask: in a flat buffer of half precision a word may be shared with a neighbour.

    Example:
        >>> len(word_places(torch.zeros(64, 64), 4)), len(word_places(torch.zeros(64, 64).t(), 4))
        (16, 4)
    """
    count, size = tensor.numel(), tensor.element_size()
    places = min(places, count)
    words: dict[int, int] = {}
    begin, close = tensor.data_ptr(), tensor.data_ptr() + count * size if tensor.is_contiguous() else 0
    for part in range(places):
        first, end = part * count // places, (part + 1) * count // places
        index = first + (part + 1) * _SCATTER % (end - first)
        offset = 0
        for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            index, position = divmod(index, length)
            offset += position * stride
        start = tensor.data_ptr() + offset * size
        if close:  # what stands beside the element is the tensor's as well, as far as the tensor goes
            first, last, unit = begin, close, _BLOCK
        else:
            first, last, unit = start, start + size, _WORD
        block = start - start % unit
        for word in range(max(block, first - first % _WORD), min(max(block + unit, start + size), last), _WORD):
            own = range(max(word, first) - word, min(word + _WORD, last) - word)
            words[word] = words.get(word, 0) | sum(0xFF << 8 * (byte if _LITTLE else _WORD - 1 - byte) for byte in own)
    return words


class _Word(NamedTuple):
    """A word that is looked at: where, which of its bits count, and of which weight it is."""

    address: int
    mask: int
    owner: int


class _Memory(Protocol):
    """The sampled words of some weights in one memory."""

    def differ(self) -> bool:
        """Whether one of them is seen to differ from what was recorded."""

    def record(self) -> None:
        """Take them as they are now for what is expected."""

    def different(self) -> Iterator[int]:
        """The indices of weights whose words differ now; waits for the device."""


class WeightSamples:
    """Elements of some weights as they were when this was made.

    Args:
        tensors: with memory in the host or on a GPU; those on other devices are not looked at.

    Attributes:
        in_host: the addresses of the words in the host's memory, and which bits of each count.

    Example:
        >>> weight = torch.zeros(8, 8)
        >>> samples = WeightSamples([weight])
        >>> weight.numpy()[:] = 1
        >>> samples.differ(), samples.different()
        (True, [0])
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        places = place_count(len(tensors))
        by_device: dict[torch.device, list[_Word]] = {}
        for index, tensor in enumerate(map(local, tensors)):
            if tensor.device.type in ("cpu", "cuda"):
                found = word_places(tensor, places)
                words = (_Word(address, mask, index) for address, mask in found.items())
                by_device.setdefault(tensor.device, []).extend(words)
        self.in_host = [(word.address, word.mask) for word in by_device.get(torch.device("cpu"), [])]
        self._memories = [memory for memory in itertools.starmap(_memory, by_device.items()) if memory is not None]
        if len(self._memories) == 1:
            self.differ = self._memories[0].differ  # type: ignore[method-assign]  # this is asked at every call

    def differ(self) -> bool:
        """Whether an element is seen to differ: on a CPU at this moment, on a GPU as of the last look that is back.

        It starts the next look on a GPU, behind what the current stream was given so far.
        """
        seen = [memory.differ() for memory in self._memories]  # all of them: each starts its next look
        return any(seen)

    def differ_on_devices(self) -> bool:
        """As :meth:`differ`, of what is not in the host's memory."""
        seen = [memory.differ() for memory in self._memories if not isinstance(memory, _HostMemory)]
        return any(seen)

    @property
    def are_all_in_host(self) -> bool:
        """Whether there is nothing to look at on other devices."""
        return all(isinstance(memory, _HostMemory) for memory in self._memories)

    def record(self) -> None:
        """Take all elements as they are now for what is expected."""
        for memory in self._memories:
            memory.record()

    def different(self) -> list[int]:
        """Return the positions of the weights whose elements differ now. Waits for the device."""
        return sorted({index for memory in self._memories for index in memory.different()})


def _memory(device: torch.device, words: Sequence[_Word]) -> _Memory | None:
    if device.type == "cpu":
        return _HostMemory(words)
    try:
        return _DeviceMemory(words, device)
    except Exception as error:
        log.warning(
            "weights on %s are looked at by torch's version counters alone, because the kernel that compares their "
            "elements failed; call lncompile.refresh() after writes through .data and the like: %s",
            device,
            error,
        )
        return None


# --- on a CPU ---


class _HostMemory:
    """Words in the host's memory. The caller has to know that the weights are still where they were."""

    def __init__(self, words: Sequence[_Word]) -> None:
        self._index = np.array([index_of_half_word(word.address) for word in words], dtype=np.intp)
        self._owners = np.array([word.owner for word in words], dtype=np.intp)
        masks = np.array([word.mask for word in words], dtype=np.uint32)
        self._masks: Any = None if (masks == _ALL_BITS).all() else masks
        self.record()

    def _read(self) -> Any:
        words = HALF_WORDS[self._index]
        return words if self._masks is None else words & self._masks

    def record(self) -> None:
        self._expected: bytes = self._read().tobytes()

    def differ(self) -> bool:
        seen: bytes = self._read().tobytes()
        return seen != self._expected

    def different(self) -> Iterator[int]:
        expected = np.frombuffer(self._expected, dtype=np.uint32)
        yield from map(int, self._owners[self._read() != expected])


# --- on a GPU ---


class _Flags:
    """Flags in pinned memory, which a kernel can set and the host can read without waiting.

    The memory is never given back: a kernel may still be under way when its owner is gone. A flag is used again only
    after many others were given back, and an owner that finds its flag set looks for itself.
    """

    _BLOCK, _RESTING = 1024, 256

    def __init__(self) -> None:
        self._free: collections.deque[Tensor] = collections.deque()

    def take(self, pinned: bool) -> Tensor:
        if len(self._free) <= self._RESTING:
            self._free.extend(torch.zeros(self._BLOCK, 1, dtype=torch.int32, pin_memory=pinned).unbind())
        flag = self._free.popleft()
        flag.zero_()
        return flag

    def give_back(self, flag: Tensor) -> None:
        self._free.append(flag)


_flags = _Flags()


class _DeviceMemory:
    """Words in a GPU's memory, compared by a kernel on the current stream."""

    def __init__(self, words: Sequence[_Word], device: torch.device) -> None:
        self._device = device
        self._is_gpu = device.type == "cuda"
        self._owners = [word.owner for word in words]
        self._addresses = torch.tensor([word.address for word in words], dtype=torch.int64).to(device)
        masks = np.array([word.mask for word in words], dtype=np.uint32).view(np.int32)  # Triton reads signed ones
        self._masks = torch.from_numpy(masks).to(device)
        self._expected = torch.empty_like(self._masks)
        self._flag = _flags.take(pinned=self._is_gpu)
        self._flag_in_host: Any = self._flag.numpy()
        weakref.finalize(self, _flags.give_back, self._flag)
        self._stream: Any = torch.cuda.current_stream(device) if self._is_gpu else None
        self.record()

    def record(self) -> None:
        record_words(self._addresses, self._masks, self._expected)
        self._flag_in_host[0] = 0

    def differ(self) -> bool:
        if self._is_gpu and torch.cuda.is_current_stream_capturing():
            return False  # nothing may wait now, and replayed, the look could outlive the addresses that it reads
        if self._flag_in_host[0]:
            self._flag_in_host[0] = 0
            # A look that was under way when the words were recorded anew, or that another owner of the flag started,
            # says nothing of these.
            if next(self.different(), None) is not None:
                return True
        if self._is_gpu and (stream := torch.cuda.current_stream(self._device)) != self._stream:
            # Freed, their memory is to stay theirs until this stream is through as well.
            for tensor in (self._addresses, self._masks, self._expected):
                tensor.record_stream(stream)
        compare_words(self._addresses, self._masks, self._expected, self._flag)
        return False

    def different(self) -> Iterator[int]:
        now = torch.empty_like(self._expected)
        record_words(self._addresses, self._masks, now)
        yield from (self._owners[word] for word in (now != self._expected).nonzero().flatten().tolist())
