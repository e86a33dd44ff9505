"""The ways to compile a graph that are raced: what the user's options leave open."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lncompile.lowering import is_folded_statistic
from lncompile.options import PREFIX, Options
from lncompile.pipeline import Prepared

#: What stock torch.compile makes of the graph: the way all others are compared with.
STOCK = "stock"
#: What the model of costs chooses: what is compiled without a race.
MODEL = "model"

# What each way sets among the options that are "auto". Where several lead to one graph, the first stands for it.
_WAYS: Mapping[str, Mapping[str, str]] = {
    MODEL: {},
    "fold alone": {"absorb_affine": "off", "defer": "off", "matrix_vector": "off"},
    "affine absorbed": {"absorb_affine": "on", "defer": "off", "matrix_vector": "off"},
    "scales deferred": {"defer": "on", "matrix_vector": "off"},
    "sums for one row": {"matrix_vector": "on"},
    "rows looped over": {"persistent": "off"},
    "no centering at run time": {"assist": "off"},
}
# They keep more copies of weights than the model of costs, which a memory budget is there to prevent.
_WAYS_THAT_COPY = ("affine absorbed", "scales deferred", "sums for one row")


@dataclass(frozen=True)
class Candidate:
    """One way to compile a graph.

    Attributes:
        name: of the way.
        options: ours.
        inductor: Inductor's configuration for it.
        changed: what differs from the user's options, as ``torch.compile`` takes it.
    """

    name: str
    options: Options
    inductor: Mapping[str, Any]
    changed: Mapping[str, Any]


def candidates_of(options: Options, inductor: Mapping[str, Any]) -> dict[str, Candidate]:
    """Return the ways that the user's options leave open, by name: stock, what the model chooses, and others.

    An option that the user set to something else than ``"auto"`` stays what it is.

    Args:
        options: the user's.
        inductor: the user's configuration of Inductor, resolved.

    Example:
        >>> list(candidates_of(Options(absorb_affine="off", defer="off"), {}))
        ['stock', 'model', 'sums for one row', 'rows looped over', 'no centering at run time']
    """
    found = {STOCK: Candidate(STOCK, options, dict(inductor), {})}
    for name, wanted in _WAYS.items():
        if name in _WAYS_THAT_COPY and options.memory_budget is not None:
            continue
        changed: dict[str, Any] = {key: value for key, value in wanted.items() if getattr(options, key) == "auto"}
        chosen = dataclasses.replace(options, **changed)
        if any(chosen == other.options for way, other in found.items() if way != STOCK):
            continue
        config = dict(inductor)
        if changed.get("matrix_vector") == "on":
            config.setdefault("coordinate_descent_tuning", True)  # as options.parse_options does
        found[name] = Candidate(name, chosen, config, {PREFIX + key: value for key, value in changed.items()})
    return found


def fingerprint(candidate: Candidate, prepared: Prepared | None, device: torch.device) -> str:
    """Return a text that is the same for two candidates exactly when Inductor would be given the same for them.

    Args:
        candidate: the candidate.
        prepared: what the passes made of the graph; None, or one without a graph, for the graph as it came.
        device: where it runs.
    """
    if prepared is None or prepared.graph_module is None:
        return f"the graph as it came, {_settings(candidate, device)}"
    materializer = prepared.materializer
    expressions = () if materializer is None else tuple((e.code, e.leaves) for e in materializer.expressions)
    text = [code_of(prepared.graph_module), repr(expressions), _settings(candidate, device)]
    if device.type != "cpu":  # only kernels of a GPU hold rows in registers
        text += [str(n) for n, node in enumerate(prepared.graph_module.graph.nodes) if is_folded_statistic(node)]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def code_of(graph_module: fx.GraphModule) -> str:
    """Return the code of a graph, and of the graphs that are called in it."""
    inner = [(name, module) for name, module in graph_module.named_modules() if isinstance(module, fx.GraphModule)]
    return "\n".join(f"{name}: {module.graph.python_code('self').src}" for name, module in inner)


def _settings(candidate: Candidate, device: torch.device) -> str:
    # Of Inductor's own tuning nothing is seen on a CPU.
    seen = {key: value for key, value in candidate.inductor.items() if not (device.type == "cpu" and key == _TUNING)}
    return repr(sorted(seen.items(), key=lambda item: item[0]))


_TUNING = "coordinate_descent_tuning"

__all__ = ["MODEL", "STOCK", "Candidate", "candidates_of", "code_of", "fingerprint"]
