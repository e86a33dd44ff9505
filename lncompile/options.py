"""The backend's options: ours under ``lnfold.``, every other key an Inductor option."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lncompile.lowering import torch_private

PREFIX = "lnfold."


class OptionError(ValueError):
    """An option that does not exist, or a value it does not take. The message says what to write instead."""


@dataclass(frozen=True)
class Options:
    """Options of ours, with their defaults.

    Attributes:
        weights: where centered weights live. ``"copy"``: beside the model, whose own weights stay untouched.
        nonfoldable: what runs at a site that does not fold. ``"inductor"``: its own layer_norm, as stock torch.compile
            compiles it; ``"eager"``: ATen's eager LayerNorm kernel.
        assist: whether an activation may be centered at run time where that lets more norms fold than it costs.
        training: what happens to norms where gradients of weights are wanted. ``"auto"``: they fold where centering the
            weights at every step costs less than it saves; ``"on"``: wherever they can; ``"off"``: not at all.
        check: whether every call looks if a weight has changed. Without, centered weights are those of the first call
            with a set of parameters, until :func:`lncompile.refresh`: for servers whose weights stay as they are.
        absorb_affine: whether γ and β of a folded norm go into the linear layers that read it. ``"auto"``: where those
            weights are copied anyway and a call moves fewer bytes; ``True``: wherever it can be done, at a copy of each
            such weight; ``False``: nowhere.
        defer: whether the scale of a folded norm moves behind the products that read it, so that the normalised tensor
            is never written. ``"auto"``: where no kernel is added and a call saves more traffic than the absorbing
            weights hold; ``"on"``: wherever no kernel is added; ``"off"``: nowhere.
    """

    weights: str = "copy"
    nonfoldable: str = "inductor"
    assist: bool = True
    training: str = "auto"
    check: bool = True
    absorb_affine: bool | str = "auto"
    defer: str = "off"


_VALUES: dict[str, tuple[Any, ...]] = {
    "weights": ("copy",),
    "nonfoldable": ("inductor", "eager"),
    "assist": (True, False),
    "training": ("auto", "on", "off"),
    "check": (True, False),
    "absorb_affine": ("auto", True, False),
    "defer": ("auto", "on", "off"),
}


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Split what ``torch.compile(mode=, options=)`` was given into our options and Inductor's configuration.

    Args:
        mode: a mode of torch.compile, or None.
        options: option names and values, or None.

    Returns:
        Our options, and Inductor's config patches with the mode resolved as ``backend="inductor"`` resolves it.

    Raises:
        OptionError: for an unknown option, a value it does not take, or an unknown mode.

    Example:
        >>> parse_options(None, {"lnfold.nonfoldable": "eager", "max_autotune": True})[0].nonfoldable
        'eager'
    """
    ours: dict[str, Any] = {}
    inductors: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key.startswith(PREFIX):
            name = key.removeprefix(PREFIX)
            if name not in _VALUES:
                raise OptionError(f"unknown option '{key}'{_suggest(key)}; lnfold's options are {_ours()}")
            if not any(value is allowed or (isinstance(value, str) and value == allowed) for allowed in _VALUES[name]):
                allowed = " or ".join(repr(v) for v in _VALUES[name])
                raise OptionError(f"option '{key}' takes {allowed}, not {value!r}")
            ours[name] = value
        else:
            inductors[key] = value
    known = torch_private.inductor_option_names()
    for key in inductors:
        if key.replace("-", "_") not in known:
            raise OptionError(
                f"unknown option '{key}'{_suggest(key)}: neither an Inductor option nor one of lnfold's ({_ours()})"
            )
    try:
        return Options(**ours), torch_private.inductor_config(mode, inductors)
    except RuntimeError as error:
        # An Inductor option of the wrong type, or an unknown mode: torch's sentence says which.
        raise OptionError(str(error)) from None


def _ours() -> str:
    return ", ".join(f"{PREFIX}{name}" for name in _VALUES)


def _suggest(key: str) -> str:
    known = [*torch_private.inductor_option_names(), *(f"{PREFIX}{name}" for name in _VALUES)]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return f" (did you mean '{close[0]}'?)" if close else ""
