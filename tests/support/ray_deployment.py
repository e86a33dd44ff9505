"""A Ray Serve deployment with a compiled model, in a module of its own: replicas are processes that import it."""

from __future__ import annotations

import os
from typing import Any

import torch
from graphs import run_as_it_is
from reported import Decoder

import lncompile
from lncompile.lowering import torch_private_inductor


class Replica:
    """A deployment: it loads weights and compiles where each replica sets itself up."""

    def __init__(self, weights: str) -> None:
        torch_private_inductor.inductor_compile = run_as_it_is  # what the fixture without_inductor does, here
        self.model = Decoder(layers=1).double().eval()
        self.model.load_state_dict(torch.load(weights))
        self.model.compile(backend="lnfold")

    async def __call__(self, request: Any) -> dict[str, Any]:
        ids = torch.tensor((await request.json())["ids"])
        with torch.no_grad():
            answer = self.model(ids).tolist()
        reports = lncompile.reports(self.model)
        return {"answer": answer, "process": os.getpid(), "folded": [[r.folded, r.total] for r in reports]}
