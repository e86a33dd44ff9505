"""A call recorded into a CUDA graph of its own, as the mode of the compilation will have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: Calls before the recording, in which kernels are loaded and libraries get their workspaces.
WARM_UP = 2


def recorded(call: Callable[[], Any], prepare: Callable[[], None], device: torch.device) -> Callable[[], Any]:
    """Record a call and return what replays it.

    The graph's memory is a pool of its own, which is freed with what is returned. (Inductor's own CUDA graphs share
    one pool, in which those of ways that lost the race would stay.)

    Args:
        call: the call; it reads and writes tensors that stay where they are.
        prepare: called before each call.
        device: where it runs.

    Raises:
        RuntimeError: if it does something that cannot be recorded, such as waiting for the device.
    """
    aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            prepare()
            call()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    prepare()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        call()
    return graph.replay
