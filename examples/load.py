"""Sends requests of mixed lengths to examples/serve.py, then prints how long they took and what the test says.

python examples/load.py --requests 3000
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import math
import random
import sys
import time
from collections.abc import Sequence

import httpx
from rich.console import Console
from rich.progress import Progress

_WORDS = "the norm of a stream is what its readers see after the mean has been taken away".split()


def request(coin: random.Random, generate: float) -> tuple[str, dict[str, object]]:
    """An endpoint and a body: one to four texts to embed, or a prompt to continue."""

    def text() -> str:
        return " ".join(coin.choices(_WORDS, k=coin.choice([2, 5, 10, 20])))

    if coin.random() < generate:
        return "/generate", {"prompt": text(), "max_new_tokens": 8}
    return "/embed", {"texts": [text() for _ in range(coin.randint(1, 4))]}


async def wait_until_ready(client: httpx.AsyncClient, seconds: float) -> None:
    """Ask until the server has compiled its model.

    Raises:
        TimeoutError: if it takes longer than this.
    """
    async with asyncio.timeout(seconds):
        while True:
            with contextlib.suppress(httpx.TransportError):  # it does not listen yet
                if (await client.get("/health/ready")).status_code == 200:
                    return
            await asyncio.sleep(1)


async def send(
    client: httpx.AsyncClient, options: argparse.Namespace, progress: Progress
) -> tuple[collections.Counter[int], list[float]]:
    """Send all requests.

    Returns:
        Answers counted by status, and how long each of them took, in seconds.
    """
    coin, statuses, seconds = random.Random(0), collections.Counter[int](), list[float]()
    numbers = itertools.repeat(None, options.requests)
    task = progress.add_task("requests", total=options.requests)

    async def worker() -> None:
        for _ in numbers:
            path, body = request(coin, options.generate)
            began = time.perf_counter()
            statuses[(await client.post(path, json=body)).status_code] += 1
            seconds.append(time.perf_counter() - began)
            progress.advance(task)

    await asyncio.gather(*(worker() for _ in range(options.concurrency)))
    return statuses, seconds


def latencies(seconds: Sequence[float]) -> str:
    """Describe how long requests took.

    Example:
        >>> latencies([0.1] * 98 + [0.5, 1.5])
        'Half of them took at most 0.100 s, 99% at most 0.500 s, the slowest 1.500 s; 1 took over 1 s.'
    """
    ordered = sorted(seconds)
    half, most = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.99))
    slow = sum(second > 1 for second in seconds)
    return (
        f"Half of them took at most {half:.3f} s, 99% at most {most:.3f} s, the slowest {ordered[-1]:.3f} s; "
        f"{slow or 'none'} took over 1 s."
    )


async def run(options: argparse.Namespace) -> int:
    """Wait for the server, send, and print what the test says; 1 if the candidate should not be used."""
    console = Console()
    async with httpx.AsyncClient(base_url=options.url, timeout=120) as client:
        with console.status("the server compiles its model"):
            await wait_until_ready(client, options.wait)
        began = time.perf_counter()
        with Progress(console=console, transient=True) as progress:
            statuses, each = await send(client, options, progress)
        seconds = time.perf_counter() - began
        verdict = (await client.get("/ab.json")).json()["verdict"]
    answers = ", ".join(f"{count:,} × {status}" for status, count in sorted(statuses.items()))
    print(f"{options.requests:,} requests in {seconds:.0f} s: {answers}")
    print(latencies(each))
    print(verdict["words"])
    print(f"The report is at {options.url}/ab")
    return int(verdict["regression"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is")
    parser.add_argument("--requests", type=int, default=2000, help="how many")
    parser.add_argument("--concurrency", type=int, default=12, help="how many at a time")
    parser.add_argument("--generate", type=float, default=0.1, help="share of requests that continue a prompt")
    parser.add_argument("--wait", type=float, default=600, help="seconds to wait for the server")
    options = parser.parse_args(arguments)
    if options.requests < 1 or options.concurrency < 1:
        parser.error("--requests and --concurrency must be at least 1")
    try:
        return asyncio.run(run(options))
    except TimeoutError:
        print("load: the server is not ready; its log says why", file=sys.stderr)
    except httpx.TransportError as error:
        print(f"load: no answer: {type(error).__name__} {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
