"""Code that one process compiles and another one runs: the private names of torch for that.

A part of :mod:`.torch_private`, which says what its modules are for. torch has two ways:

* ``torch.compile(...).aot_compile`` saves what the backend returns, which has to be a :class:`SerializableCallable`.
* Under ``caching_precompile`` AOTAutograd records what it compiled, by the name that Dynamo gave to the graph, and
  Dynamo saves that with its own code. What the backend returns is not saved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable, SerializableCallable
from torch._dynamo.precompile_context import BackendCacheArtifact, PrecompileContext

from lncompile.lowering.torch_private_dynamo import innermost_backend

_NAME = "_backend_id"


class Names(NamedTuple):
    """How the code of one graph is recorded under ``caching_precompile``.

    Attributes:
        graph: the name that Dynamo gave to the graph, and asks for when it loads it.
        inner: the name under which AOTAutograd records what it compiled of the rewritten graph.
    """

    graph: str
    inner: str


def rename_recorded(graph_module: fx.GraphModule) -> Names | None:
    """Have AOTAutograd record a rewritten graph under a name that Dynamo does not ask for.

    Called in its place, the code of a rewritten graph would miss its extra inputs.

    Args:
        graph_module: a copy of Dynamo's, with inputs that Dynamo does not know.

    Returns:
        The names; None where nothing is recorded.
    """
    name = getattr(graph_module, _NAME, None)
    if name is None:
        return None
    names = Names(str(name), f"{name}_folded")
    graph_module._backend_id = names.inner  # type: ignore[assignment]
    return names


def recorded(name: str) -> Any:
    """What AOTAutograd recorded under a name: an artifact that makes a function; None if it recorded nothing.

    That is so where a graph cannot be cached, and where a backward graph is still to be compiled.
    """
    return PrecompileContext.serialize_artifact_by_key(name)


def record(artifact: BackendCacheArtifact[Any]) -> None:
    """Record what Dynamo is to save for a graph, and to call in another process."""
    PrecompileContext.record_artifact(artifact)


def savable(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that Inductor compiled as ``aot_compile`` wants it, if that is what it is compiled for.

    Of other backends than its own Dynamo does not wrap it itself before torch 2.13.
    """
    from torch._functorch import config

    is_ahead_of_time = config.bundled_autograd_cache and getattr(compiled, "serialize", None) is not None
    return BundledAOTAutogradSerializableCallable(compiled) if is_ahead_of_time else compiled


def serialized(compiled: Callable[..., Any]) -> bytes:
    """Return the bytes of a function that Inductor compiled ahead of time.

    Raises:
        RuntimeError: if it was not compiled in a way that lets it be saved.
    """
    if getattr(compiled, "serialize", None) is None:
        raise RuntimeError("Inductor's code for this graph cannot be saved: it was not compiled ahead of time")
    return BundledAOTAutogradSerializableCallable.serialize_compile_artifacts(
        BundledAOTAutogradSerializableCallable(compiled)
    )


def deserialized(data: bytes) -> Callable[..., Any]:
    """Return the function that :func:`serialized` made bytes of."""
    loaded = BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts(data)
    compiled: Callable[..., Any] = loaded.compiled_fn
    return compiled


def backend_of_load() -> Any:
    """The backend of the ``torch.compile`` for which Dynamo is loading code at this moment; None if it cannot be told.

    Dynamo finds saved code by the source of the function alone, whatever backend and options it was compiled with, and
    hands neither to what it loads. So they are looked up in the frames of the load.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        context = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        if isinstance(context, torch._dynamo.eval_frame._TorchDynamoContext):
            return innermost_backend(context)
        frame = frame.f_back
    return None


__all__ = [
    "BackendCacheArtifact",
    "Names",
    "SerializableCallable",
    "backend_of_load",
    "deserialized",
    "record",
    "recorded",
    "rename_recorded",
    "savable",
    "serialized",
]
