"""Dynamic batching: texts that wait at the same time and are of one kind share a call of the model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving.settings import Refused, Settings

log = logging.getLogger("lncompile.serve")


class Kind(NamedTuple):
    """What texts of one batch have in common.

    Attributes:
        task: what is wanted.
        length: what they are padded to, in tokens.
        new_tokens: how many are generated, rounded up.
        arm: the one their users are assigned to; None where a request names no user.
        compiled: whether batches of this length are compiled; the model as it is answers others.
    """

    task: str
    length: int
    new_tokens: int = 0
    arm: str | None = None
    compiled: bool = True


@dataclass(eq=False)
class Item:
    """One text that waits.

    Attributes:
        kind: what it may share a batch with.
        tokens: of the text.
        new_tokens: to generate.
        user: the client's name for itself, if it wants the same arm each time.
    """

    kind: Kind
    tokens: list[int]
    new_tokens: int = 0
    user: str | None = None


@dataclass(eq=False)
class _Waiting:
    item: Item
    answer: asyncio.Future[list[float] | list[int]]
    arrived: float


#: Answers texts of one kind, in order.
Answer = Callable[[Sequence[Item]], Awaitable[Sequence[list[float] | list[int]]]]


class Batcher:
    """A queue of texts, answered batch by batch. Call it from one event loop.

    A batch begins when it is full, or when its first text has waited long enough; until the model is free texts go on
    waiting, and batches grow. A text whose client has left leaves the queue.

    Args:
        answer: answers a batch.
        settings: its size, how long it waits for more, and how many may wait.
    """

    def __init__(self, answer: Answer, settings: Settings) -> None:
        self._answer, self._settings = answer, settings
        self._waiting: list[_Waiting] = []
        self._changed = asyncio.Event()
        self._closing = False

    def __len__(self) -> int:
        return len(self._waiting)

    async def submit(self, items: Sequence[Item]) -> list[list[float] | list[int]]:
        """Wait for the answers to some texts. If this is cancelled, or one of them fails, the others are not started.

        Raises:
            Refused: if the queue is full, or closed.
            Exception: what answering raised.
        """
        if self._closing:
            raise Refused(503, "The server is shutting down.", retry_after=5)
        if len(self._waiting) + len(items) > self._settings.max_queue:
            raise Refused(503, f"{len(self._waiting)} texts are waiting already. Try again later.", retry_after=1)
        loop = asyncio.get_running_loop()
        mine = [_Waiting(item, loop.create_future(), loop.time()) for item in items]
        self._waiting += mine
        self._changed.set()
        try:
            return await asyncio.gather(*(waiting.answer for waiting in mine))
        finally:
            for waiting in mine:
                waiting.answer.cancel()
            self._waiting = [waiting for waiting in self._waiting if not waiting.answer.done()]

    async def run(self) -> None:
        """Answer until :meth:`close` and everything that waited then has its answer."""
        while batch := await self._next():
            self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
            await self._answer_all(batch)

    def close(self) -> None:
        """Take no more texts. Those that wait are answered."""
        self._closing = True
        self._changed.set()

    async def _next(self) -> list[_Waiting]:
        """The next batch, once it is time for it; none when all is done."""
        loop, limit = asyncio.get_running_loop(), self._settings.max_batch
        while True:
            self._changed.clear()
            kinds: dict[Kind, list[_Waiting]] = {}
            for waiting in self._waiting:
                kinds.setdefault(waiting.item.kind, []).append(waiting)
            remaining: float | None = None
            if self._waiting:
                remaining = self._waiting[0].arrived + self._settings.max_wait - loop.time()
                if remaining <= 0 or self._closing:
                    return kinds[self._waiting[0].item.kind][:limit]
                for alike in kinds.values():
                    if len(alike) >= limit:
                        return alike[:limit]
            elif self._closing:
                return []
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), remaining)

    async def _answer_all(self, batch: list[_Waiting]) -> None:
        batch = [waiting for waiting in batch if not waiting.answer.done()]
        if not batch:
            return
        try:
            answers = await self._answer([waiting.item for waiting in batch])
        except Exception as error:
            if len(batch) > 1:
                log.warning("a batch failed, its texts are tried one by one: %s: %s", type(error).__name__, error)
                for waiting in batch:
                    await self._answer_all([waiting])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)
