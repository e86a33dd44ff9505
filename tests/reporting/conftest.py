"""Reports on models of each kind, made once for all tests of what people read of them."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES

import lncompile
from lncompile.reporting.report import FoldReport


@pytest.fixture(scope="session")
def explained() -> dict[str, FoldReport]:
    """By name: a pre-norm decoder, a post-norm encoder, one of each, and one with a centering at run time."""
    by_name = {architecture.name: architecture for architecture in ARCHITECTURES}
    found = {}
    with torch.no_grad():
        for name in ("gpt2", "bert", "clip", "bloom"):
            found[name] = lncompile.explain(by_name[name].model(), **by_name[name].inputs(torch.float64))
    return found
