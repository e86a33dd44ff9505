"""A server of examples/serve.py in this process: with arms that can be held up, and what eager says of its texts."""

from __future__ import annotations

import concurrent.futures
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from serving.arms import model_arms
from serving.models import Served
from serving.server import Server
from serving.service import Service
from serving.settings import Settings

#: Few shapes, so that a server is ready soon: texts of 16, 32 and 64 tokens, prompts of 16, 32 and 56.
FEW_SHAPES = Settings(max_tokens=64, max_new_tokens=8)


def as_they_are(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Arms that compile nothing: what is tested is the server."""
    return {"inductor": function, "lnfold": function}


class Gate:
    """An arm that can be held up, given another clock and made to fail."""

    def __init__(self, arm: Callable[..., Tensor]) -> None:
        self._arm = arm
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()
        self.fails: Callable[[Tensor], bool] = lambda tokens: False
        self.batches: list[tuple[int, ...]] = []
        self.tick: Callable[[], None] = lambda: None

    def __call__(self, task: str, tokens: Tensor, *more: Any) -> Tensor:
        self.entered.set()
        assert self.open.wait(30)
        self.tick()
        self.batches.append(tuple(tokens.shape))
        if self.fails(tokens):
            raise RuntimeError("no such <kernel>")
        return self._arm(task, tokens, *more)


class Running:
    """A server in a thread of its own, at a free port of 127.0.0.1."""

    def __init__(self, served: Served, settings: Settings = FEW_SHAPES, **test: Any) -> None:
        self.gates = {name: Gate(arm) for name, arm in model_arms(served, as_they_are).items()}
        self.service = Service(served, self.gates, settings, **test)
        self.server = Server(self.service)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = self._socket.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self._thread = threading.Thread(target=self.server.run, args=([self._socket],))
        self._client = httpx.Client(base_url=self.url, timeout=30, verify=False)
        self.post, self.get = self._client.post, self._client.get
        self._pool = concurrent.futures.ThreadPoolExecutor(16)

    def start(self) -> Running:
        """Start, without waiting for the end of warm-up."""
        self._thread.start()
        self.wait_until(lambda: self.server.started)
        return self

    def __enter__(self) -> Running:
        self.start()
        self.wait_until(lambda: self.service.ready)
        self.forget()
        return self

    def __exit__(self, *_: object) -> None:
        for gate in self.gates.values():
            gate.open.set()
        self.stop()

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._pool.shutdown()
        self._client.close()

    def forget(self) -> None:
        """Let both arms answer as they do, and forget their batches: those of warm-up, or of another test."""
        for gate in self.gates.values():
            gate.fails, gate.tick = (lambda tokens: False), (lambda: None)
            gate.batches.clear()
        self.release()

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the batches that were answered, sorted."""
        return sorted(shape for gate in self.gates.values() for shape in gate.batches)

    def samples(self) -> dict[tuple[str, ...], float]:
        """Metrics by name and labels' values, labels in the order of the alphabet."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def hold(self) -> None:
        """Stop both arms at their next batch."""
        for gate in self.gates.values():
            gate.entered.clear()
            gate.open.clear()

    def begin(self, text: str) -> concurrent.futures.Future[httpx.Response]:
        """Ask for an embedding, and do not wait."""
        return self._pool.submit(self.post, "/embed", json={"texts": [text]})

    def busy(self) -> bool:
        """Whether a batch is in one of the arms."""
        return any(gate.entered.is_set() for gate in self.gates.values())

    def release(self) -> None:
        for gate in self.gates.values():
            gate.open.set()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(3000):
            if condition():
                return
            time.sleep(0.005)
        raise TimeoutError("it does not come about")


def embedding(served: Served, text: str) -> Tensor:
    """What eager says of one text alone."""
    with torch.no_grad():
        hidden = served.model.base_model(torch.tensor([served.tokenizer.encode(text)])).last_hidden_state
    return hidden[0].mean(0)


def continuation(served: Served, prompt: str, new_tokens: int) -> str:
    """What eager generates for one prompt alone, token by token, without a cache."""
    tokens = served.tokenizer.encode(prompt)
    new: list[int] = []
    with torch.no_grad():
        while len(new) < new_tokens:
            token = int(served.model(torch.tensor([tokens + new])).logits[0, -1].argmax())
            if token == served.tokenizer.end:
                break
            new.append(token)
    return served.tokenizer.decode(new)
