"""``lncompile.ABTest``: two ways to answer a request, tested against each other on the requests that come anyway."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lncompile.abtest.arms import Arm, compiled_arms, make_arms
from lncompile.abtest.assignment import Assignment, Key
from lncompile.abtest.buckets import BucketFunction, rounded_shape_bucket
from lncompile.abtest.caller_state import (
    CallerState,
)
from lncompile.abtest.comparison import TOLERANCES
from lncompile.abtest.conclusion import conclude
from lncompile.abtest.measurements import Measurements, summary
from lncompile.abtest.requests import Requests
from lncompile.abtest.results import Conclusion
from lncompile.abtest.sketch import LatencySketch

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from prometheus_client import CollectorRegistry


class ABTest:
    """A model served by two arms at once, stock Inductor and lnfold, until it is known which one is faster.

    Call it as the model. Each request is answered by one arm, chosen at random; how long it takes is compared with
    requests of like shapes that the other arm answers. :meth:`verdict` may be asked at any time, as often as wanted:
    the interval it gives is wrong at *any* look in at most ``alpha`` of all tests. What is measured is the time of the
    call itself (CUDA events on a GPU, a monotonic clock elsewhere), warm-up and calls during a compilation kept out.
    The verdict is on usual latencies; what happens in the tails is in the quantiles of :meth:`to_dict` and
    :meth:`plot`. Memory is constant. Any number of threads and asyncio tasks may call.

    An arm that raises where the other does not is taken out of service; its request is answered by the other arm, with
    the same inputs (what it had already written into them stays written). Where both raise, the request is at fault and
    its caller gets the exception. An arm that returns a generator is timed, and watched, until it returns it.

    Args:
        model: a module or function to compile, not compiled yet. With ``arms`` it is what they run, or None: shadow
            mode sees by its buffers that it must not run twice, and its parameters tell the device.
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
        minimum_effect: the relative difference in latency that matters. A smaller one never makes a winner, nor does
            one of less than 3 µs a call: by so much equal programs differ in one process.
        seed: of all coins, and of the hash of ``ab_key``: replicas with one name and seed send a key to the same arm.
        device: where the work happens; default: where the model's parameters or the first tensor of a request are.
        max_failures: how often an arm may raise where the other one does not before it is taken out of service.
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

        One function in both arms shows what the set-up itself can tell apart: nothing, it is to be hoped.

        >>> check = lncompile.ABTest(arms={"a": compiled, "b": compiled})
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
        max_failures: int = 1,
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
        _check(max_failures=(max_failures, 1, 10**6), workers=(workers, 1, 1024))
        self.model = model
        self.name = name
        self._alpha, self._minimum_effect = alpha, minimum_effect
        self._arms = make_arms(arms)
        self._requests = Requests(
            self._arms,
            model,
            Assignment(ratio, f"{name}:{seed}"),
            Measurements(self._names(), ratio, warmup, buckets, alpha),
            bucket=bucket,
            shadow=shadow,
            tolerances={**TOLERANCES, **(tolerances or {})},
            max_failures=max_failures,
            device=None if device is None else torch.device(device),
        )
        self._lock = self._requests.lock
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
        return self._requests.answer(ab_key, args, kwargs)

    async def acall(self, *args: Any, ab_key: Key | None = None, **kwargs: Any) -> Any:
        """Answer a request without blocking the event loop: as a call, made by one of the test's ``workers``.

        The caller's context variables, gradient mode, inference mode, autocast and CUDA stream hold there. A task that
        is cancelled stops waiting; the arm is not at fault.
        """
        with self._lock:
            if self._executor is None:
                self._executor = concurrent.futures.ThreadPoolExecutor(self._workers, f"lncompile-{self.name}")
        state, context = CallerState(), contextvars.copy_context()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: context.run(state.run, lambda: self(*args, ab_key=ab_key, **kwargs))
        )

    def close(self) -> None:
        """End the threads of :meth:`acall`, after the requests they have begun. Another ``acall`` starts new ones."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()

    def assigned_to(self, key: Key) -> str:
        """The arm that requests with this ``ab_key`` are assigned to: for who batches requests, one arm's together.

        Raises:
            TypeError: for a key that is no ``str``, ``int`` or ``bytes``.
        """
        return self._arms[self._requests.assignment.is_candidate(key)].name

    # --- asking ---

    def verdict(self) -> Conclusion:
        """What is known now. Asking changes nothing, and asking often makes no false positives."""
        with self._lock:
            self._requests.measurements.collect()
            return conclude(self._requests, self._alpha, self._minimum_effect)

    def to_dict(self) -> dict[str, Any]:
        """Return verdict, arms, buckets, comparisons and history as plain values, ready for JSON."""
        with self._lock:
            self._requests.measurements.collect()
            return {
                "name": self.name,
                "verdict": conclude(self._requests, self._alpha, self._minimum_effect).to_dict(),
                "arms": [
                    {**arm.to_dict(), "seconds": summary(self._requests.measurements.latencies(arm.index))}
                    for arm in self._arms
                ],
                "ratio": self._requests.assignment.ratio,
                "settled": self._requests.settled.name if self._requests.settled else None,
                "assigned": self._requests.assigned,
                "assigned_by_key": self._requests.assigned_by_key,
                "comparisons": self._requests.comparisons.to_dict(),
                **self._requests.measurements.to_dict(),
            }

    def to_json(self, indent: int | None = 2) -> str:
        """Return :meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def latencies(self) -> dict[str, LatencySketch]:
        """The latencies of each arm's requests that were assigned at random and after warm-up, by the arm's name."""
        with self._lock:
            self._requests.measurements.collect()
            return {arm.name: self._requests.measurements.latencies(arm.index) for arm in self._arms}

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

    # --- steering ---

    def settle(self, arm: str | None = None) -> str:
        """Send all requests to one arm from now on; the other one answers only if it raises.

        Args:
            arm: its name; by default the winner (:attr:`Conclusion.winner`).

        Returns:
            Its name.

        Raises:
            ValueError: for a name that is not an arm's, an arm out of service, or a test without a winner.
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
            self._requests.settled = chosen
        return arm

    def resume(self) -> None:
        """Assign requests to both arms again after :meth:`settle`."""
        with self._lock:
            self._requests.settled = None

    def take_out(self, arm: str, reason: str = "taken out by hand") -> None:
        """Take an arm out of service; requests in it are finished.

        Raises:
            ValueError: for a name that is not an arm's, or the last arm in service.
        """
        chosen = self._named(arm)
        with self._lock:
            if not self._arms[1 - chosen.index].in_service:
                raise ValueError(f"arm '{arm}' is the last one in service")
            chosen.out_of_service = reason

    def restore(self, arm: str) -> None:
        """Put an arm back into service, its failure forgiven.

        Raises:
            ValueError: for a name that is not an arm's.
        """
        chosen = self._named(arm)
        with self._lock:
            chosen.out_of_service, chosen.failed, chosen.forgiven = None, False, chosen.failures

    def _named(self, name: str) -> Arm:
        for arm in self._arms:
            if arm.name == name:
                return arm
        raise ValueError(f"no arm is called {name!r}; there are {' and '.join(map(repr, self._names()))}")


def _check(**ranges: tuple[float, float, float]) -> None:
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise ValueError(f"{name} is between {low:g} and {high:g}, not {value!r}")
