"""Serves a transformers model. Stock Inductor answers half of the batches, lnfold the others, and they are compared.

    python examples/serve.py                                    # a small random GPT-2 over bytes, no network
    python examples/serve.py --model my/folder --shadow 0.05    # yours; both answer one batch in twenty

POST /embed and /generate; GET / for a page of links: the test (/ab, /ab.json), /metrics, /health, and /docs for the
endpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence

from lncompile.models.factories import ModelError
from serving.arms import model_arms
from serving.models import BYTES_GPT2, load
from serving.server import Server
from serving.service import Service
from serving.settings import Settings


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    default = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, value: object, text: str) -> None:
        parser.add_argument(name, type=type(value), default=value, help=f"{text} (default: {value})")

    add("--model", BYTES_GPT2, "a hub id, or a folder as save_pretrained writes it")
    add("--host", "127.0.0.1", "address to listen at")
    add("--port", 8000, "port to listen at; 0 takes any free port")
    add("--device", "cpu", "where the model runs")
    add("--ratio", 0.5, "lnfold's share of batches")
    add("--shadow", 0.0, "share of batches that both answer, to compare outputs")
    add("--seed", 0, "of the random choices; servers with the same seed send an X-User to the same arm")
    add("--max-batch", default.max_batch, "texts in one call of the model")
    add("--max-wait-ms", 1e3 * default.max_wait, "how long a batch waits for more texts, in milliseconds")
    add("--max-queue", default.max_queue, "texts that may wait; more are answered by 503")
    add("--max-texts", default.max_texts, "texts in one request")
    add("--max-tokens", default.max_tokens, "tokens of a text, or of a prompt with its continuation")
    add("--max-new-tokens", default.max_new_tokens, "tokens generated for a prompt")
    add("--body-seconds", default.body_seconds, "how long a request's body may take to arrive; a slower one gets 408")
    add("--drain-seconds", default.drain_seconds, "after SIGTERM, not ready for so long before connections are refused")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace) -> Service:
    """Load the model and put the service around it. Nothing of it is compiled yet.

    Raises:
        ModelError: for a model that cannot be served.
        ValueError: for settings that do not go together.
    """
    served = load(options.model)
    try:
        served.model.to(options.device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        raise ValueError(f"device '{options.device}' cannot be used: {error}") from error
    settings = Settings(
        max_batch=options.max_batch,
        max_wait=options.max_wait_ms / 1e3,
        max_queue=options.max_queue,
        max_texts=options.max_texts,
        max_tokens=options.max_tokens,
        max_new_tokens=options.max_new_tokens,
        body_seconds=options.body_seconds,
        drain_seconds=options.drain_seconds,
    )
    test = {"ratio": options.ratio, "shadow": options.shadow, "seed": options.seed}
    return Service(served, model_arms(served), settings, **test)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; requests in progress are finished."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("lncompile").setLevel(logging.WARNING)  # its report of every fold, at every compilation
    logging.getLogger("lncompile.serve").setLevel(logging.INFO)
    try:
        service = build(options)
    except (ModelError, ValueError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    logging.getLogger("lncompile.serve").info("serving %s; GET /ab shows the test", service.served.description)
    with contextlib.suppress(KeyboardInterrupt):  # raised by uvicorn after it has shut down
        Server(service, options.host, options.port).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
