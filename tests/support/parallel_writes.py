"""Programs of two processes that write into live parameters: collectives, and writes to the shards of a DTensor.

Part of ``parallel_programs``, which runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn
from weight_writes import change

Found = dict[str, Any]


def broadcast(model: nn.Module, rank: int) -> None:
    """Weights are pushed from one process to the other, as a trainer pushes them to those that generate."""
    for parameter in model.parameters():
        if rank == 0:
            change(parameter.data)
        distributed.broadcast(parameter, 0)


def all_reduce(model: nn.Module, rank: int) -> None:
    """Weights are summed over the processes, as local averages are."""
    for parameter in model.parameters():
        distributed.all_reduce(parameter)


def send_and_receive(model: nn.Module, rank: int) -> None:
    """The second process receives other weights, one after the other."""
    for parameter in model.parameters():
        if rank == 0:
            distributed.send(change(parameter.detach().clone()), 1)
        else:
            distributed.recv(parameter, 0)
    if rank == 0:
        change(next(model.parameters()).data)


def scatter(model: nn.Module, rank: int) -> None:
    """Each process is sent weights of its own."""
    for parameter in model.parameters():
        values = [change(parameter.detach().clone()).mul_(factor) for factor in (1, 2)]
        distributed.scatter(parameter, values if rank == 0 else None, 0)


WRITES: tuple[Callable[[nn.Module, int], None], ...] = (broadcast, all_reduce, send_and_receive, scatter)


def writes_of_collectives(
    model: nn.Module, ids: Tensor, relative: Callable[[Tensor, Tensor], float], check: str
) -> Iterator[tuple[str, float, float]]:
    """Yield for each collective its name, the error of the call behind it, and how much the answer changed by it."""
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.check": check})
    compiled(ids)
    for write in WRITES:
        before = model(ids)
        write(model, distributed.get_rank())
        after = model(ids)
        yield write.__name__, relative(compiled(ids), after), relative(before, after)


def writes_to_shards(model: nn.Module, ids: Tensor, relative: Callable[[Tensor, Tensor], float]) -> Iterator[float]:
    """Yield the errors of the calls behind writes to the local tensors of sharded weights."""
    compiled = torch.compile(model, backend="lnfold")
    yield relative(compiled(ids), model(ids))
    for _ in range(2):
        for parameter in model.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            change(local.data)
        yield relative(compiled(ids), model(ids))
