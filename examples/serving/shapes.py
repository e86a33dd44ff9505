"""The shapes of batches: a small set, so that each of them can be compiled before the first request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from serving.arms import EMBED, GENERATE
from serving.settings import Settings

_SHORTEST = 16


class Shape(NamedTuple):
    """The shape of a batch.

    Attributes:
        task: ``"embed"`` or ``"generate"``.
        texts: how many texts it has, filled up.
        length: how many tokens each of them has, padded.
    """

    task: str
    texts: int
    length: int

    def __str__(self) -> str:
        return f"{self.task} {self.texts} × {self.length}"


class Shapes:
    """Rounds batches up to a small set of shapes.

    Numbers of texts and lengths are powers of two, and the largest that the settings allow. A prompt's shape leaves
    room for ``new_tokens`` more, so each shape can be generated from as far as any request goes, and what a batch does
    is the beginning of what warm-up did with its shape.

    Args:
        settings: limits of the server.
        longest: tokens that the model takes.
        generates: whether the model generates.

    Attributes:
        longest: tokens of a text, and of a prompt with its continuation.
        new_tokens: how many tokens are generated from each shape at warm-up, and at most from a batch of that shape.

    Example:
        >>> shapes = Shapes(Settings(max_batch=4, max_tokens=64, max_new_tokens=8), 64, True)
        >>> shapes.texts(3), shapes.length("embed", 20), shapes.length("generate", 30, new_tokens=8)
        (4, 32, 32)
    """

    def __init__(self, settings: Settings, longest: int, generates: bool) -> None:
        self.longest = longest
        self.new_tokens = min(settings.max_new_tokens, longest // 2) if generates else 0
        self._sizes = _powers(1, settings.max_batch)
        self._lengths = {EMBED: _powers(_SHORTEST, longest)}
        if self.new_tokens:
            self._lengths[GENERATE] = _powers(_SHORTEST, longest - self.new_tokens)

    def length(self, task: str, tokens: int, new_tokens: int = 0) -> int | None:
        """The length to pad a text to; None if none of the set is long enough, with room for what is generated."""
        # generate() hands the model other arguments for a batch without padding, which would be compiled once more.
        least = tokens + 1 if task == GENERATE else tokens
        fitting = (length for length in self._lengths.get(task, ()) if length >= least)
        return next(fitting, None) if new_tokens <= self.new_tokens else None

    def texts(self, texts: int) -> int:
        """The number of texts to fill a batch up to."""
        return next(size for size in self._sizes if size >= texts)

    def __iter__(self) -> Iterator[Shape]:
        """All of them, the smallest first: what Dynamo makes of the second one holds for most of the others."""
        for task, lengths in self._lengths.items():
            yield from (Shape(task, size, length) for length in lengths for size in self._sizes)

    def __len__(self) -> int:
        return sum(len(lengths) for lengths in self._lengths.values()) * len(self._sizes)


def rounded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _powers(least: int, most: int) -> tuple[int, ...]:
    """Powers of two from a least number to a largest one, and the largest one itself."""
    powers = [least]
    while powers[-1] < most:
        powers.append(2 * powers[-1])
    return (*powers[:-1], most)
