"""A last look at a folded model of an engine, with its weights, before it serves: does folding hold in its own code?

The plan is of transformers' code, and an engine has its own. So its model is called twice:

* as it is folded: every norm's input must have zero mean;
* with the LayerNorms back in their places, and a number added to all features of each token behind every module that
  was centered: LayerNorms do not see it, so the result must be the same. Where something else reads the stream, it
  is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Of means against root mean squares, and of results against each other. A centered stream in float32 is within 1e-6.
_TOLERANCES = {torch.float64: (1e-6, 1e-4), torch.float32: (1e-4, 2e-3)}
_NARROW_TOLERANCES = (2e-2, 1e-1)


def problem_with(
    model: nn.Module,
    norms: Mapping[str, tuple[nn.Module, nn.Module]],
    streams: Sequence[str],
    run: Callable[[], Sequence[Tensor]],
) -> str:
    """What shows that a fold does not hold, in words; ``""`` where nothing does.

    Args:
        model: folded.
        norms: by path, the LayerNorm that was there and what took its place.
        streams: the paths of modules whose output is centered.
        run: calls the model on a few tokens, in all the ways that it is called, and returns its results.
    """
    means: dict[str, float] = {}
    widest = torch.float64
    with contextlib.ExitStack() as stack:
        for path, (_, folded) in norms.items():
            handle = folded.register_forward_pre_hook(lambda _, inputs, path=path: _note(means, path, inputs[0]))
            stack.callback(handle.remove)
        results = run()
    missing = sorted(set(norms) - set(means))
    if missing:
        return f"{len(missing)} of {len(norms)} norms were not called on trial: {', '.join(missing[:4])}"
    widest = results[0].dtype
    mean_tolerance, tolerance = _TOLERANCES.get(widest, _NARROW_TOLERANCES)
    path, worst = max(means.items(), key=lambda item: item[1])
    if not worst <= mean_tolerance:
        return f"what '{path}' reads has a mean of {worst:.2g} times its size"
    modules = dict(model.named_modules(remove_duplicate=False))
    with _exchanged(model, {path: original for path, (original, _) in norms.items()}), contextlib.ExitStack() as stack:
        for number, path in enumerate(streams):
            handle = modules[path].register_forward_hook(
                lambda module, _, output, number=number: _shifted(module, output, number)
            )
            stack.callback(handle.remove)
        shifted = run()
    for number, (result, other) in enumerate(zip(results, shifted, strict=True)):
        error = float((result.double() - other.double()).norm() / result.double().norm())
        if not error <= tolerance:
            return f"something else than norms reads its streams: result {number} differs by {error:.2g} of its size"
    return ""


def _note(means: dict[str, float], path: str, value: Tensor) -> None:
    wide = value.double()
    size = wide.square().mean(-1).sqrt()
    # Of all rows together: one that is nearly zero has nothing but rounding.
    ratio = float(wide.mean(-1).abs().max() / size.max().clamp_min(torch.finfo(torch.float32).tiny))
    means[path] = max(means.get(path, 0.0), ratio)


def _shifted(module: nn.Module, output: Any, number: int) -> Any:
    if isinstance(output, tuple):
        return (_shifted(module, output[0], number), *output[1:])
    features = 1 if isinstance(module, _CONVOLUTIONS) or output.dim() == 4 else output.dim() - 1
    size = output.float().square().mean(features, keepdim=True).sqrt()
    generator = torch.Generator().manual_seed(number)  # the same numbers in every process of a group
    shift = torch.randn(size.shape, generator=generator).to(size) * size
    return output + shift.to(output.dtype)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextlib.contextmanager
def _exchanged(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Context in which other modules stand at some paths."""
    before = {path: model.get_submodule(path) for path in modules}
    try:
        put(model, modules)
        yield
    finally:
        put(model, before)


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules at paths of a model."""
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
