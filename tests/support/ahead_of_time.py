"""A process that compiles under caching_precompile, or loads what another one has compiled, and says what it found.

python ahead_of_time.py save|load ARTIFACTS BACKEND [OPTION TO SWITCH OFF]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from reported import IDS, Decoder
from torch._dynamo.utils import counters

import lncompile
from lncompile.models.random_weights import randomise


def main(step: str, artifacts: Path, backend: str, option: str = "") -> None:
    torch._dynamo.config.caching_precompile = True
    if step == "load":
        torch.compiler.load_cache_artifacts(artifacts.read_bytes())
    torch.manual_seed(0 if step == "save" else 1)
    net = randomise(Decoder(layers=1).double()).eval()
    with torch.no_grad():
        compiled = torch.compile(net, backend=backend, options={option: "off"} if option else None)
        errors = [(compiled(IDS) - net(IDS)).abs().max().item()]
        net.h[0].mlp.weight.mul_(1.5)
        errors.append((compiled(IDS) - net(IDS)).abs().max().item())
    if step == "save":
        saved = torch.compiler.save_cache_artifacts()
        assert saved is not None
        artifacts.write_bytes(saved[0])
    reports = lncompile.reports(compiled) if backend == "lnfold" else []
    found = {
        "errors": errors,
        "cache": dict(counters["dynamo_cache"]),
        "compiled": counters["lnfold"]["graphs"],
        "folded": [report.folded for report in reports],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
