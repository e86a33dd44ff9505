"""Answering requests by one of two arms: which of them, what is measured and compared, and what if one raises."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lncompile.abtest import timers
from lncompile.abtest.arms import Arm
from lncompile.abtest.assignment import Assignment, Key
from lncompile.abtest.buckets import OTHER, Bucket, BucketFunction
from lncompile.abtest.caller_state import (
    CannotCompare,
    ModelState,
    RandomState,
    copied_inputs,
    kept,
    same_random_numbers,
)
from lncompile.abtest.comparison import Comparisons, compare
from lncompile.abtest.measurements import Measurements
from lncompile.lowering.torch_private import tree_leaves
from lncompile.lowering.torch_private_dynamo import compilation_watch

log = logging.getLogger("lncompile")

#: What says that an answer is not waited for any more. None of it is an arm's failure.
_CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError)


class Requests:
    """Answers the requests of a test, and notes what became of them.

    Args:
        arms: the baseline and the candidate.
        model: what they run, or None.
        assignment: of requests to arms.
        measurements: of their latencies.
        bucket: names the kind of a request.
        shadow: share of requests that both arms answer.
        tolerances: of outputs that count as equal, by dtype.
        max_failures: how often an arm may raise where the other one does not.
        device: where the work happens; None: where the model's parameters or the first tensor of a request are.

    Attributes:
        lock: held for bookkeeping only, never while an arm runs.
        settled: the arm that all requests go to, or None.
        assigned: how many requests were assigned to an arm rather than going to the only one possible.
        assigned_by_key: how many of them by a key.
    """

    def __init__(
        self,
        arms: tuple[Arm, Arm],
        model: Callable[..., Any] | None,
        assignment: Assignment,
        measurements: Measurements,
        *,
        bucket: BucketFunction,
        shadow: float,
        tolerances: Mapping[torch.dtype, float],
        max_failures: int,
        device: torch.device | None,
    ) -> None:
        self.arms, self.assignment, self.measurements = arms, assignment, measurements
        self.comparisons = Comparisons()
        self.lock = threading.Lock()
        self.settled: Arm | None = None
        self.assigned = self.assigned_by_key = 0
        self._model, self._device = model, device
        self._shadow, self._tolerances, self._max_failures = shadow, tolerances, max_failures
        self._bucket_function, self._bucket_failed = bucket, False

    def answer(self, key: Key | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Answer a request by the arm that it is assigned to; a share of requests by both, to compare them."""
        name = self._bucket_of(args, kwargs)
        with self.lock:
            self.measurements.collect()
            bucket = self.measurements.bucket(name)
            arm, assigned = self._choose(key)
            in_shadow = assigned and self.assignment.sampled(self._shadow)
        if in_shadow:
            return self._answer_and_compare(arm, bucket, args, kwargs)
        return self._answer(arm, bucket if assigned else None, args, kwargs)[0]

    def _bucket_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        try:
            return str(self._bucket_function(args, kwargs))
        except Exception as error:
            # No reason to lose a request.
            if not self._bucket_failed:
                log.warning(
                    "a request has no bucket and is not counted (said once): %s: %s", type(error).__name__, error
                )
            self._bucket_failed = True
            return OTHER

    def _choose(self, key: Key | None) -> tuple[Arm, bool]:
        """The arm for a request, and whether it was assigned rather than the only one possible."""
        chosen = self.arms[self.assignment.is_candidate(key)]
        if self.settled is not None and self.settled.in_service:
            return self.settled, False
        if not all(arm.in_service for arm in self.arms):
            return next(arm for arm in self.arms if arm.in_service), False
        self.assigned += 1
        self.assigned_by_key += key is not None
        return chosen, True

    def _answer(
        self, arm: Arm, bucket: Bucket | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Arm]:
        """The answer, and the arm that gave it. Without a bucket it is not counted."""
        ticks = compilation_watch.ticks()
        stopwatch = timers.start(self._device_of(args, kwargs))
        try:
            result = arm.function(*args, **kwargs)
        except _CANCELLED:
            raise
        except Exception as error:
            return self._answer_instead(arm, error, args, kwargs)
        stopwatch.stop()
        undisturbed = compilation_watch.undisturbed(ticks)
        with self.lock:
            arm.requests += 1
            if bucket is not None:
                self.measurements.add(stopwatch, bucket, arm.index, undisturbed)
        return result, arm

    def _answer_instead(
        self, arm: Arm, error: Exception, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Arm]:
        """Answer by the other arm what this arm raised at; if it raises too, the request is at fault."""
        other = self.arms[1 - arm.index]
        if not other.in_service:
            raise error
        try:
            result = other.function(*args, **kwargs)
        except _CANCELLED:
            raise
        except Exception as second:
            error.add_note(f"The other arm, {other.name}, raised too: {type(second).__name__}: {second}")
            raise error from None
        with self.lock:
            other.requests += 1
            self._failed(arm, error)
        return result, other

    def _answer_and_compare(self, arm: Arm, bucket: Bucket, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            copies = copied_inputs(args, kwargs)
        except CannotCompare as reason:
            with self.lock:
                self.comparisons.skip(str(reason))
            return self._answer(arm, bucket, args, kwargs)[0]
        random, state = RandomState(), ModelState.of(self._model)
        result, by = self._answer(arm, bucket, args, kwargs)
        other = self.arms[1 - arm.index]
        if by is not arm or not other.in_service:
            return result
        if ModelState.of(self._model) != state:
            with self.lock:
                self.comparisons.skip("the model writes to its own buffers, so it must not run twice")
            return result
        result = kept(result)
        try:
            with same_random_numbers(random):
                second = other.function(*copies[0], **copies[1])
        except _CANCELLED:
            raise
        except Exception as error:
            with self.lock:
                self._failed(other, error)
            return result
        try:
            pair = (result, second) if other.index == 0 else (second, result)
            errors, differences = compare(*pair, self._tolerances)
        except Exception as error:
            # Outputs that cannot be compared are not a reason to lose an answer.
            with self.lock:
                self.comparisons.skip(f"the outputs cannot be compared: {type(error).__name__}: {error}")
            return result
        with self.lock:
            if differences and self.comparisons.differing == 0:
                log.warning("%s and %s answer differently: %s", *(arm.name for arm in self.arms), differences[0])
            self.comparisons.add(errors, differences, bucket.name)
        return result

    def _device_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
        if self._device is not None:
            return self._device
        if timers.cuda_in_use():
            parameters = self._model.parameters() if isinstance(self._model, torch.nn.Module) else ()
            for value in itertools.chain(parameters, tree_leaves((args, dict(kwargs)))):
                if isinstance(value, Tensor):
                    return value.device
        return torch.device("cpu")

    def _failed(self, arm: Arm, error: Exception) -> None:
        """Under the lock: count a failure where the other arm does not raise, and take an arm out of service."""
        arm.failures += 1
        if not arm.in_service or not self.arms[1 - arm.index].in_service:
            return
        if arm.failures - arm.forgiven < self._max_failures:
            log.warning("arm '%s' failed: %s: %s", arm.name, type(error).__name__, error, exc_info=error)
            return
        arm.out_of_service = f"it raised {type(error).__name__}: {str(error)[:500]}"
        arm.failed = True
        log.warning(
            "arm '%s' is taken out of service, '%s' answers from here on: %s: %s",
            arm.name,
            self.arms[1 - arm.index].name,
            type(error).__name__,
            error,
            exc_info=error,
        )
