"""Running a request twice, or on another thread, so that neither its caller nor the model notices."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lncompile.abtest.timers import cuda_in_use
from lncompile.lowering import torch_private


class CannotCompare(Exception):
    """A request that must not, or cannot, be run twice. The message says why."""


def copied_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Deep copies, caches that a model writes to included, made before any arm sees the inputs.

    Raises:
        CannotCompare: where something cannot be copied.
    """
    try:
        copies: tuple[tuple[Any, ...], dict[str, Any]] = copy.deepcopy((args, dict(kwargs)))
    except Exception as error:
        raise CannotCompare(f"the inputs cannot be copied: {type(error).__name__}: {error}") from error
    return copies


def kept(output: Any) -> Any:
    """The answer with its CUDA tensors copied: the next run may use memory of a CUDA graph again."""
    return torch_private.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_cuda else leaf, output
    )


@dataclass(frozen=True)
class ModelState:
    """How often a module's buffers have been written to: a second run of a model that counts would count twice."""

    versions: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, model: Any) -> ModelState:
        """Read it off; of anything but a module there is nothing to read."""
        buffers = model.buffers() if isinstance(model, torch.nn.Module) else ()
        # Tensors made under inference_mode do not count writes.
        return cls(tuple((id(b), 0 if b.is_inference() else torch_private.version_of(b)) for b in buffers))


class RandomState:
    """The state of torch's random number generators, on the CPU and the current CUDA device."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if cuda_in_use() else None

    def restore(self, unless: RandomState | None = None) -> None:
        """Put it back, except where it is that of ``unless`` anyway: other threads draw from the same generators."""
        if unless is None or not torch.equal(self._cpu, unless._cpu):
            torch.set_rng_state(self._cpu)
        if self._cuda is not None and (
            unless is None or unless._cuda is None or not torch.equal(self._cuda, unless._cuda)
        ):
            torch.cuda.set_rng_state(self._cuda)


@contextlib.contextmanager
def same_random_numbers(before: RandomState) -> Iterator[None]:
    """Context that draws the numbers the first run drew, and leaves the generators as that run left them."""
    after = RandomState()
    before.restore(unless=after)
    try:
        yield
    finally:
        after.restore(unless=RandomState())


class CallerState:
    """What torch keeps for each thread and a caller expects to hold for a call that another thread makes for it.

    Gradient mode, inference mode, autocast, the default device's CUDA stream.
    """

    def __init__(self) -> None:
        self._inference = torch.is_inference_mode_enabled()
        self._grad = torch.is_grad_enabled()
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        self._autocast = {
            device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices
        }
        self._cache = torch.is_autocast_cache_enabled()
        self._stream = torch.cuda.current_stream() if cuda_in_use() else None

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function under the state this was made in."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for device, (enabled, dtype) in self._autocast.items():
                stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=self._cache))
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            return function()
