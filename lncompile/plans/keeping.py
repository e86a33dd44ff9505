"""Contexts that give a model back what it had: after example calls, and after a change that failed half way."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lncompile.lowering import torch_private


@contextlib.contextmanager
def kept_as_it_was(model: nn.Module) -> Iterator[None]:
    """Context in which a model may be called: what calls change is afterwards as before, random generators included.

    These are attributes of modules (counters, tables that are made in the first call), buffers and their values
    (running statistics), and the states of torch's and Python's generators.

    Args:
        model: the model.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not _has_no_values(buffer)]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    state = random.getstate()
    with torch.random.fork_rng(devices), _registries_put_back(model, always=True):
        try:
            yield
        finally:
            random.setstate(state)
            for module, before in attributes:
                own = vars(module)
                for name in own.keys() - before.keys():
                    del own[name]
                own.update(before)
            with torch.no_grad():
                for buffer, value in values:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def _is_registry(value: Any) -> bool:
    """Whether an attribute is a dict that is changed in place: of parameters, of hooks, of what a model remembers."""
    return type(value) in (dict, OrderedDict, defaultdict)


def _has_no_values(buffer: Tensor) -> bool:
    return buffer.device.type == "meta" or torch_private.is_opaque_tensor(buffer)


@contextlib.contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Context in which modules and parameters are exchanged: where it fails, the model has its own again.

    Args:
        model: the model. If it has a config, whether that ties word embeddings is put back as well.
    """
    config: Any = getattr(model, "config", None)
    tie = getattr(config, "tie_word_embeddings", None)
    with _registries_put_back(model, always=False):
        try:
            yield
        except BaseException:
            if getattr(config, "tie_word_embeddings", None) != tie:
                config.tie_word_embeddings = tie
            raise


@contextlib.contextmanager
def _registries_put_back(model: nn.Module, always: bool) -> Iterator[None]:
    """Context after which modules hold the parameters, buffers, modules and hooks that they held.

    Args:
        model: the model.
        always: whether that is so where nothing fails, too.
    """
    registries = [value for module in model.modules() for value in vars(module).values() if _is_registry(value)]
    held = [(registry, dict(registry)) for registry in registries]
    transient = [(module, set(module._non_persistent_buffers_set)) for module in model.modules()]
    failed = True
    try:
        yield
        failed = False
    finally:
        if always or failed:
            for registry, before in held:
                registry.clear()
                registry.update(before)
            for module, names in transient:
                module._non_persistent_buffers_set = names
