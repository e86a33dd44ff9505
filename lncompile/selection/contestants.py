"""A candidate that was compiled and can be called: what runs in the race."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lncompile.comparisons.timing import CudaEvents, Stopwatch, wall_clock
from lncompile.lowering import persistent_norms, torch_private_inductor
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.pipeline import Prepared
from lncompile.selection.candidates import Candidate
from lncompile.selection.cuda_graphs import recorded
from lncompile.selection.working_inputs import WorkingInputs

log = logging.getLogger("lncompile")


def stopwatch_for(device: torch.device) -> Stopwatch:
    """Return how calls are timed on a device."""
    return CudaEvents(device) if device.type == "cuda" else wall_clock


class Contestant:
    """One way to compile the graph, compiled.

    Calling it makes one call with the inputs of the race, as the mode of the compilation will have it: under a CUDA
    graph where it uses them. What it returns is freed at once.

    Attributes:
        name: of the way.
    """

    def __init__(
        self,
        candidate: Candidate,
        prepared: Prepared | None,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        inputs: WorkingInputs,
        device: torch.device,
    ) -> None:
        """Compile a candidate.

        Args:
            candidate: the candidate.
            prepared: what the passes made of the graph; None for stock.
            graph_module: as Dynamo hands it to the backend. Not changed.
            example_inputs: the value of each placeholder, which it is compiled with.
            inputs: those that it is called with.
            device: where it runs.
        """
        self.name = candidate.name
        rewritten = None if prepared is None else prepared.graph_module
        values = prepared.values if prepared is not None and rewritten is not None else ()
        graph = copy_graph_module(graph_module if rewritten is None else rewritten)
        config = dict(candidate.inductor)
        under_graphs = device.type == "cuda" and torch_private_inductor.uses_cuda_graphs(config)
        if under_graphs:
            config["triton.cudagraphs"] = False  # recorded below, where its memory can be freed
        self._arguments = (*inputs.arguments, *values)
        materializer = None if prepared is None else prepared.materializer
        self._look = None if materializer is None or not materializer.expressions else materializer
        self._original = list(example_inputs)
        with persistent_norms(graph, config if rewritten is not None else {}):
            self._function = torch_private_inductor.inductor_compile_apart(graph, [*example_inputs, *values], config)
        self._call: Callable[[], Any] = lambda: self._function(*self._arguments)
        if under_graphs:
            self._call = _under_a_graph(self.name, self._call, inputs.restore, device)

    def __call__(self) -> None:
        """Make one call, with the look at the parameters that every call makes."""
        with torch.no_grad(), torch_private_inductor.called_apart():
            if self._look is not None:
                self._look(self._original)
            self._call()


def _under_a_graph(
    name: str, call: Callable[[], Any], prepare: Callable[[], None], device: torch.device
) -> Callable[[], Any]:
    try:
        with torch.no_grad(), torch_private_inductor.called_apart():
            return recorded(call, prepare, device)
    except RuntimeError as error:
        log.warning("'%s' is raced without a CUDA graph, because it cannot be recorded: %s", name, error)
        return call


def free(contestants: dict[str, Contestant], name: str, device: torch.device) -> None:
    """Free the memory of one that is out of the race.

    Args:
        contestants: those in the race; it is taken out of them.
        name: which one.
        device: where it ran.
    """
    contestants.pop(name, None)
    if device.type == "cuda":  # on a CPU it is not worth half a second of looking for what refers to itself
        gc.collect()
        torch.cuda.empty_cache()


def calls_of(contestants: Mapping[str, Contestant]) -> dict[str, Callable[[], None]]:
    """Return the call of each, which does not keep it alive."""
    return {name: _Call(name, contestants) for name in contestants}


class _Call:
    """The call of a contestant, as long as it is in the race.

    Attributes:
        name: of the contestant.
    """

    def __init__(self, name: str, contestants: Mapping[str, Contestant]) -> None:
        self.name, self._contestants = name, contestants

    def __call__(self) -> None:
        self._contestants[self.name]()
