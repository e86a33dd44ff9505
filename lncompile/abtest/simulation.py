"""Requests made up on this machine, for trying a test out before it is put in front of users."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lncompile.abtest.experiment import ABTest
from lncompile.abtest.results import Outcome
from lncompile.progress import Say

#: Positional and keyword arguments of a call.
Request = tuple[Sequence[Any], Mapping[str, Any]]
#: How often the verdict is looked at, in requests; the test allows it as often as one likes.
LOOK = 16
#: Compilation and warm-up are given up after this many requests of each kind: the test counts what it can.
WARMUP_REQUESTS = 100


def send_requests(
    test: ABTest,
    requests: Sequence[Request],
    *,
    seconds: float = 60.0,
    seed: int = 0,
    progress: Say | None = None,
) -> None:
    """Send requests, one after the other, until the test is decided or the time is up.

    Args:
        test: gets them.
        requests: kinds of requests, drawn from at random, all as often.
        seconds: how long to go on at most, compilation and warm-up not counted.
        seed: of the draws.
        progress: called now and then.

    Example:
        >>> send_requests(ab, [((short,), {}), ((long,), {})], seconds=30.0)
        >>> print(ab.verdict())
    """
    say = progress or (lambda words, share=None: None)
    draw = random.Random(seed)
    say("compiling and warming up")
    for _ in range(WARMUP_REQUESTS):
        if _is_warm(test):
            break
        for args, kwargs in requests:
            test(*args, **kwargs)
    started = time.perf_counter()
    sent = 0
    while (elapsed := time.perf_counter() - started) < seconds:
        if sent % LOOK == 0:
            verdict = test.verdict()
            if verdict.outcome is not Outcome.UNDECIDED or verdict.out_of_service:
                return
            say("sending requests", elapsed / seconds)
        args, kwargs = draw.choice(requests)
        test(*args, **kwargs)
        sent += 1


def _is_warm(test: ABTest) -> bool:
    """Whether measuring has begun for every kind of request seen, or will not because an arm failed."""
    state = test.to_dict()
    if not all(arm["in_service"] for arm in state["arms"]):
        return True
    kinds = [bucket for bucket in state["buckets"] if bucket["in_verdict"]]
    return bool(kinds) and all(arm["requests"] > 0 for kind in kinds for arm in kind["seconds"].values())
