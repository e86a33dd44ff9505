"""Set-up shared by all tests: our safety net off, so that it hides nothing; a compiler cache of this run alone."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import warnings

# Before torch is imported: code cached by an earlier run, of other sources, must not answer for this one.
os.environ["LNCOMPILE_SAFETY_NET"] = "0"
# A pass that leaves a graph that is wrong is named, and not the one that stumbles over it.
os.environ["LNCOMPILE_LINT_PASSES"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# All processes of a run share it: each of them would ask the C++ compiler anew which instructions there are, 10 s.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="lncompile-tests-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache.name

# Dynamo looks for garbage behind every compilation: a tenth of the time where compilations are small and many.
os.environ["TORCH_DYNAMO_RUN_GC_AFTER_COMPILE"] = "0"
# Tracing models makes objects by the hundred thousand, and Python's thresholds are for programs with a few: looking for
# garbage took an eighth of the time. (gc.freeze() would take less, but under it nothing is centered in place.)
gc.set_threshold(50_000, 20, 50)

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from graphs import run_as_it_is  # noqa: E402

from lncompile import backend  # noqa: E402
from lncompile.lowering import torch_private_inductor  # noqa: E402

# Behind the rest: a benchmark of one name with a helper of tests (numerics) must not stand in its place.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say so where pytest-xdist does not send the tests of one group to one process: they would compile it in each."""
    if config.getoption("loadgroup", False):
        grouped = [item for item in items if item.get_closest_marker("xdist_group")]
        if any("@" not in item.nodeid.rpartition("]")[2] for item in grouped):
            warnings.warn(pytest.PytestWarning("this pytest-xdist groups no tests under this pytest"), stacklevel=1)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Each test starts without compiled code, with the same random numbers, and under no_grad (inference)."""
    torch._dynamo.reset()
    backend.lnfold.reset()  # torch does that only where the backend compiled something since the last time
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the rewritten graph as it is."""
    monkeypatch.setattr(torch_private_inductor, "inductor_compile", run_as_it_is)
