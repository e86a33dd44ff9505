"""examples/serve.py and load.py as an operator uses them: pages, commands, models; as a process that is ended."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import ROOT

pytest.importorskip("transformers")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

import httpx
import load
import serve
from served_example import FEW_SHAPES, Running, continuation, embedding

from lncompile.abtest import timers
from lncompile.models.loading import ModelError
from serving import models
from serving.arms import pad
from serving.models import Served, small_gpt2
from serving.settings import Settings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEXTS = ["a", "some words", "a longer text of several words, and numbers: 1 2 3", "the end of it all"]


@pytest.fixture(scope="module")
def served() -> Served:
    return small_gpt2(layers=2, width=32, positions=256)


@pytest.fixture(scope="module")
def running(served: Served) -> Iterator[Running]:
    """A server that all tests ask, except for those that end it or want to know all of its requests."""
    with Running(served, Settings(max_batch=4, max_tokens=256, max_new_tokens=8)) as running:
        yield running


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


def test_the_report_hides_kinds_without_measurements(served: Served) -> None:
    """Each arm's first three batches of a kind are not counted."""
    with Running(served) as running:
        page = running.get("/ab")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert '<meta http-equiv="refresh" content="10">' in page.text
        assert "Undecided so far" in page.text
        assert "No requests yet." in page.text
        assert 'id="without"' not in page.text
        for text in ("x", "x" * 40):
            assert running.post("/embed", json={"texts": [text]}).status_code == 200
        page = running.get("/ab")
        assert "No measurements yet." in page.text
        assert "2 more kinds have\n    no measurements yet" in page.text
        for _ in range(12):  # one of the arms has more than three of them
            assert running.post("/embed", json={"texts": ["x"]}).status_code == 200
        page = running.get("/ab").text
        assert re.findall(r"<td>(embed \S* × \S*)</td>", page) == ["embed 1 × 16"]
        assert "1 more kind has\n    no measurements yet" in page


def test_the_first_page_leads_to_the_others(running: Running) -> None:
    page = running.get("/")
    assert (page.status_code, "Ready." in page.text) == (200, True)
    links = re.findall(r'href="([a-z./]+)"', page.text)
    assert links == ["ab", "ab.json", "docs", "metrics", "health", "health/ready"]
    assert [running.get(f"/{link}").status_code for link in links] == [200] * len(links)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_load_prints_the_verdict(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--url", running.url, "--requests", "40"]) == 0
    printed = capsys.readouterr().out
    assert "40 × 200" in printed
    assert re.search(r"Half of them took at most 0\.\d+ s, 99% at most .* none took over 1 s\.", printed)
    assert str(running.service.ab.verdict()) in printed


def test_load_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--url", "http://127.0.0.1:9", "--wait", "0.1"]) == 2
    assert "not ready" in capsys.readouterr().err


def test_serve_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--model", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    assert serve.main(["--max-batch", "0"]) == 2
    assert "max_batch must be at least 1, not 0" in capsys.readouterr().err
    assert serve.main(["--max-queue", "10"]) == 2
    assert "max_texts must be at most max_queue (10), not 64" in capsys.readouterr().err
    assert serve.main(["--body-seconds", "0"]) == 2
    assert "body_seconds must be more than 0, not 0.0" in capsys.readouterr().err
    assert serve.main(["--device", "abacus"]) == 2
    assert "serve: device 'abacus' cannot be used: " in capsys.readouterr().err
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
    [("T5Config", "an encoder and a decoder"), ("ViTConfig", "reads 'pixel_values', not text")],
)
def test_models_that_cannot_be_served(config: str, words: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "decoder_start_token_id": 0}
    if config == "ViTConfig":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    getattr(transformers, config)(**sizes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words):
        models.load(str(tmp_path))


# --- the process ------------------------------------------------------------------------------------------------------

_UNCOMPILED = """
import sys
import serve
from served_example import as_they_are
from serving.arms import model_arms
serve.model_arms = lambda served: model_arms(served, as_they_are)
sys.exit(serve.main(sys.argv[1:]))
"""


class Process:
    """examples/serve.py with a tiny model that is not compiled, in a process that takes signals."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        import transformers

        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
        transformers.BertConfig(**sizes, max_position_embeddings=32, architectures=["BertModel"]).save_pretrained(
            folder
        )
        command = [sys.executable, "-c", _UNCOMPILED, "--model", str(folder), "--port", "0", *arguments]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests' / 'support'}{os.pathsep}{ROOT / 'examples'}"}
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ready(self) -> int:
        """Wait until it is ready, and return its port."""
        for _ in range(1200):
            found = re.search(r"running on http://127.0.0.1:(\d+)", self.log)
            if found and "INFO lncompile.serve: ready" in self.log:
                return int(found[1])
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        raise TimeoutError(self.log)

    def end(self) -> int:
        """Wait until it has ended, and return its exit status."""
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


def test_sigterm_is_announced_before_connections_are_refused(tmp_path: Path) -> None:
    process = Process(tmp_path, "--drain-seconds", "1.5")
    try:
        port = process.ready()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, verify=False) as client:
            ready = client.get("/health/ready")
            assert (ready.status_code, "Connection" in ready.headers) == (200, False)
            process.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            time.sleep(0.2)
            # Over new connections, as a load balancer's checks and the clients it still sends here come.
            ready = httpx.get(f"{client.base_url}/health/ready", verify=False)
            assert (ready.status_code, ready.json()["status"]) == (503, "shutting down")
            assert ready.json()["ready"] is False
            answer = httpx.post(f"{client.base_url}/embed", json={"texts": ["still taken"]}, verify=False)
            assert (answer.status_code, answer.headers["Connection"]) == (200, "close")
            assert "serve_ready 0.0" in client.get("/metrics").text
            assert "Shutting down" in client.get("/").text
        assert process.end() in (0, -signal.SIGTERM)
        assert 1.4 < time.monotonic() - began < 10
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert "SIGTERM: not ready from now on; connections are refused in 1.5 s" in process.log
    finally:
        process.process.kill()


@pytest.mark.parametrize(
    "signals", [(signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)]
)
def test_signals_that_do_not_wait(signals: tuple[signal.Signals, ...], served: Served) -> None:
    """Ctrl-C, and a second signal, though the server would stay open for 600 s."""
    running = Running(served, dataclasses.replace(FEW_SHAPES, drain_seconds=600))
    with running:
        for number in signals:
            assert not running.server.should_exit
            running.server.handle_exit(number, None)
        assert running.server.should_exit
        assert not running.server.force_exit


def test_sigterm_during_warm_up_does_not_wait(served: Served) -> None:
    """The server is not ready anyway."""
    running = Running(served, dataclasses.replace(FEW_SHAPES, drain_seconds=600))
    running.hold()
    running.start()
    running.server.handle_exit(signal.SIGTERM, None)
    assert running.server.should_exit
    running.release()
    running.stop()
    assert not running.service.ready
