"""examples/serve.py over HTTP: under load, with an arm that fails, clients that leave, and requests that are wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

import httpx
from served_example import FEW_SHAPES, Running, continuation, embedding

from serving.models import Served, small_gpt2

TEXTS = ["a", "some words", "a longer text of several words, and numbers: 1 2 3", "ünïcödé " * 4, "the end of it all"]


@pytest.fixture(scope="module")
def served() -> Served:
    return small_gpt2(layers=2, width=32, positions=64)


@pytest.fixture(scope="module")
def server(served: Served) -> Iterator[Running]:
    with Running(served) as running:
        yield running


@pytest.fixture
def running(server: Running) -> Running:
    """A server that many tests ask: for those that end it, or take an arm out of service, there is ``Running``."""
    server.forget()
    return server


# --- answers ----------------------------------------------------------------------------------------------------------


def test_concurrent_answers_are_those_of_single_texts(served: Served) -> None:
    """60 requests, 12 at a time, both tasks, all lengths: batched, with the answers of each text alone."""
    expected = {text: embedding(served, text) for text in TEXTS}
    continued = {text: continuation(served, text, 3 + len(text) % 4) for text in TEXTS}

    async def send(url: str) -> None:
        limits = asyncio.Semaphore(12)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:

            async def one(number: int) -> None:
                first, second = TEXTS[number % 5], TEXTS[number // 5 % 5]
                headers = {"X-User": f"user {number % 7}"} if number % 3 == 0 else {}
                async with limits:
                    if number % 4 == 0:
                        body: dict[str, Any] = {"prompt": first, "max_new_tokens": 3 + len(first) % 4}
                        answer = await client.post("/generate", json=body, headers=headers)
                        assert answer.json()["text"] == continued[first]
                        assert answer.json()["prompt_tokens"] == len(first.encode())
                        return
                    answer = await client.post("/embed", json={"texts": [first, second]}, headers=headers)
                assert answer.status_code == 200, answer.text
                got = torch.tensor(answer.json()["embeddings"])
                torch.testing.assert_close(got, torch.stack([expected[first], expected[second]]), atol=2e-5, rtol=1e-4)
                assert answer.json()["tokens"] == len(first.encode()) + len(second.encode())

            await asyncio.gather(*(one(number) for number in range(60)))

    with Running(served, dataclasses.replace(FEW_SHAPES, max_wait=0.02), shadow=0.3) as running:
        asyncio.run(send(running.url))
        rows = [shape[0] for shape in running.shapes()]
        assert max(rows) > 2, "nothing was batched"
        assert set(rows) <= {1, 2, 4, 8}
        samples = running.samples()
        state = running.get("/ab.json").json()
    assert samples["serve_requests_total", "embed", "200"] == 45
    assert samples["serve_requests_total", "generate", "200"] == 15
    assert samples["serve_request_seconds_count", "embed"] == 45
    assert samples["serve_batch_size_sum", "embed"] == 90
    assert samples["serve_queue_length",] == 0
    assert samples["serve_ready",] == 1
    batches = samples["serve_batch_size_count", "embed"] + samples["serve_batch_size_count", "generate"]
    name = state["name"]
    assert sum(samples["lncompile_ab_requests_total", arm, name] for arm in running.gates) == batches
    assert batches == sum(arm["requests"] for arm in state["arms"])
    assert state["comparisons"]["compared"] > 0
    assert state["verdict"]["outputs_agree"], state["comparisons"]
    assert {bucket["name"].split()[0] for bucket in state["buckets"]} == {"embed", "generate"}


def test_texts_that_wait_share_a_batch(running: Running) -> None:
    """Up to max_batch, padded to one length, and filled up to one of few numbers of texts."""
    running.hold()
    answers = [running.begin("x")]
    running.wait_until(running.busy)
    answers += [running.begin("x" * size) for size in range(2, 11)]
    running.wait_until(lambda: len(running.service.batcher) == 9)
    running.release()
    assert [answer.result().status_code for answer in answers] == [200] * 10
    assert running.shapes() == [(1, 16), (1, 16), (8, 16)]


def test_a_batch_is_filled_up(running: Running, served: Served) -> None:
    answer = running.post("/embed", json={"texts": TEXTS})
    got = torch.tensor(answer.json()["embeddings"])
    torch.testing.assert_close(got, torch.stack([embedding(served, text) for text in TEXTS]), atol=2e-5, rtol=1e-4)
    assert running.post("/embed", json={"texts": ["a" * 20, "b" * 20, "c" * 20]}).status_code == 200
    assert running.shapes() == [(1, 32), (2, 16), (2, 64), (4, 32)]


def test_a_user_stays_with_an_arm(running: Running) -> None:
    for user in ("alice", "bob", "carol", "dave"):
        before = {name: len(gate.batches) for name, gate in running.gates.items()}
        for _ in range(6):
            assert running.post("/embed", json={"texts": ["x"]}, headers={"X-User": user}).status_code == 200
        grown = {name: len(gate.batches) - before[name] for name, gate in running.gates.items()}
        assert sorted(grown.values()) == [0, 6]
    assert all(gate.batches for gate in running.gates.values()), "all four users went to one arm"


# --- arms that fail ---------------------------------------------------------------------------------------------------


def test_an_arm_that_fails_loses_no_request(served: Served) -> None:
    with Running(served) as running:
        for number in range(12):
            if number == 6:
                running.gates["lnfold"].fails = lambda tokens: True
            answer = running.post("/embed", json={"texts": TEXTS})
            assert answer.status_code == 200
        torch.testing.assert_close(
            torch.tensor(answer.json()["embeddings"]),
            torch.stack([embedding(served, text) for text in TEXTS]),
            atol=2e-5,
            rtol=1e-4,
        )
        samples = running.samples()
        name = running.service.ab.name
        page = running.get("/ab").text
    assert samples["lncompile_ab_in_service", "lnfold", name] == 0
    assert samples["lncompile_ab_in_service", "inductor", name] == 1
    assert samples["lncompile_ab_failures_total", "lnfold", name] == 1
    assert samples["serve_requests_total", "embed", "200"] == 12
    assert "<h2>lnfold failed</h2>" in page
    assert "no such &lt;kernel&gt;" in page
    assert "no such <kernel>" not in page


def test_a_text_that_fails_everywhere_hurts_no_other(running: Running) -> None:
    for gate in running.gates.values():
        gate.fails = lambda tokens: bool((tokens == ord("!")).any())
    running.hold()
    first = running.begin("first")
    running.wait_until(running.busy)
    begun = {text: running.begin(text) for text in ("one", "two!", "three", "four", "five")}
    running.wait_until(lambda: len(running.service.batcher) == 5)
    running.release()
    assert first.result().status_code == 200
    answers = {text: answer.result() for text, answer in begun.items()}
    assert {text: answer.status_code for text, answer in answers.items()} == {
        "one": 200, "two!": 500, "three": 200, "four": 200, "five": 200
    }  # fmt: skip
    assert answers["two!"].json() == {"error": "The model failed at this request: RuntimeError."}
    assert running.service.ab.verdict().out_of_service == {}, "the request was at fault, not an arm"


def test_an_arm_that_cannot_be_compiled_never_serves(served: Served) -> None:
    running = Running(served)
    running.gates["lnfold"].fails = lambda tokens: True
    with running:
        assert running.post("/embed", json={"texts": ["x"]}).status_code == 200
        assert "at its warm-up" in running.get("/ab").text


def test_a_server_without_arms_says_so(served: Served) -> None:
    running = Running(served)
    for gate in running.gates.values():
        gate.fails = lambda tokens: True
    running.start()
    running.wait_until(lambda: running.service.broken is not None)
    answer = running.post("/embed", json={"texts": ["x"]})
    assert answer.status_code == 503
    assert "no arm can answer, lnfold raises RuntimeError: no such <kernel>" in answer.json()["error"]
    assert running.get("/health/ready").status_code == 503
    assert running.get("/health").json()["status"] == "broken"
    running.stop()


# --- clients ----------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_is_dropped(running: Running) -> None:
    before = running.samples()
    running.hold()
    first = running.begin("first")
    running.wait_until(running.busy)
    stays = running.begin("stays")
    running.wait_until(lambda: len(running.service.batcher) == 1)
    seen: list[int] = []

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=running.url, timeout=30) as client:
            leaving = asyncio.create_task(client.post("/embed", json={"texts": ["leaves", "leaves too"]}))
            while len(running.service.batcher) < 3:
                await asyncio.sleep(0.005)
            seen.append(len(running.service.batcher))
            leaving.cancel()
            await asyncio.wait([leaving])

    asyncio.run(asyncio.wait_for(leave(), 30))
    running.wait_until(lambda: len(running.service.batcher) == 1)
    running.release()
    assert [first.result().status_code, stays.result().status_code] == [200, 200]
    assert seen == [3]
    after = running.samples()

    def more(*sample: str) -> float:
        return after[sample] - before.get(sample, 0)

    assert more("serve_requests_total", "embed", "200") == 2
    assert more("serve_requests_total", "embed", "499") == 1
    assert more("serve_batch_size_sum", "embed") == 2, "the texts of the client that left were embedded"


def test_a_client_that_leaves_in_the_middle_of_its_batch(running: Running) -> None:
    running.hold()
    with pytest.raises(httpx.ReadTimeout):
        running.post("/embed", json={"texts": ["begun"]}, timeout=0.3)
    running.release()
    assert running.post("/embed", json={"texts": ["another"]}).status_code == 200
    assert running.service.ab.verdict().out_of_service == {}


def test_a_full_queue(served: Served) -> None:
    with Running(served, dataclasses.replace(FEW_SHAPES, max_queue=3, max_batch=2, max_texts=3)) as running:
        running.hold()
        begun = [running.begin("x")]
        running.wait_until(running.busy)
        begun += [running.begin("x") for _ in range(3)]
        running.wait_until(lambda: len(running.service.batcher) == 3)
        answer = running.post("/embed", json={"texts": ["one too many"]})
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.json() == {"error": "3 texts are waiting already. Try again later."}
        assert running.samples()["serve_queue_length",] == 3
        running.release()
        assert [answer.result().status_code for answer in begun] == [200] * 4


def test_shutting_down_finishes_what_was_begun(served: Served) -> None:
    running = Running(served).__enter__()
    running.hold()
    begun = [running.begin("x")]
    running.wait_until(running.busy)
    begun += [running.begin("x") for _ in range(2)]
    running.wait_until(lambda: len(running.service.batcher) == 2)
    running.server.should_exit = True
    time.sleep(0.3)
    running.release()
    running.stop()
    assert [answer.result().status_code for answer in begun] == [200, 200, 200]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(running.address)


# --- wrong requests ---------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any, int, str]] = [
    ("/embed", b'{"texts": ["a"', 400, "The body is not valid JSON"),
    ("/embed", b"\xff\xfe\x00", 400, "error parsing the body"),
    ("/embed", b"", 422, "Field required"),
    ("/embed", {"texts": "one text"}, 422, "should be a valid list: texts"),
    ("/embed", {"texts": [1]}, 422, "should be a valid string: texts.0"),
    ("/embed", {"text": ["a"]}, 422, "Field required: texts"),
    ("/embed", {"texts": []}, 422, "There are no texts to embed."),
    ("/embed", {"texts": ["fine", ""]}, 422, "There are no tokens in text 1: it is empty."),
    ("/embed", b'{"texts": ["\\ud800"]}', 422, "surrogate"),
    ("/embed", {"texts": ["a"] * 65}, 422, "65 texts are too many: at most 64 in one request."),
    ("/embed", {"texts": ["a" * 65]}, 413, "There are 65 tokens in text 0: the server takes 64 at most."),
    ("/embed", {"texts": ["a" * 100_000]}, 413, "far more than 64 tokens"),
    ("/embed", {"texts": ["a" * 2_000_000]}, 413, "The body is larger than 1,048,576 bytes"),
    ("/generate", {"prompt": ""}, 422, "There are no tokens in the prompt"),
    ("/generate", {"prompt": "a", "max_new_tokens": 9}, 422, "between 1 and 8, not 9"),
    ("/generate", {"prompt": "a", "max_new_tokens": 0}, 422, "between 1 and 8, not 0"),
    ("/generate", {"prompt": "a", "max_new_tokens": 10**40}, 422, "between 1 and 8, not 1000"),
    ("/generate", {"prompt": "a" * 57}, 413, "57 tokens of the prompt and 8 new ones are more than 64"),
    ("/generate", {"prompt": "a", "max_new_tokens": "many"}, 422, "should be a valid integer: max_new_tokens"),
    ("/generate", {"prompt": "a" * 60, "max_new_tokens": 8}, 413, "60 tokens of the prompt and 8 new ones"),
    ("/nowhere", {}, 404, "Not Found"),
]


def test_wrong_requests_are_answered_by_a_sentence(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=30, verify=False) as client:
        for path, body, status, words in WRONG:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert (answer.status_code, list(answer.json())) == (status, ["error"]), f"{path} {content[:60]!r}"
            assert words in answer.json()["error"], f"{path} {content[:60]!r}: {answer.text}"
        chunked = client.post("/embed", content=(b"x" * 100_000 for _ in range(20)))
        assert (chunked.status_code, chunked.json()["error"][:23]) == (413, "The body is larger than")
        assert client.get("/embed").status_code == 405
        assert client.post("/embed", json={"texts": ["after all that"]}).status_code == 200


def test_longest_texts_are_answered(running: Running, served: Served) -> None:
    assert running.post("/embed", json={"texts": ["a" * 64]}).status_code == 200
    # Of the compiled shapes none is long enough to generate from: the model as it is answers.
    answer = running.post("/generate", json={"prompt": "a" * 58, "max_new_tokens": 6})
    assert answer.json()["text"] == continuation(served, "a" * 58, 6)
    assert running.shapes() == [(1, 64)]
    assert running.samples()["serve_eager_batches_total", "generate"] == 1


def test_health(served: Served) -> None:
    running = Running(served)
    running.hold()
    running.start()
    with httpx.Client(base_url=running.url, timeout=30, verify=False) as client:
        health = client.get("/health").json()
        assert (health["status"], health["warm_up"]) == ("warming up", {"done": 0, "total": 2 * 24})
        assert client.get("/health/ready").status_code == 503
        refused = client.post("/embed", json={"texts": ["x"]})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert "still being compiled" in refused.json()["error"]
        assert "Warming up" in client.get("/ab").text
        running.release()
        running.wait_until(lambda: running.service.ready)
        assert client.get("/health/ready").status_code == 200
        assert client.get("/health").json()["ready"] is True
    running.stop()
