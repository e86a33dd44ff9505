"""What the result of a race depends on: the name it is kept under."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

import lncompile
from lncompile.comparisons.machine import describe_machine
from lncompile.lowering import torch_private_inductor
from lncompile.options import Options
from lncompile.selection.candidates import code_of

# What says who chooses and where results lie, and not what there is to choose from.
_NOT_RACED = ("select", "selection_file")
# Counted up when other ways are raced, or a race is decided in another way.
_VERSION = 2


def key_of(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: Mapping[str, Any],
    device: torch.device,
) -> str:
    """Return a name that differs where a race may end differently.

    It is made of the graph's code; shape, strides, dtype and device of every input; the device's name and the number of
    threads; the versions of torch, Triton and this package; and the options, Inductor's settings among them.

    Args:
        graph_module: as Dynamo hands it to the backend.
        example_inputs: the value of each placeholder.
        options: the user's.
        inductor: Inductor's configuration.
        device: where it runs.
    """
    asked = {k: v for k, v in dataclasses.asdict(options).items() if k not in _NOT_RACED}
    machine = describe_machine(device)
    facts = {
        "version": _VERSION,
        "graph": code_of(graph_module),
        "inputs": [_in_words(value) for value in example_inputs],
        "constants": [
            [name, _in_words(value)]
            for name, value in (*graph_module.named_parameters(), *graph_module.named_buffers())
        ],
        "device": [machine["device"], machine["device_type"], machine["threads"]],
        "versions": versions(),
        "options": repr(sorted(asked.items())),
        "inductor": torch_private_inductor.configuration_in_words(inductor),
        "torch": [
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled(device.type),
        ],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """Return the versions of what generates code."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {"torch": str(torch.__version__), "triton": triton, "lncompile": lncompile.__version__}


def _in_words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device} {value.requires_grad}"
