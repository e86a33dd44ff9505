"""examples/serve.py over HTTP: under load, with an arm that fails, clients that leave, and requests that are wrong."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import httpx
import load
import serve
from served_example import WARM_UP, Running, continuation, embedding

import lncompile
from lncompile.abtest import timers
from lncompile.abtest.arms import compiled_arms
from lncompile.models import ModelError
from serving import models
from serving.arms import model_arms, pad
from serving.models import Served, small_gpt2
from serving.service import Service
from serving.settings import Settings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

TEXTS = ["a", "some words", "a longer text of several words, and numbers: 1 2 3", "ünïcödé " * 4, "the end of it all"]


@pytest.fixture(scope="module")
def served() -> Served:
    return small_gpt2(layers=2, width=32, positions=256)


@pytest.fixture
def running(served: Served) -> Iterator[Running]:
    with Running(served) as server:
        yield server


# --- answers ----------------------------------------------------------------------------------------------------------


def test_concurrent_answers_are_those_of_single_texts(served: Served) -> None:
    """60 requests, 12 at a time, both tasks, all lengths: batched, and nobody notices."""
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

    with Running(served, Settings(max_wait=0.02), shadow=0.3) as running:
        asyncio.run(send(running.url))
        rows = [shape[0] for gate in running.gates.values() for shape in gate.batches[WARM_UP:]]
        assert max(rows) > 2, "nothing was batched"
        assert max(rows) <= running.service.settings.max_batch
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
    """Up to max_batch, padded to one length."""
    running.hold()
    answers = [running.begin("x")]
    running.wait_until(running.busy)
    answers += [running.begin("x" * size) for size in range(2, 11)]
    running.wait_until(lambda: len(running.service.batcher) == 9)
    running.release()
    assert [answer.result().status_code for answer in answers] == [200] * 10
    shapes = [shape for gate in running.gates.values() for shape in gate.batches[WARM_UP:]]
    assert sorted(shapes) == [(1, 16), (1, 16), (8, 16)]


def test_a_user_stays_with_an_arm(running: Running) -> None:
    for user in ("alice", "bob", "carol", "dave"):
        before = {name: len(gate.batches) for name, gate in running.gates.items()}
        for _ in range(6):
            assert running.post("/embed", json={"texts": ["x"]}, headers={"X-User": user}).status_code == 200
        grown = {name: len(gate.batches) - before[name] for name, gate in running.gates.items()}
        assert sorted(grown.values()) == [0, 6]
    assert all(len(gate.batches) > WARM_UP for gate in running.gates.values()), "all four users went to one arm"


# --- arms that fail ---------------------------------------------------------------------------------------------------


def test_an_arm_that_fails_loses_no_request(running: Running, served: Served) -> None:
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
    assert samples["lncompile_ab_in_service", "lnfold", name] == 0
    assert samples["lncompile_ab_in_service", "inductor", name] == 1
    assert samples["lncompile_ab_failures_total", "lnfold", name] == 1
    assert samples["serve_requests_total", "embed", "200"] == 12
    page = running.get("/ab").text
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
    samples = running.samples()
    assert samples["serve_requests_total", "embed", "200"] == 2
    assert samples["serve_requests_total", "embed", "499"] == 1
    assert samples["serve_batch_size_sum", "embed"] == 2, "what the client left was begun"


def test_a_client_that_leaves_in_the_middle_of_its_batch(running: Running) -> None:
    running.hold()
    with pytest.raises(httpx.ReadTimeout):
        running.post("/embed", json={"texts": ["begun"]}, timeout=0.3)
    running.release()
    assert running.post("/embed", json={"texts": ["another"]}).status_code == 200
    assert running.service.ab.verdict().out_of_service == {}


def test_a_full_queue(served: Served) -> None:
    with Running(served, Settings(max_queue=3, max_batch=2, max_texts=3)) as running:
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


def test_shutting_down_finishes_what_was_begun(running: Running) -> None:
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
    ("/embed", b'{"texts": ["a"', 400, "The body is no JSON"),
    ("/embed", b"\xff\xfe\x00", 400, "error parsing the body"),
    ("/embed", b"", 422, "Field required"),
    ("/embed", {"texts": "one text"}, 422, "should be a valid list: texts"),
    ("/embed", {"texts": [1]}, 422, "should be a valid string: texts.0"),
    ("/embed", {"text": ["a"]}, 422, "Field required: texts"),
    ("/embed", {"texts": []}, 422, "There are no texts to embed."),
    ("/embed", {"texts": ["fine", ""]}, 422, "There are no tokens in text 1: it is empty."),
    ("/embed", b'{"texts": ["\\ud800"]}', 422, "surrogate"),
    ("/embed", {"texts": ["a"] * 65}, 422, "65 texts are too many: at most 64 in one request."),
    ("/embed", {"texts": ["a" * 257]}, 413, "There are 257 tokens in text 0: the server takes 256 at most."),
    ("/embed", {"texts": ["a" * 100_000]}, 413, "far more than 256 tokens"),
    ("/embed", {"texts": ["a" * 2_000_000]}, 413, "The body is larger than 1,048,576 bytes"),
    ("/generate", {"prompt": ""}, 422, "There are no tokens in the prompt"),
    ("/generate", {"prompt": "a", "max_new_tokens": 65}, 422, "between 1 and 64, not 65"),
    ("/generate", {"prompt": "a", "max_new_tokens": 0}, 422, "between 1 and 64, not 0"),
    ("/generate", {"prompt": "a", "max_new_tokens": 10**40}, 422, "between 1 and 64, not 1000"),
    ("/generate", {"prompt": "a", "max_new_tokens": "many"}, 422, "should be a valid integer: max_new_tokens"),
    ("/generate", {"prompt": "a" * 200, "max_new_tokens": 60}, 413, "200 tokens of the prompt and 60 new ones"),
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
    assert running.post("/embed", json={"texts": ["a" * 256]}).status_code == 200
    answer = running.post("/generate", json={"prompt": "a" * 215, "max_new_tokens": 41})
    assert answer.json()["text"] == continuation(served, "a" * 215, 41)


def test_health(served: Served) -> None:
    running = Running(served)
    running.hold()
    running.start()
    with httpx.Client(base_url=running.url, timeout=30, verify=False) as client:
        assert client.get("/health").json()["status"] == "warming up"
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


# --- the report -------------------------------------------------------------------------------------------------------


def in_chromium(*arguments: str) -> str:
    """What headless Chromium prints."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_report_in_a_browser(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, noise = 0.0, random.Random(0)

    def taking(milliseconds: float) -> Callable[[], None]:
        def tick() -> None:
            nonlocal now
            now += 1e-3 * milliseconds * noise.lognormvariate(0, 0.2)

        return tick

    with Running(served, shadow=0.2) as running:
        # The test's own clock, so that it is known what it has to find.
        monkeypatch.setattr(timers, "time", SimpleNamespace(perf_counter=lambda: now))
        running.gates["inductor"].tick, running.gates["lnfold"].tick = taking(6.0), taking(4.0)
        for text in TEXTS:
            assert running.post("/embed", json={"texts": [text]}).status_code == 200
        for _ in range(400):  # more than HTTP brings in a test's time
            running.service.ab("embed", *pad([[1, 2, 3]], 16, 0, left=False), 0)
        verdict = running.service.ab.verdict()
        assert verdict.improvement, str(verdict)
        assert verdict.speedup.low is not None
        assert 1.2 < verdict.speedup.low < 1.5 < verdict.speedup.high < 1.9
        page = in_chromium("--dump-dom", f"{running.url}/ab?refresh=0")
        picture = tmp_path / "report.png"
        in_chromium(f"--screenshot={picture}", "--window-size=1200,1250", f"{running.url}/ab?refresh=0")
    assert f'<p id="verdict">{verdict}</p>' in page
    assert "<h2>lnfold is faster</h2>" in page
    for expected in ("embed 1 × 16", "in service", f"{verdict.speedup.estimate:.3f}×", "none of them differently"):
        assert expected in page
    assert picture.read_bytes().startswith(b"\x89PNG")
    # Whole in itself: nothing is fetched but the page.
    assert not re.findall(r"""(?:src|href|url\()\s*=?\s*["']?\s*(?:https?:)?//""", page)
    assert "<script" not in page
    assert [reference[:26] for reference in re.findall(r'src="([^"]*)"', page)] == ["data:image/svg+xml;base64,"]


