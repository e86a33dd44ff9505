"""From texts to answers: limits, tokens, batches, and the test between both arms."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

import lncompile
from serving.arms import EMBED, GENERATE, CompilationNeeded, eager_arm, nothing_compiled, pad
from serving.batching import Batcher, Item, Kind
from serving.models import Served
from serving.settings import Refused, Settings
from serving.shapes import Shape, Shapes, rounded
from serving.warm_up import WarmUp

log = logging.getLogger("lncompile.serve")


class Service:
    """A model, its two arms, and the queue in front of them. Use it from one event loop.

    Nothing is compiled for a request. The shapes of batches are a small set, all compiled before the server is ready.
    A batch of another shape is answered by the model as it is, which is slower than compiled code and at once. So is a
    batch for which Dynamo wants to compile something all the same, because a value that its code depends on has
    changed. (Compiling on another thread was tried instead. Whether Dynamo may compile is one setting for the process,
    and tracing keeps Python's lock: calls of a small compiled function waited for up to half a second.)

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
        shapes: of batches.
        on_batch: called with task and number of texts before each batch.
        on_eager: called with the task for each batch that the model as it is answers.
        warm_up: what compiles each shape in each arm.
        ready: whether warm-up is over.
        draining: whether the server is going to shut down, and still takes requests.
        broken: why it cannot answer, or None.
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
        longest = min(self.settings.max_tokens, served.positions or self.settings.max_tokens)
        self.shapes = Shapes(self.settings, longest, served.generates)
        self.batcher = Batcher(self._answer, self.settings)
        self.on_batch: Callable[[str, int], None] = lambda task, size: None
        self.on_eager: Callable[[str], None] = lambda task: None
        self.warm_up = WarmUp(self.ab, self.shapes, served)
        self.ready = self.draining = False
        self.broken: str | None = None
        self._eager = eager_arm(served)
        self._running: asyncio.Task[None] | None = None
        # One thread calls the model, at warm-up and later: what Dynamo's guards read of a thread's state is the same.
        self._model_thread = concurrent.futures.ThreadPoolExecutor(1, "model")

    @property
    def status(self) -> str:
        """What the server is doing: ``"warming up"``, ``"ready"``, ``"shutting down"`` or ``"broken"``."""
        if self.broken is not None:
            return "broken"
        return "shutting down" if self.draining else "ready" if self.ready else "warming up"

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
        if len(tokens) + new_tokens > self.shapes.longest:
            raise Refused(
                413,
                f"{len(tokens)} tokens of the prompt and {new_tokens} new ones are more than {self.shapes.longest}, "
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
            raise Refused(503, "The model is still being compiled. GET /health/ready says when it is.", retry_after=5)

    def _tokens(self, what: str, text: str) -> list[int]:
        longest = self.shapes.longest
        # No character is more than four bytes, and tokens of more than sixteen characters are rare.
        if len(text) > 16 * longest:
            raise Refused(413, f"There are {len(text)} characters in {what}: far more than {longest} tokens.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused(422, f"A character in {what} is half of a surrogate pair, which is not text.") from None
        tokens = self.served.tokenizer.encode(text)
        if not tokens:
            raise Refused(422, f"There are no tokens in {what}: it is empty.")
        if len(tokens) > longest:
            raise Refused(413, f"There are {len(tokens)} tokens in {what}: the server takes {longest} at most.")
        return tokens

    def _kind(self, task: str, tokens: int, new_tokens: int, user: str | None) -> Kind:
        length = self.shapes.length(task, tokens, new_tokens)
        arm = None if user is None else self.ab.assigned_to(user)
        return Kind(task, length or tokens, rounded(new_tokens) if new_tokens else 0, arm, length is not None)

    # --- batches ---

    async def _answer(self, items: Sequence[Item]) -> list[Any]:
        self.on_batch(items[0].kind.task, len(items))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._model_thread, self._call, items)

    def _call(self, items: Sequence[Item]) -> list[Any]:
        kind, texts = items[0].kind, [item.tokens for item in items]
        if kind.compiled:
            # More of a text that is there: a row of nothing but padding has no tokens to average or to attend to.
            texts += [texts[0]] * (self.shapes.texts(len(texts)) - len(texts))
        tokens, mask = pad(texts, kind.length, self.served.tokenizer.padding, left=kind.task == GENERATE)
        device = self.served.model.device
        batch = kind.task, tokens.to(device), mask.to(device), max(item.new_tokens for item in items)
        # All users of a batch belong to one arm, so any of them stands for all.
        answer = self._compiled(kind, batch, items[0].user)
        if answer is None:
            self.on_eager(kind.task)
            answer = self._eager(*batch)
        rows: list[Any] = answer[: len(items)].tolist()
        return rows

    def _compiled(self, kind: Kind, batch: tuple[str, Tensor, Tensor, int], user: str | None) -> Tensor | None:
        """What an arm answers; None if it would have to compile something."""
        shape = Shape(kind.task, len(batch[1]), kind.length)
        if not kind.compiled or shape not in self.warm_up.compiled:
            return None
        try:
            with nothing_compiled():
                answer: Tensor = self.ab(*batch, ab_key=user)
        except CompilationNeeded as reason:
            # Once is enough: each further try would run the model up to the same place for nothing.
            self.warm_up.compiled.discard(shape)
            log.warning("batches of %s are answered by eager from here on: %s", shape, reason)
            return None
        return answer

    # --- life ---

    def start(self) -> None:
        """Warm up and answer, until :meth:`close`."""
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        self.broken = await loop.run_in_executor(self._model_thread, self.warm_up.run)
        self.ready = self.broken is None and not self.warm_up.cancelled
        if self.ready:
            log.info("ready: %d of %d shapes of batches are compiled", len(self.warm_up.compiled), len(self.shapes))
        await self.batcher.run()

    def drain(self) -> None:
        """Say from now on that the server is not ready, so that requests go elsewhere. Those that come are answered."""
        self.draining = True

    async def close(self) -> None:
        """Take no more requests; those that wait are answered first."""
        self.warm_up.cancelled = True
        self.batcher.close()
        if self._running is not None:
            await self._running
        await asyncio.to_thread(self._model_thread.shutdown)


def _bucket(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A batch's kind, as the report shows it."""
    task, tokens, _, new_tokens = args
    rows, length = tokens.shape
    words = str(Shape(task, rows, length))
    return f"{words} + {rounded(new_tokens)}" if task == GENERATE else words
