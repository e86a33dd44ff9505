"""Bodies that examples/serve.py cuts off: too slow, or too large."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("transformers")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from served_example import FEW_SHAPES, Running

from serving.models import small_gpt2

SECONDS = 0.5


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    settings = dataclasses.replace(FEW_SHAPES, body_seconds=SECONDS, max_body=1000)
    with Running(small_gpt2(layers=1, width=16, positions=64), settings) as running:
        yield running


def drip(running: Running, headers: str, pieces: list[bytes], pause: float) -> tuple[bytes, float]:
    """Send a body piece by piece.

    Returns:
        What the server sent until it closed the connection, and after how many seconds that was.
    """
    with socket.create_connection(running.address, timeout=20) as connection:
        began = time.monotonic()
        connection.sendall(f"POST /embed HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n".encode())
        answer = b""
        connection.settimeout(pause)
        for piece in pieces:
            try:
                connection.sendall(piece)
                received = connection.recv(4096)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            answer += received
            if not received:
                break
        else:
            pytest.fail(f"the connection is still open after {time.monotonic() - began:.1f} s: {answer!r}")
        return answer, time.monotonic() - began


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_a_body_that_drips_in_is_cut_off(chunked: bool, running: Running) -> None:
    headers = "Transfer-Encoding: chunked" if chunked else "Content-Length: 500"
    piece = b"1\r\nx\r\n" if chunked else b"x"
    answer, seconds = drip(running, headers, [piece] * 400, 0.05)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'{"error":"The body did not arrive within 0.5 seconds."}' in answer
    assert b"connection: close" in answer.lower()
    assert SECONDS <= seconds < SECONDS + 5
    assert running.post("/embed", json={"texts": ["another client"]}).status_code == 200


def test_a_body_that_stops_is_cut_off(running: Running) -> None:
    answer, seconds = drip(running, "Content-Length: 500", [b'{"texts": ["a', *[b""] * 400], 0.05)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert SECONDS <= seconds < SECONDS + 5


def test_a_slow_body_in_time_is_answered(running: Running) -> None:
    def pieces() -> Iterator[bytes]:
        for piece in (b'{"tex', b'ts": ["', b'a"]}'):
            time.sleep(0.1)
            yield piece

    headers = {"Content-Type": "application/json"}
    assert running.post("/embed", content=pieces(), headers=headers).status_code == 200


def test_an_answer_may_take_longer_than_a_body(running: Running) -> None:
    running.hold()
    begun = running.begin("x")
    running.wait_until(running.busy)
    time.sleep(1.5 * SECONDS)
    running.release()
    assert begun.result().status_code == 200


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_a_body_that_is_too_large_is_cut_off(chunked: bool, running: Running) -> None:
    headers = "Transfer-Encoding: chunked" if chunked else "Content-Length: 1000000"
    piece = b"64\r\n" + b"x" * 100 + b"\r\n" if chunked else b"x" * 100
    answer, _ = drip(running, headers, [piece] * 400, 0.005)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'{"error":"The body is larger than 1,000 bytes, the most that this server takes."}' in answer
    assert b"connection: close" in answer.lower()