def test_report_before_any_request(running: Running) -> None:
    answer = running.get("/ab")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert '<meta http-equiv="refresh" content="10">' in answer.text
    assert "Undecided so far" in answer.text
    assert "No requests yet." in answer.text


# --- the commands -----------------------------------------------------------------------------------------------------


def test_load_prints_the_verdict(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--url", running.url, "--requests", "40"]) == 0
    printed = capsys.readouterr().out
    assert "40 × 200" in printed
    assert str(running.service.ab.verdict()) in printed


def test_load_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--url", "http://127.0.0.1:9", "--wait", "0.1"]) == 2
    assert "not ready" in capsys.readouterr().err


def test_serve_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--model", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert serve.main(["--max-batch", "0"]) == 2
    assert "max_batch is at least 1" in capsys.readouterr().err
    assert serve.main(["--max-queue", "10"]) == 2
    assert "max_texts is at most max_queue, 10, not 64" in capsys.readouterr().err
    assert serve.main(["--ratio", "2"]) == 2
    assert "ratio is between 0.01 and 0.99" in capsys.readouterr().err


def test_a_folder_with_a_config_is_served_over_bytes(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    transformers.BertConfig(**sizes, max_position_embeddings=64, architectures=["BertModel"]).save_pretrained(tmp_path)
    served = models.load(str(tmp_path))
    assert not served.generates
    with Running(served) as running:
        got = running.post("/embed", json={"texts": ["ab", "abcdef"]}).json()["embeddings"]
        torch.testing.assert_close(torch.tensor(got[0]), embedding(served, "ab"), atol=1e-5, rtol=1e-4)
        answer = running.post("/generate", json={"prompt": "a"})
        assert (answer.status_code, "does not generate" in answer.json()["error"]) == (422, True)


def test_a_model_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    import tokenizers
    import transformers

    words = {"[end]": 0, "once": 1, "upon": 2, "a": 3, "time": 4, "?": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[end]").save_pretrained(tmp_path)
    config = transformers.GPT2Config(
        vocab_size=6, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    served = models.load(str(tmp_path))
    assert served.tokenizer.encode("once upon a time") == [1, 2, 3, 4]
    with Running(served) as running:
        answer = running.post("/generate", json={"prompt": "once upon", "max_new_tokens": 7}).json()
        assert answer["text"] == continuation(served, "once upon", 7)
        assert answer["prompt_tokens"] == 2
        (got,) = running.post("/embed", json={"texts": ["a time"]}).json()["embeddings"]
        torch.testing.assert_close(torch.tensor(got), embedding(served, "a time"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [("T5Config", "an encoder and a decoder"), ("ViTConfig", "reads no text")],
)
def test_models_that_cannot_be_served(config: str, words: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "decoder_start_token_id": 0}
    if config == "ViTConfig":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    getattr(transformers, config)(**sizes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words):
        models.load(str(tmp_path))


def test_lnfold_answers_both_tasks_and_compiles_nothing_after_warm_up(without_inductor: None) -> None:
    served = small_gpt2(layers=1, width=32)
    compiled: list[Callable[..., Any]] = []

    def compile(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        compiled.append(compiled_arms(function, None, None, {"dynamic": True})["lnfold"])
        return {"inductor": function, "lnfold": compiled[-1]}

    service = Service(served, model_arms(served, compile))
    service.warm_up()
    reports = [report for function in compiled for report in lncompile.reports(function)]
    # Embeddings, prompts, and the tokens after them; each for one text and for several.
    assert [report.folded for report in reports] == [3] * 6
    service.ab.take_out("inductor")

    async def ask() -> None:
        service.start()
        for texts in (["a" * 16], ["ab", "abc" * 15], ["x" * 64, "y"] * 4):
            answers = await service.embed(texts)
            expected = torch.stack([embedding(served, text) for text in texts])
            torch.testing.assert_close(torch.tensor(answers[0]), expected, atol=2e-5, rtol=1e-4)
        for prompts in (["a" * 16], ["ab", "b"], ["b" * 100, "c" * 70, "d" * 64]):
            texts = await asyncio.gather(*(service.generate(prompt, 5) for prompt in prompts))
            assert [text for text, *_ in texts] == [continuation(served, prompt, 5) for prompt in prompts]
        await service.close()

    asyncio.run(ask())
    assert [report for function in compiled for report in lncompile.reports(function)] == reports
