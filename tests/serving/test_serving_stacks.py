"""docs/serving.md's recipes for stacks that already compile, each on the stack's own classes; nothing is downloaded.

Answers are compared with the same stack's without compilation, in float64, so that a norm folded wrongly would show;
the rewritten graph runs without Inductor, which other tests are about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import randomise
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    CompileConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedTokenizerFast,
    pipeline,
)

import lncompile

WORDS = "the quick brown fox jumps over a lazy dog".split()
SENTENCES = ["the quick brown fox", "a lazy dog jumps over the fox", "dog"]
SITES = 5  # two layers with two norms each, and the last one

pytestmark = pytest.mark.usefixtures("without_inductor")


def config() -> GPT2Config:
    return GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=97, n_positions=64, bos_token_id=0, eos_token_id=1, pad_token_id=0
    )


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder as ``from_pretrained`` reads it: an encoder and its tokenizer."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    randomise(GPT2Model(config())).double().eval().save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    return str(tmp_path)


def assert_all_fold(compiled: Any) -> None:
    reports = lncompile.reports(compiled)
    assert reports
    assert {(report.folded, report.total) for report in reports} == {(SITES, SITES)}


def test_generate_with_a_static_cache() -> None:
    """``CompileConfig(backend="lnfold")``: every step of a decode goes through one graph."""
    model = randomise(GPT2LMHeadModel(config())).double().eval()
    prompt = torch.randint(2, 97, (2, 7))

    def scores(**settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=9,
            cache_implementation="static", return_dict_in_generate=True, output_scores=True, **settings,
        )  # fmt: skip
        return generated.sequences, torch.stack(generated.scores)

    expected, expected_scores = scores(disable_compile=True)
    settings = CompileConfig(backend="lnfold", mode=None)
    settings._compile_all_devices = True  # transformers' own tests set it: by itself it compiles on accelerators only
    actual, actual_scores = scores(compile_config=settings)
    assert torch.equal(actual, expected)
    torch.testing.assert_close(actual_scores, expected_scores, rtol=1e-10, atol=1e-10)
    assert_all_fold(model)


def test_pipeline(folder: str) -> None:
    extractor = pipeline("feature-extraction", model=folder, dtype=torch.float64)
    expected = extractor(SENTENCES, return_tensors=True)
    extractor.model.compile(backend="lnfold")
    for actual, reference in zip(extractor(SENTENCES, return_tensors=True), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-10, atol=1e-10)
    assert_all_fold(extractor.model)


def test_sentence_transformers(folder: str) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float64})
    expected = model.encode(SENTENCES, convert_to_tensor=True)
    assert expected.dtype == torch.float64
    encoder = model[0].auto_model
    encoder.forward = torch.compile(encoder.forward, backend="lnfold", dynamic=True)
    actual = model.encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert_all_fold(encoder)


def test_accelerate(folder: str) -> None:
    from accelerate import Accelerator

    lncompile.allow_in_accelerate()
    model = AutoModel.from_pretrained(folder, dtype=torch.float64)
    tokens = torch.randint(2, 97, (2, 7))
    expected = model(tokens).last_hidden_state
    prepared = Accelerator(cpu=True, dynamo_backend="lnfold").prepare_model(model, evaluation_mode=True)
    torch.testing.assert_close(prepared(tokens).last_hidden_state, expected, rtol=1e-10, atol=1e-10)
    assert_all_fold(prepared)


def test_litserve(folder: str) -> None:
    """An API compiles in ``setup``; the engine's batches and its HTTP side stay what they are."""
    litserve = pytest.importorskip("litserve")
    from fastapi.testclient import TestClient
    from litserve.utils import wrap_litserve_start
    from serving_stack import EmbeddingAPI

    expected = EmbeddingAPI(folder, backend="eager", max_batch_size=4, batch_timeout=0.01)
    expected.setup("cpu")
    server = litserve.LitServer(EmbeddingAPI(folder, backend="lnfold", max_batch_size=4, batch_timeout=0.01))
    with wrap_litserve_start(server) as started, TestClient(started.app) as client:
        for sentence in SENTENCES:
            answer = client.post("/predict", json={"text": sentence})
            assert answer.status_code == 200, answer.text
            counts = answer.json()["folded"]  # a graph for each kind of size: one token, several
            assert counts
            assert all(count == [SITES, SITES] for count in counts)
            (reference,) = expected.predict([sentence])
            torch.testing.assert_close(
                torch.tensor(answer.json()["embedding"], dtype=torch.float64),
                torch.tensor(reference, dtype=torch.float64), rtol=1e-10, atol=1e-10,
            )  # fmt: skip
