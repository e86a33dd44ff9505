"""What a model must have so that a plan made for another one fits it: names, shapes, ties, classes, settings, hooks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lncompile.plans.entries import ModelForm, Setting, class_name

# Attributes that have no say in what a module computes without gradients, or that shapes say already.
_WITHOUT_A_SAY = frozenset(
    "training gradient_checkpointing inplace momentum name_or_path layer_idx "
    "in_features out_features num_embeddings embedding_dim in_channels out_channels".split()
)
# Hooks that distribute a module's inputs and parameters, note what it returns, or compile it, compute nothing new.
_LIBRARIES_WITHOUT_A_SAY = ("torch.distributed.", "torch._dynamo.", "transformers.utils.output_capturing.")


def form_of(model: nn.Module) -> ModelForm:
    """What a model must have so that a plan made for this one fits it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    settings = {path: found for path, module in modules.items() if (found := _settings(module))}
    hooks = {path: names for path, module in modules.items() if (names := _hooks(module))}
    tensors: dict[str, tuple[int, ...]] = {}
    ties: dict[int, list[str]] = defaultdict(list)
    for name, tensor, is_persistent in named_tensors(model):
        if is_persistent:
            tensors[name] = tuple(tensor.shape)
            ties[id(tensor)].append(name)
    return ModelForm(
        class_name(model),
        tensors,
        {path: class_name(module) for path, module in modules.items()},
        settings,
        hooks,
        tuple(tuple(group) for group in ties.values() if len(group) > 1),
    )


def without_state(form: ModelForm, later: ModelForm) -> ModelForm:
    """A form in which settings that calls change are None: they are what a model remembers, not what it is.

    Args:
        form: of a model before it was called.
        later: of the same model afterwards.
    """
    settings: dict[str, Mapping[str, Setting]] = {}
    for path in dict.fromkeys((*form.settings, *later.settings)):
        own, after = form.settings.get(path, {}), later.settings.get(path, {})
        names = dict.fromkeys((*own, *after))
        settings[path] = {name: own[name] if name in own and after.get(name) == own[name] else None for name in names}
    return dataclasses.replace(form, settings=settings)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Each name of each parameter and buffer, and whether it is in the state dict."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in vars(module)["_parameters"].items():
            if parameter is not None:
                yield prefix + name, parameter, True
        for name, buffer in vars(module)["_buffers"].items():
            if buffer is not None:
                yield prefix + name, buffer, name not in vars(module)["_non_persistent_buffers_set"]


def _settings(module: nn.Module) -> dict[str, Setting]:
    """Flags, words, numbers and functions that a module keeps as attributes, a ``forward`` of its own among them."""
    found: dict[str, Setting] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name in _WITHOUT_A_SAY or isinstance(value, nn.Module | Tensor | type):
            continue
        if isinstance(value, bool | str | int):
            found[name] = value
        elif isinstance(value, float):
            if "drop" not in name and type(module).__module__ != nn.Dropout.__module__:
                found[name] = value if math.isfinite(value) else str(value)
        elif callable(value):
            found[name] = f"the function {_name_of(value)}"
    return found


def _hooks(module: nn.Module) -> tuple[str, ...]:
    """The hooks that run at each call, by the names of their functions."""
    attributes = vars(module)
    names = [_name_of(hook) for kind in ("_forward_pre_hooks", "_forward_hooks") for hook in attributes[kind].values()]
    return tuple(name for name in names if not name.startswith(_LIBRARIES_WITHOUT_A_SAY))


def _name_of(function: Any) -> str:
    """A function by the name it can be imported by; of an object that can be called, its class."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return class_name(function) if name is None else f"{getattr(function, '__module__', None) or ''}.{name}".lstrip(".")
