"""``lncompile.ABTest``: two ways to answer a request, tested against each other on the requests that come anyway."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lncompile.abtest import timers
from lncompile.abtest.arms import Arm, compiled_arms, make_arms
from lncompile.abtest.assignment import Assignment, Key
from lncompile.abtest.buckets import OTHER, Bucket, BucketFunction, Buckets, rounded_shape_bucket
from lncompile.abtest.caller_state import (
    CallerState,
    CannotCompare,
    ModelState,
    RandomState,
    copied_inputs,
    kept,
    same_random_numbers,
)
from lncompile.abtest.comparison import TOLERANCES, Comparisons, compare
from lncompile.abtest.results import Outcome, Verdict, outcome_of
from lncompile.abtest.sketch import LatencySketch
from lncompile.abtest.statistics import Interval, SequentialTest, batch_size
from lncompile.lowering.torch_private import compilation_watch, tree_leaves

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from prometheus_client import CollectorRegistry

log = logging.getLogger("lncompile")

#: Measurements a GPU has not answered yet; older ones are given up.
_PENDING = 4096
#: Points of the speed-up's history; beyond, every other one is dropped.
_HISTORY = 256
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
#: What says that nobody waits for an answer any more. None of it is an arm's failure.
_CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError)


class ABTest:
    """A model served by two arms at once, stock Inductor and lnfold, until it is known which one is faster.

    Call it as the model. Each request is answered by one arm, chosen at random; how long it takes is compared with
    requests of like shapes that the other arm answers. :meth:`verdict` may be asked at any time, as often as wanted:
    the interval it gives is wrong at *any* look in at most ``alpha`` of all tests. What is measured is the time of the
    call itself (CUDA events on a GPU, a monotonic clock elsewhere), warm-up and calls during a compilation kept out.
    Memory is constant. Any number of threads and asyncio tasks may call.

    An arm that raises where the other does not is taken out of service; its request is answered by the other arm, with
    the same inputs (what it had already written into them stays written). Where both raise, the request is at fault and
    its caller gets the exception.

    Args:
        model: a module or function to compile, not compiled yet; or None with ``arms``.
        arms: two callables by name, the first the baseline, the second the candidate. Default: ``model`` compiled by
            stock Inductor (``"inductor"``) and by lnfold (``"lnfold"``), sharing weights.
        mode: for ``torch.compile``, both arms.
        options: for ``torch.compile``: Inductor's for both arms, those under ``lnfold.`` for lnfold.
        dynamic: for ``torch.compile``, both arms.
        fullgraph: for ``torch.compile``, both arms.
        ratio: the candidate's share of requests, 0.01 to 0.99.
        warmup: how many first calls of each arm and bucket are not counted.
        shadow: share of requests that both arms answer, to compare outputs. The caller gets the answer of the arm
            chosen, and waits for both. Inputs are copied for the second run, random numbers are the same in both.
        tolerances: largest relative error ``‖a - b‖ / ‖b‖`` of equal outputs by dtype, over the defaults
            (:data:`lncompile.abtest.comparison.TOLERANCES`); integers are equal unless named here (the share that may
            differ).
        bucket: names the kind of a request: :func:`~lncompile.abtest.rounded_shape_bucket` (default),
            :func:`~lncompile.abtest.shape_bucket` or a function of ``(args, kwargs)``.
        buckets: how many kinds of requests are told apart. What comes after is served, and not in the verdict.
        alpha: how often a test may be wrong.
        minimum_effect: the relative difference in latency below which it does not matter.
        seed: of all coins, and of the hash of ``ab_key``: replicas with one seed send a key to the same arm.
        device: where the work happens; default: where the model's parameters or the first tensor of a request are.
        workers: threads for :meth:`acall`. With one, requests wait for each other and do not disturb each other's time.
        name: of the test, in metrics and plots.

    Attributes:
        model: the model, or None.

    Raises:
        ValueError: for arguments that make no test; the message says which.
        OptionError: for an option neither compiler knows.

    Example:
        >>> ab = lncompile.ABTest(model.eval(), shadow=0.01)
        >>> with torch.no_grad():
        ...     outputs = ab(inputs)
        >>> print(ab.verdict())
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        arms: Mapping[str, Callable[..., Any]] | None = None,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
        ratio: float = 0.5,
        warmup: int = 3,
        shadow: float = 0.0,
        tolerances: Mapping[torch.dtype, float] | None = None,
        bucket: BucketFunction = rounded_shape_bucket,
        buckets: int = 64,
        alpha: float = 0.05,
        minimum_effect: float = 0.02,
        seed: int = 0,
        device: torch.device | str | None = None,
        workers: int = 1,
        name: str = "ab",
    ) -> None:
        if arms is None:
            if model is None:
                raise ValueError(
                    "pass a model to compile, or two callables as arms={'baseline': ..., 'candidate': ...}"
                )
            arms = compiled_arms(model, mode, options, {"dynamic": dynamic, "fullgraph": fullgraph})
        elif mode is not None or options is not None or dynamic is not None or fullgraph:
            raise ValueError(
                "mode, options, dynamic and fullgraph are for arms that are compiled here: give one or other"
            )
        _check(ratio=(ratio, 0.01, 0.99), shadow=(shadow, 0.0, 1.0), alpha=(alpha, 1e-9, 0.5))
        _check(minimum_effect=(minimum_effect, 0.0, 10.0), warmup=(warmup, 0, 10**6), buckets=(buckets, 1, 4096))
        self.model = model
        self.name = name
        self._arms = make_arms(arms)
        self._ratio, self._warmup, self._shadow = ratio, warmup, shadow
        self._alpha, self._minimum_effect = alpha, minimum_effect
        self._tolerances = {**TOLERANCES, **(tolerances or {})}
        self._bucket_function = bucket
        self._device = None if device is None else torch.device(device)
        self._assignment = Assignment(ratio, seed)
        self._batch_size = batch_size(ratio)
        self._buckets = Buckets(buckets, self._batch_size)
        self._test = SequentialTest()
        self._comparisons = Comparisons()
        self._settled: Arm | None = None
        self._assigned = self._assigned_by_key = self._during_compilation = 0
        self._pending: deque[tuple[timers.Stopwatch, Bucket, int]] = deque(maxlen=_PENDING)
        self._history: list[tuple[int, Interval]] = []
        self._history_step = 1
        self._bucket_failed = False
        # Held for bookkeeping only, never while an arm runs.
        self._lock = threading.Lock()
        self._workers = workers
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None

    # --- answering ---

    def __call__(self, *args: Any, ab_key: Key | None = None, **kwargs: Any) -> Any:
        """Answer a request.

        Args:
            args: for the model.
            ab_key: requests with the same key (a user, a session) go to the same arm. Use many keys: the interval takes
                requests to be independent of each other.
            kwargs: for the model.

        Returns:
            What the arm returns.

        Raises:
            TypeError: for a key that is no ``str``, ``int`` or ``bytes``.
            Exception: what the arm raised, if the other one raised as well or is out of service.
        """
        name = self._bucket_of(args, kwargs)
        with self._lock:
            self._collect()
            bucket = self._buckets.find(name)
            arm, assigned = self._choose(ab_key)
            in_shadow = assigned and self._assignment.sampled(self._shadow)
        if in_shadow:
            return self._answer_and_compare(arm, bucket, args, kwargs)
        return self._answer(arm, bucket if assigned else None, args, kwargs)[0]

    async def acall(self, *args: Any, ab_key: Key | None = None, **kwargs: Any) -> Any:
        """Answer a request without blocking the event loop: as a call, made by one of the test's ``workers``.

        The caller's gradient mode, inference mode, autocast and CUDA stream hold there. A task that is cancelled stops
        waiting; the arm is not at fault.
        """
        with self._lock:
            if self._executor is None:
                self._executor = concurrent.futures.ThreadPoolExecutor(self._workers, f"lncompile-{self.name}")
        state = CallerState()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: state.run(lambda: self(*args, ab_key=ab_key, **kwargs))
        )

    def close(self) -> None:
        """End the threads of :meth:`acall`, after the requests they have begun. Another ``acall`` starts new ones."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()

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
        chosen = self._arms[self._assignment.is_candidate(key)]
        if self._settled is not None and self._settled.in_service:
            return self._settled, False
        if not all(arm.in_service for arm in self._arms):
            return next(arm for arm in self._arms if arm.in_service), False
        self._assigned += 1
        self._assigned_by_key += key is not None
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
        with self._lock:
            arm.requests += 1
            if bucket is not None:
                if not undisturbed:
                    self._during_compilation += 1
                elif bucket.warm[arm.index] < self._warmup:
                    bucket.warm[arm.index] += 1
                else:
                    self._pending.append((stopwatch, bucket, arm.index))
                    self._collect()
        return result, arm

    def _answer_instead(
        self, arm: Arm, error: Exception, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Arm]:
        """Answer by the other arm what this arm raised at; if it raises too, the request is at fault."""
        other = self._arms[1 - arm.index]
        if not other.in_service:
            raise error
        try:
            result = other.function(*args, **kwargs)
        except _CANCELLED:
            raise
        except Exception as second:
            error.add_note(f"The other arm, {other.name}, raised too: {type(second).__name__}: {second}")
            raise error from second
        with self._lock:
            other.requests += 1
            self._failed(arm, error)
        return result, other

    def _answer_and_compare(self, arm: Arm, bucket: Bucket, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            copies = copied_inputs(args, kwargs)
        except CannotCompare as reason:
            with self._lock:
                self._comparisons.skip(str(reason))
            return self._answer(arm, bucket, args, kwargs)[0]
        random, state = RandomState(), ModelState.of(self.model)
        result, by = self._answer(arm, bucket, args, kwargs)
        other = self._arms[1 - arm.index]
        if by is not arm or not other.in_service:
            return result
        if ModelState.of(self.model) != state:
            with self._lock:
                self._comparisons.skip("the model writes to its own buffers, so it must not run twice")
            return result
        result = kept(result)
        try:
            with same_random_numbers(random):
                second = other.function(*copies[0], **copies[1])
        except _CANCELLED:
            raise
        except Exception as error:
            with self._lock:
                self._failed(other, error)
            return result
        try:
            pair = (result, second) if other.index == 0 else (second, result)
            errors, differences = compare(*pair, self._tolerances)
        except Exception as error:
            # Outputs that cannot be compared are no reason to lose an answer.
            with self._lock:
                self._comparisons.skip(f"the outputs cannot be compared: {type(error).__name__}: {error}")
            return result
        with self._lock:
            if differences and self._comparisons.differing == 0:
                log.warning("%s and %s answer differently: %s", *(arm.name for arm in self._arms), differences[0])
            self._comparisons.add(errors, differences, bucket.name)
        return result

    def _device_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
        if self._device is not None:
            return self._device
        if timers.cuda_in_use():
            parameters = self.model.parameters() if isinstance(self.model, torch.nn.Module) else ()
            for value in itertools.chain(parameters, tree_leaves((args, dict(kwargs)))):
                if isinstance(value, Tensor):
                    return value.device
        return torch.device("cpu")

    # --- under the lock ---

    def _failed(self, arm: Arm, error: Exception) -> None:
        arm.failures += 1
        if not arm.in_service or not self._arms[1 - arm.index].in_service:
            return
        arm.out_of_service = f"it raised {type(error).__name__}: {str(error)[:500]}"
        arm.failed = True
        log.warning(
            "arm '%s' is taken out of service, '%s' answers from here on: %s: %s",
            arm.name,
            self._arms[1 - arm.index].name,
            type(error).__name__,
            error,
            exc_info=error,
        )

    def _collect(self) -> None:
        """Count the measurements that are there by now."""
        while self._pending:
            stopwatch, bucket, arm = self._pending[0]
            seconds = stopwatch.seconds()
            if seconds is None:
                return
            self._pending.popleft()
            bucket.latencies[arm].add(seconds)
            if bucket is self._buckets.other:
                continue
            batch = bucket.add(arm, seconds)
            if batch is not None:
                self._test.add(*batch)
                if self._test.batches % self._history_step == 0:
                    self._history.append((self._test.batches * self._batch_size, self._test.interval(self._alpha)))
                if len(self._history) == _HISTORY:
                    self._history = self._history[1::2]
                    self._history_step *= 2

    # --- asking ---

    def verdict(self) -> Verdict:
        """What is known now. Asking changes nothing, and asking often makes no false positives."""
        with self._lock:
            self._collect()
            speedup = self._test.interval(self._alpha)
            measured = sum(sketch.count for bucket in self._buckets.everything() for sketch in bucket.latencies)
            requests = self._test.batches * self._batch_size
            baseline, candidate = self._arms
            return Verdict(
                outcome=outcome_of(speedup, self._minimum_effect),
                baseline=baseline.name,
                candidate=candidate.name,
                speedup=speedup,
                requests=requests,
                elsewhere=measured - requests,
                buckets=sum(bucket.test.batches > 0 for bucket in self._buckets),
                alpha=self._alpha,
                p_value=self._test.p_value,
                minimum_effect=self._minimum_effect,
                outputs_agree=self._comparisons.equal,
                comparisons=self._comparisons.compared,
                out_of_service={a.name: a.out_of_service for a in self._arms if a.out_of_service is not None},
                failed=tuple(arm.name for arm in self._arms if arm.failed),
                remarks=tuple(self._remarks(measured)),
            )

    def _remarks(self, measured: int) -> list[str]:
        remarks = [f"First difference: {example}." for example in self._comparisons.examples[:1]]
        if self._comparisons.skipped:
            remarks.append(
                f"{self._comparisons.skipped:,} requests could not be compared: {self._comparisons.why_skipped}."
            )
        if self._settled is not None:
            remarks.append(f"All requests go to {self._settled.name}.")
        other = sum(sketch.count for sketch in self._buckets.other.latencies)
        if other:
            remarks.append(f"{other:,} requests of {measured:,} have shapes beyond the first and are not in it.")
        if self._assigned_by_key:
            remarks.append(
                f"{100 * self._assigned_by_key / self._assigned:.0f}% of requests were assigned by key: with few keys "
                "the interval is too narrow, because requests of one key are alike."
            )
        # At a level that holds for all buckets together.
        tested = [bucket for bucket in self._buckets if bucket.test.batches]
        for bucket in tested:
            speedup = bucket.test.interval(self._alpha / len(tested))
            overall = self._test.interval(self._alpha)
            against = {outcome_of(speedup, 0.0), outcome_of(overall, 0.0)} == {Outcome.FASTER, Outcome.SLOWER}
            if against:
                remarks.append(f"Not so for inputs {bucket.name}: {speedup}.")
        return remarks

    def to_dict(self) -> dict[str, Any]:
        """Return verdict, arms, buckets, comparisons and history as plain values, ready for JSON."""
        verdict = self.verdict().to_dict()
        with self._lock:
            return {
                "name": self.name,
                "verdict": verdict,
                "arms": [{**arm.to_dict(), "seconds": _quantiles(self._latencies(arm))} for arm in self._arms],
                "ratio": self._ratio,
                "warmup": self._warmup,
                "settled": self._settled.name if self._settled else None,
                "assigned": self._assigned,
                "assigned_by_key": self._assigned_by_key,
                "during_compilation": self._during_compilation,
                "waiting_for_device": len(self._pending),
                "test": self._test.to_dict(self._alpha),
                "buckets": [
                    {
                        "name": bucket.name,
                        "in_verdict": bucket is not self._buckets.other,
                        **bucket.test.to_dict(self._alpha),
                        "warmup": dict(zip(self._names(), bucket.warm, strict=True)),
                        "seconds": {
                            name: _quantiles(sketch)
                            for name, sketch in zip(self._names(), bucket.latencies, strict=True)
                        },
                    }
                    for bucket in self._buckets.everything()
                ],
                "comparisons": self._comparisons.to_dict(),
                "history": [{"requests": requests, **speedup.to_dict()} for requests, speedup in self._history],
            }

    def to_json(self, indent: int | None = 2) -> str:
        """Return :meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def latencies(self) -> dict[str, LatencySketch]:
        """The latencies of each arm's requests that were assigned at random and after warm-up, by the arm's name."""
        with self._lock:
            self._collect()
            return {arm.name: self._latencies(arm) for arm in self._arms}

    @property
    def arms(self) -> dict[str, Callable[..., Any]]:
        """The callables of both arms, by name, the baseline first."""
        return {arm.name: arm.function for arm in self._arms}

    @property
    def metrics(self) -> CollectorRegistry:
        """A registry of prometheus_client with this test's metrics, for ``generate_latest`` or ``make_asgi_app``.

        Raises:
            ImportError: without prometheus_client (``pip install 'lncompile[metrics]'``).
        """
        from lncompile.abtest.metrics import registry_of

        return registry_of(self)

    def plot(self, path: Any = None, **savefig: Any) -> Figure:
        """Draw latencies, speed-ups by input shape, and the speed-up as requests came in.

        Args:
            path: a file name or binary file to write to, or None.
            savefig: for matplotlib's ``savefig``: ``format="svg"``, ``dpi=200``.

        Returns:
            The figure.

        Raises:
            ImportError: without matplotlib (``pip install 'lncompile[plot]'``).
        """
        from lncompile.abtest.plot import draw

        figure = draw(self.to_dict(), self.latencies())
        if path is not None:
            figure.savefig(path, **savefig)
        return figure

    def _names(self) -> tuple[str, str]:
        return self._arms[0].name, self._arms[1].name

    def _latencies(self, arm: Arm) -> LatencySketch:
        return LatencySketch.merged(bucket.latencies[arm.index] for bucket in self._buckets.everything())

    # --- steering ---

    def settle(self, arm: str | None = None) -> str:
        """Send all requests to one arm from now on; the other one answers only if it raises.

        Args:
            arm: its name; by default the winner (:attr:`Verdict.winner`).

        Returns:
            Its name.

        Raises:
            ValueError: for a name that is no arm's, an arm out of service, or a test without a winner.
        """
        if arm is None:
            verdict = self.verdict()
            if verdict.winner is None:
                raise ValueError(
                    f"there is no winner, name the arm: {' or '.join(map(repr, self._names()))}. {verdict}"
                )
            arm = verdict.winner
        chosen = self._named(arm)
        with self._lock:
            if not chosen.in_service:
                raise ValueError(f"arm '{arm}' is out of service ({chosen.out_of_service}): restore it first")
            self._settled = chosen
        return arm

    def resume(self) -> None:
        """Assign requests to both arms again after :meth:`settle`."""
        with self._lock:
            self._settled = None

    def take_out(self, arm: str, reason: str = "taken out by hand") -> None:
        """Take an arm out of service; requests in it are finished.

        Raises:
            ValueError: for a name that is no arm's, or the last arm in service.
        """
        chosen = self._named(arm)
        with self._lock:
            if not self._arms[1 - chosen.index].in_service:
                raise ValueError(f"arm '{arm}' is the last one in service")
            chosen.out_of_service = reason

    def restore(self, arm: str) -> None:
        """Put an arm back into service, its failure forgiven.

        Raises:
            ValueError: for a name that is no arm's.
        """
        chosen = self._named(arm)
        with self._lock:
            chosen.out_of_service, chosen.failed = None, False

    def _named(self, name: str) -> Arm:
        for arm in self._arms:
            if arm.name == name:
                return arm
        raise ValueError(f"no arm is called {name!r}; there are {' and '.join(map(repr, self._names()))}")


def _check(**ranges: tuple[float, float, float]) -> None:
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"{name} is between {low:g} and {high:g}, not {value!r}")


def _quantiles(sketch: LatencySketch) -> dict[str, float | int | None]:
    mean = sketch.total / sketch.count if sketch.count else None
    values = sketch.quantiles(list(_QUANTILES.values()))
    return {"requests": sketch.count, "mean": mean, **dict(zip(_QUANTILES, values, strict=True))}
