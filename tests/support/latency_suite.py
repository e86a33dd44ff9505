"""The latency suite of benchmarks/, with tiny models."""

from __future__ import annotations

import copy

from suite import workloads
from suite.measurement import Settings
from suite.suites import SUITES
from torch import nn

WORKLOADS = {(suite, workload.name): workload for suite, members in SUITES.items() for workload in members}
ARCHITECTURES = {workload.architecture.name: workload.architecture for workload in WORKLOADS.values()}
QUICK = Settings(seconds=1e-3, minimum_rounds=5, empty_caches=False)


def tiny(name: str, suite: str = "cpu") -> workloads.Workload:
    return WORKLOADS[suite, name].dry()


def without_norms(model: nn.Module) -> nn.Module:
    changed = copy.deepcopy(model)
    for module in list(changed.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.Identity())
    return changed
