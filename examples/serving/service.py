"""From texts to answers: limits, tokens, batches, and the test between both arms."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lncompile
from serving.arms import EMBED, GENERATE, pad
from serving.batching import Batcher, Item, Kind
from serving.models import Served
from serving.settings import Refused, Settings

log = logging.getLogger("lncompile.serve")
_SHORTEST = 16


class Service:
    """A model, its two arms, and the queue in front of them. Use it from one event loop.

    Args:
        served: the model.
        arms: what answers, by name, the baseline first: ``arm(task, tokens, mask, new_tokens)``.
        settings: limits and batching.
        ratio: the candidate's share of batches.
        shadow: the share of batches that both arms answer, to compare outputs.
        seed: of the coins; a user goes to the same arm in all servers with one seed.

    Attributes:
        ab: the test.
        batcher: the queue.
        on_batch: called with task and number of texts before each batch.
        ready: whether warm-up is over.
        broken: why it never will be, or None.
    """

    def __init__(
        self,
        served: Served,
        arms: Mapping[str, Callable[..., Any]],
        settings: Settings | None = None,
        *,
        ratio: float = 0.5,
        shadow: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.served, self.settings = served, settings or Settings()
        self.ab = lncompile.ABTest(
            served.model,
            arms=arms,
            ratio=ratio,
            shadow=shadow,
            seed=seed,
            bucket=_bucket,
            name=type(served.model).__name__,
        )
        self.batcher = Batcher(self._answer, self.settings)
        self.on_batch: Callable[[str, int], None] = lambda task, size: None
        self.ready = False
        self.broken: str | None = None
        self._closing = False
        self._running: asyncio.Task[None] | None = None
        self._longest = min(self.settings.max_tokens, served.positions or self.settings.max_tokens)

    # --- requests ---

    async def embed(self, texts: Sequence[str], user: str | None = None) -> tuple[list[Any], int]:
        """Embed texts.

        Returns:
            A list of floats for each text, and how many tokens they have.

        Raises:
            Refused: if there is nothing to embed, too much, or no time for it.
        """
        self._check_ready()
        if not texts:
            raise Refused(422, "There are no texts to embed.")
        if len(texts) > self.settings.max_texts:
            raise Refused(422, f"{len(texts)} texts are too many: at most {self.settings.max_texts} in one request.")
        tokens = [self._tokens(f"text {number}", text) for number, text in enumerate(texts)]
        items = [Item(self._kind(EMBED, len(text), 0, user), text, user=user) for text in tokens]
        return await self.batcher.submit(items), sum(map(len, tokens))

    async def generate(self, prompt: str, new_tokens: int, user: str | None = None) -> tuple[str, int, int]:
        """Continue a prompt, greedily.

        Returns:
            The text that follows, the prompt's number of tokens, and how many were generated.

        Raises:
            Refused: if the model does not generate, the prompt is empty, or too much is wanted, or no time for it.
        """
        self._check_ready()
        if not self.served.generates:
            raise Refused(422, f"{type(self.served.model).__name__} does not generate text. POST /embed works.")
        if not 1 <= new_tokens <= self.settings.max_new_tokens:
            raise Refused(422, f"max_new_tokens is between 1 and {self.settings.max_new_tokens}, not {new_tokens}.")
        tokens = self._tokens("the prompt", prompt)
        if len(tokens) + new_tokens > self._longest:
            raise Refused(
                413,
                f"{len(tokens)} tokens of the prompt and {new_tokens} new ones are more than {self._longest}, "
                "what the server takes.",
            )
        kind = self._kind(GENERATE, len(tokens), new_tokens, user)
        (answer,) = await self.batcher.submit([Item(kind, tokens, new_tokens, user)])
        answer = answer[:new_tokens]
        end = self.served.tokenizer.end
        if end is not None and end in answer:
            answer = answer[: answer.index(end)]
        return self.served.tokenizer.decode([int(token) for token in answer]), len(tokens), len(answer)

    def _check_ready(self) -> None:
        if self.broken is not None:
            raise Refused(503, f"The server cannot serve: {self.broken}.")
        if not self.ready:
            raise Refused(503, "The model is still being compiled. GET /health says when it is ready.", retry_after=5)

    def _tokens(self, what: str, text: str) -> list[int]:
        # No character is more than four bytes, and tokens of more than sixteen characters are rare.
        if len(text) > 16 * self._longest:
            raise Refused(413, f"There are {len(text)} characters in {what}: far more than {self._longest} tokens.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused(422, f"A character in {what} is half of a surrogate pair, which is no text.") from None
        tokens = self.served.tokenizer.encode(text)
        if not tokens:
            raise Refused(422, f"There are no tokens in {what}: it is empty.")
        if len(tokens) > self._longest:
            raise Refused(413, f"There are {len(tokens)} tokens in {what}: the server takes {self._longest} at most.")
        return tokens

    def _kind(self, task: str, length: int, new_tokens: int, user: str | None) -> Kind:
        room = self._longest - _rounded(new_tokens, self.settings.max_new_tokens) if new_tokens else self._longest
        # generate() hands the model other arguments for a batch without any padding, which would be compiled once more.
        least = length + 1 if task == GENERATE else length
        padded = max(length, min(_rounded(least, self._longest, _SHORTEST), room))
        arm = None if user is None else self.ab.assigned_to(user)
        return Kind(task, padded, _rounded(new_tokens, self._longest - padded) if new_tokens else 0, arm)

    # --- batches ---

    async def _answer(self, items: Sequence[Item]) -> list[Any]:
        kind = items[0].kind
        self.on_batch(kind.task, len(items))
        left = kind.task == GENERATE
        tokens, mask = pad([item.tokens for item in items], kind.length, self.served.tokenizer.padding, left)
        device = self.served.model.device
        steps = max(item.new_tokens for item in items)
        # All users of a batch belong to one arm, so any of them stands for all.
        answer = await self.ab.acall(kind.task, tokens.to(device), mask.to(device), steps, ab_key=items[0].user)
        # Not here: it waits for a GPU to finish.
        rows: list[Any] = await asyncio.to_thread(answer.tolist)
        return rows

    # --- life ---

    def warm_up(self) -> None:
        """Let each arm compile what it needs, outside of the test: it takes no requests before."""
        tokenizer, device = self.served.tokenizer, self.served.model.device
        tokens = tokenizer.encode("Once upon a time")[: _SHORTEST // 2] or [tokenizer.padding]
        tasks = [(EMBED, 0), *([(GENERATE, 2)] if self.served.generates else [])]
        short, longer = (min(length, self._longest) for length in (_SHORTEST, 2 * _SHORTEST))
        for name, arm in self.ab.arms.items():
            try:
                for task, new_tokens in tasks:
                    # One text, several, and another length: Dynamo compiles sizes of 1 apart from others.
                    for texts, length in ((1, short), (2, short), (3, longer)):
                        if self._closing:
                            return
                        tensors = pad([tokens] * texts, length, tokenizer.padding, task == GENERATE)
                        log.info("warm-up of %s: %s, %d × %d tokens", name, task, texts, length)
                        arm(task, *(tensor.to(device) for tensor in tensors), new_tokens)
            except Exception as error:
                log.exception("arm '%s' fails at its warm-up", name)
                try:
                    self.ab.take_out(name, f"it raised {type(error).__name__} at its warm-up: {error}")
                except ValueError:  # the last one in service
                    self.broken = f"no arm can answer, {name} raises {type(error).__name__}: {error}"
                    return
        self.ready = True

    def start(self) -> None:
        """Warm up and answer, until :meth:`close`."""
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await asyncio.to_thread(self.warm_up)
        if self.ready:
            log.info("ready")
        await self.batcher.run()

    async def close(self) -> None:
        """Take no more requests; those that wait are answered first."""
        self._closing = True
        self.batcher.close()
        if self._running is not None:
            await self._running
        await asyncio.to_thread(self.ab.close)


def _rounded(size: int, limit: int = 1 << 30, least: int = 1) -> int:
    """The next power of two, between a least and a largest size."""
    return min(max(least, 1 << (size - 1).bit_length()), limit)


def _bucket(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A batch's kind, as the report shows it."""
    task, tokens, _, new_tokens = args
    rows, length = tokens.shape
    words = f"{task} {_rounded(rows)} × {length}"
    return f"{words} + {_rounded(new_tokens)}" if task == GENERATE else words
