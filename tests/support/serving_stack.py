"""A LitServe API with a compiled model, in a module of its own: the engine starts its workers as new processes."""

from __future__ import annotations

from typing import Any

import litserve
import torch
from graphs import run_as_it_is
from transformers import AutoModel, AutoTokenizer

import lncompile
from lncompile.lowering import torch_private_inductor


class EmbeddingAPI(litserve.LitAPI):
    """Mean of a sentence's states, with how many norms of the model fold."""

    def __init__(self, folder: str, backend: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.folder, self.backend = folder, backend

    def setup(self, device: str) -> None:
        torch_private_inductor.inductor_compile = (
            run_as_it_is  # what the fixture without_inductor does, in this process
        )
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModel.from_pretrained(self.folder, dtype=torch.float64).to(device).eval()
        self.model.compile(backend=self.backend, dynamic=True)

    def decode_request(self, request: dict[str, str]) -> str:
        return request["text"]

    @torch.no_grad()
    def predict(self, texts: list[str]) -> list[list[float]]:
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        states = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        return ((states * mask).sum(1) / mask.sum(1)).tolist()

    def encode_response(self, embedding: list[float]) -> dict[str, Any]:
        counts = [(report.folded, report.total) for report in lncompile.reports(self.model)]
        return {"embedding": embedding, "folded": counts}
