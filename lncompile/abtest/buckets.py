"""Input-shape buckets: what is compared is requests of one kind, so that a lucky mix of requests decides nothing."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
from torch import Tensor

from lncompile.abtest.sketch import LatencySketch
from lncompile.abtest.statistics import SequentialTest, batch_difference
from lncompile.lowering import torch_private

#: Where requests go once there are as many buckets as there may be. It takes no part in the verdict.
OTHER = "other"
#: Longest name of a bucket; the rest of a longer one is hashed.
_LONGEST_NAME = 100

BucketFunction = Callable[[Sequence[Any], Mapping[str, Any]], str]


def shape_bucket(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Name a request by dtypes and exact shapes of its tensors, and its integers: for traffic of few shapes.

    Args:
        args: positional arguments of a request.
        kwargs: and keyword arguments; their order plays no part.

    Returns:
        A name such as ``"int64[8,128] ×2"``.

    Example:
        >>> shape_bucket((torch.zeros(3, 100),), {})
        'float32[3,100]'
    """
    return _name(args, kwargs, lambda size: size)


def rounded_shape_bucket(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Name a request like :func:`shape_bucket`, each size and integer rounded up to a power of two. The default.

    Args:
        args: positional arguments of a request.
        kwargs: and keyword arguments.

    Example:
        >>> rounded_shape_bucket((torch.zeros(3, 100),), {})
        'float32[4,128]'
    """
    return _name(args, kwargs, lambda size: 1 << (size - 1).bit_length() if size > 0 else size)


def _name(args: Sequence[Any], kwargs: Mapping[str, Any], size: Callable[[int], int]) -> str:
    leaves = torch_private.tree_leaves((tuple(args), [kwargs[name] for name in sorted(kwargs)]))
    words = []
    for word, same in itertools.groupby(_describe(leaf, size) for leaf in leaves):
        repeated = len(list(same))
        words.append(word if repeated == 1 else f"{word} ×{repeated}")
    name = ", ".join(words) or "no arguments"
    if len(name) > _LONGEST_NAME:
        digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
        name = f"{name[: _LONGEST_NAME - 10]}… {digest}"
    return name


def _describe(leaf: Any, size: Callable[[int], int]) -> str:
    if isinstance(leaf, Tensor):
        sizes = ",".join(str(size(int(length))) for length in leaf.shape)
        return f"{str(leaf.dtype).removeprefix('torch.')}[{sizes}]"
    if leaf is None or isinstance(leaf, bool):
        return str(leaf)
    if isinstance(leaf, int):
        return str(size(leaf))
    if isinstance(leaf, (str, bytes)):
        return f"{type(leaf).__name__}[{size(len(leaf))}]"
    return type(leaf).__name__


class Bucket:
    """What is known of the requests of one kind. Arms are numbered: 0 the baseline, 1 the candidate.

    Attributes:
        name: what its requests have in common.
        warm: requests of each arm that were kept out as warm-up.
        latencies: of each arm's requests after warm-up, all of them.
        test: the sequential test over this bucket alone.
    """

    def __init__(self, name: str, batch_size: int) -> None:
        self.name = name
        self.warm = [0, 0]
        self.latencies = (LatencySketch(), LatencySketch())
        self.test = SequentialTest()
        self._log_seconds = numpy.empty(batch_size)
        self._candidate = numpy.empty(batch_size, dtype=numpy.bool_)
        self._filled = 0

    def add(self, arm: int, seconds: float) -> tuple[float, float] | None:
        """Put a request that was assigned at random into the batch.

        Returns:
            What the batch says (see :func:`~lncompile.abtest.statistics.batch_difference`) if it is full now and says
            something.
        """
        # A coarse clock may read 0.
        self._log_seconds[self._filled] = numpy.log(max(seconds, 1e-9))
        self._candidate[self._filled] = arm == 1
        self._filled += 1
        if self._filled < len(self._log_seconds):
            return None
        self._filled = 0
        difference, squared_error = batch_difference(self._log_seconds, self._candidate)
        if numpy.isnan(difference):
            return None
        self.test.add(float(difference), float(squared_error))
        return float(difference), float(squared_error)


class Buckets:
    """The buckets of a test, by name; a bounded number of them, whatever comes."""

    def __init__(self, limit: int, batch_size: int) -> None:
        self._limit = limit
        self._batch_size = batch_size
        self._by_name: dict[str, Bucket] = {}
        self.other = Bucket(OTHER, batch_size)

    def find(self, name: str) -> Bucket:
        """The bucket of this name; a new one while there is room, and the one for all others then."""
        bucket = self._by_name.get(name)
        if bucket is None:
            if name == OTHER or len(self._by_name) >= self._limit:
                return self.other
            bucket = self._by_name[name] = Bucket(name, self._batch_size)
        return bucket

    def __iter__(self) -> Any:
        """All but the one for all others, in the order they first came up."""
        return iter(list(self._by_name.values()))

    def everything(self) -> list[Bucket]:
        """All of them, that for all others included where it is used."""
        used = any(self.other.warm) or any(sketch.count for sketch in self.other.latencies)
        return [*self, *([self.other] if used else [])]
