"""Everything that requests need is compiled before the first one: each shape of batch is run in each arm."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import lncompile
from lncompile.lowering.torch_private_dynamo import compilation_watch, many_recompiles
from serving.arms import EMBED, GENERATE, pad
from serving.models import Served
from serving.shapes import Shape, Shapes

log = logging.getLogger("lncompile.serve")
#: Calls of one shape. The first one compiles, the second one shows that nothing is left to compile: a model that writes
#: to itself at its first call needs one more.
_TRIES = 4


class WarmUp:
    """Runs each shape in each arm, until nothing is compiled for it any more.

    A few shapes would do for most models: with ``dynamic=True`` Dynamo compiles batches of one text apart from larger
    ones, and prompts apart from the tokens after them. But code may depend on a size in other ways (a window of
    attention, alignment, the memory layout of a cache, which the second token after a prompt changes), and which ones
    it are is the model's affair. So all of them are run, and generated from as far as any request goes.

    Args:
        test: whose arms are warmed up. It counts none of these calls.
        shapes: to run.
        served: the model.

    Attributes:
        compiled: the shapes that each arm in service answers without compiling anything.
        done: how many runs are over.
        total: how many there are.
        cancelled: set it to stop before the next call.
    """

    def __init__(self, test: lncompile.ABTest, shapes: Shapes, served: Served) -> None:
        self._test, self._shapes, self._served = test, shapes, served
        self.compiled = set(shapes)
        self.done, self.total = 0, len(test.arms) * len(shapes)
        self.cancelled = False

    def run(self) -> str | None:
        """Run all shapes. An arm that fails is taken out of service.

        Returns:
            Why no arm can answer; None if one can.
        """
        for name, arm in self._test.arms.items():
            began = time.perf_counter()
            log.info("arm '%s': warm-up with %d shapes of batches", name, len(self._shapes))
            try:
                self._warm(name, arm)
            except Exception as error:
                log.exception("arm '%s' fails at its warm-up", name)
                try:
                    self._test.take_out(name, f"it raised {type(error).__name__} at its warm-up: {error}")
                except ValueError:  # the last one in service
                    return f"no arm can answer, {name} raises {type(error).__name__}: {error}"
            if self.cancelled:
                return None
            log.info("arm '%s': warm-up took %.0f s", name, time.perf_counter() - began)
        return None

    def _warm(self, name: str, arm: Callable[..., Any]) -> None:
        # Beyond Dynamo's limit of entries for a function it would run eager code, and not say so.
        with many_recompiles():
            for shape in self._shapes:
                if self.cancelled:
                    return
                began, ticks = time.perf_counter(), compilation_watch.ticks()
                if not all(self._settles(arm, shape, filled) for filled in (False, True)):
                    self.compiled.discard(shape)
                    log.warning("arm '%s' compiles %s at every call: eager will answer it", name, shape)
                elif not compilation_watch.undisturbed(ticks):
                    log.info("arm '%s' compiled %s in %.0f s", name, shape, time.perf_counter() - began)
                self.done += 1

    def _settles(self, arm: Callable[..., Any], shape: Shape, filled: bool) -> bool:
        """Whether a call that compiles nothing comes about.

        Args:
            arm: to call.
            shape: of the batch.
            filled: whether its texts need no padding. Those that are generated from always have some.
        """
        if filled and shape.task == GENERATE:
            return True
        tokenizer, device = self._served.tokenizer, self._served.model.device
        some = tokenizer.encode("Once upon a time") or [tokenizer.padding]
        size = shape.length if filled else max(1, shape.length // 2)
        text = (some * size)[:size]
        tokens, mask = pad([text] * shape.texts, shape.length, tokenizer.padding, left=shape.task == GENERATE)
        new_tokens = 0 if shape.task == EMBED else self._shapes.new_tokens
        for _ in range(_TRIES):
            ticks = compilation_watch.ticks()
            arm(shape.task, tokens.to(device), mask.to(device), new_tokens, True)
            if self.cancelled or compilation_watch.undisturbed(ticks):
                return True
        return False
