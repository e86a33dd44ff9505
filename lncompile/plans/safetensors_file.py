"""Safetensors files, a tensor at a time: a header in JSON, then the bytes of each tensor, one behind the other.

The format is ``[8 bytes: length of the header][header][data]``; the header has for each tensor its dtype, its shape,
and where it begins and ends in the data. Memory is for one tensor, or for a piece of one where it is only copied.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

#: Dtypes of what can be centered. Others are copied, whatever they are.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: Bytes that are copied at once.
PIECE = 16 << 20
_LARGEST_HEADER = 100_000_000  # what the format allows


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or a place that none can be written to. The message says which and why."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: in the state dict.
        dtype: as the format names it.
        shape: its sizes.
        start: where its bytes begin in the file.
        bytes: how many there are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A file and what its header says.

    Attributes:
        path: the file.
        tensors: in the order of their bytes.
        metadata: words that the header holds beside them.
    """

    path: Path
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> SafetensorsFile:
        """Read the header.

        Raises:
            CheckpointError: where the file is not one, or is cut off.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(_LARGEST_HEADER, size - 8):
                raise CheckpointError(f"'{path}' is not a safetensors file, or it is cut off")
            try:
                header = json.loads(file.read(length))
                metadata = header.pop("__metadata__", {})
                tensors = [_stored(name, entry, 8 + length) for name, entry in header.items()]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"the header of '{path}' cannot be read: {error}") from error
        ordered = tuple(sorted(tensors, key=lambda tensor: (tensor.start, tensor.bytes)))
        ends = [8 + length, *(tensor.start + tensor.bytes for tensor in ordered)]
        if [tensor.start for tensor in ordered] != ends[:-1] or ends[-1] != size:
            raise CheckpointError(f"'{path}' has {size} bytes where its header speaks of {ends[-1]}: it is cut off")
        return cls(path, ordered, metadata)


def _stored(name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    first, last = entry["data_offsets"]
    return StoredTensor(name, str(entry["dtype"]), tuple(entry["shape"]), data + first, last - first)


def load(file: IO[bytes], stored: StoredTensor) -> Tensor:
    """Read one tensor.

    Raises:
        CheckpointError: where its dtype is not a floating one of 16 bits or more, or its bytes are not all there.
    """
    if stored.dtype not in FLOATING:
        raise CheckpointError(f"'{stored.name}' has dtype {stored.dtype}, whose values cannot be centered")
    values = torch.empty(stored.bytes, dtype=torch.uint8)
    file.seek(stored.start)
    if stored.bytes and file.readinto(values.numpy()) != stored.bytes:  # type: ignore[attr-defined]
        raise CheckpointError(f"'{stored.name}' is cut off")
    return values.view(FLOATING[stored.dtype]).reshape(stored.shape)


def pieces(file: IO[bytes], stored: StoredTensor) -> Iterator[bytes]:
    """Read the bytes of one tensor, some at a time."""
    for begin in range(0, stored.bytes, PIECE):
        file.seek(stored.start + begin)
        piece = file.read(min(PIECE, stored.bytes - begin))
        if len(piece) != min(PIECE, stored.bytes - begin):
            raise CheckpointError(f"'{stored.name}' is cut off")
        yield piece


def pieces_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous tensor, some at a time."""
    values: memoryview = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    for begin in range(0, len(values), PIECE):
        yield values[begin : begin + PIECE]


def header(tensors: Sequence[tuple[str, StoredTensor]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file with these tensors, one behind the other.

    Args:
        tensors: names, and what is stored under them.
        metadata: words to hold beside them.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, stored in tensors:
        ends = [position, position + stored.bytes]
        entries[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": ends}
        position = ends[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
