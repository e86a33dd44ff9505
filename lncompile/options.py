"""The backend's options: ours under ``lnfold.``, every other key an Inductor option.

torch is imported where it is asked for Inductor's, so that ours can be checked without it.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lncompile.passes import switches

PREFIX = "lnfold."
#: Passes that are switched off in this process, beside those of ``lnfold.disable_passes``: names with commas between.
DISABLED_BY_ENVIRONMENT = "LNCOMPILE_DISABLE_PASSES"


class OptionError(ValueError):
    """An option that does not exist, or a value it does not take. The message says what to write instead."""


@dataclass(frozen=True)
class Options:
    """Options of ours, with their defaults.

    Attributes:
        nonfoldable: what runs at a site that does not fold. ``"inductor"``: its own layer_norm, as stock torch.compile
            compiles it; ``"eager"``: ATen's eager LayerNorm kernel.
        assist: whether an activation may be centered at run time. ``"auto"``: where that lets more norms fold than it
            costs; ``"off"``: nowhere.
        training: what happens to norms where gradients of weights are wanted. ``"auto"``: they fold where centering the
            weights at every step costs less than it saves; ``"on"``: wherever they can; ``"off"``: not at all.
        memory_budget: how much memory the centered copies of weights may take beside the model, for each compiled
            graph. An int: bytes; a float from 0 to 1: a share of the bytes of the graph's own parameters; None: no
            limit. Placement then saves what it can with copies that fit, see :mod:`lncompile.passes.placement.budget`.
        check: how every call looks whether a weight has changed. ``"values"``: by identity, version and place, and by
            a few elements of each weight, which show the writes that torch does not count
            (:mod:`lncompile.runtime.weight_samples`); ``"versions"``: by identity and version alone, and a write that
            torch does not count needs :func:`lncompile.refresh`; ``"off"``: not at all, centered weights are those of
            the first call with a set of parameters until :func:`lncompile.refresh`.
        absorb_affine: whether γ and β of a folded norm go into the linear layers that read it. ``"auto"``: where those
            weights are copied anyway (so without a budget) and a call moves fewer bytes;
            ``"on"``: wherever it can be done, at a copy of each such weight; ``"off"``: nowhere.
        defer: whether the scale of a folded norm moves behind the products that read it, so that the normalised tensor
            is never written. ``"auto"``: where no kernel is added and a call saves more traffic than the absorbing
            weights hold, on a CPU only in bfloat16, and only where weights are copied anyway (see ``absorb_affine``);
            ``"on"``: wherever no kernel is added; ``"off"``: nowhere.
        matrix_vector: whether products of one row (decoding at batch 1) become sums that Inductor generates, with what
            follows them, and on a GPU the norm in front of them, in one kernel
            (:mod:`lncompile.passes.rewrites.matrix_vector`). ``"auto"``: with weights that need no copy for it, on a
            CPU with AVX-512 in 32 and 16 bits, unless Inductor packs weights or tunes products (``freezing``,
            ``max_autotune``), and on a GPU where its ``coordinate_descent_tuning`` is on (mode ``"max-autotune"``);
            ``"on"``: wherever it can be done, with that tuning turned on unless the options say something else;
            ``"off"``: nowhere.
        persistent: whether rows of folded norms that Inductor would loop over are held in registers
            (:mod:`lncompile.lowering.persistent`), on a GPU. ``"auto"``: where they fit; ``"off"``: Inductor's choice.
        select: who chooses between the ways to compile a graph that our options leave open. ``"model"``: the model of
            costs; ``"measure"``: a race of these ways, stock among them, when the graph is compiled
            (:mod:`lncompile.selection`), the default with ``mode="max-autotune"``.
        minimum_speedup: another way than stock wins that race only if the lower end of its interval, as many times as
            fast as stock, is above this.
        selection_file: a file with results of races, as ``lncompile tune --output`` writes it; None for none. A graph
            that is in it is not raced. The environment variable ``LNCOMPILE_SELECTION_FILE`` names another.
        disable_passes: passes that are switched off, by their names (:mod:`lncompile.passes.switches`), to find out
            which one is to blame for something: a tuple of names, or a string of them with commas between. Outputs stay
            right. Those that the environment variable ``LNCOMPILE_DISABLE_PASSES`` names are switched off as well.
    """

    nonfoldable: str = "inductor"
    assist: str = "auto"
    training: str = "auto"
    memory_budget: int | float | None = None
    check: str = "values"
    absorb_affine: str = "auto"
    defer: str = "auto"
    matrix_vector: str = "auto"
    persistent: str = "auto"
    select: str = "model"
    minimum_speedup: float = 1.0
    selection_file: str | None = None
    disable_passes: tuple[str, ...] = ()

    @property
    def switched_off(self) -> frozenset[str]:
        """The passes that do not run: those that are switched off, and what decides for them."""
        return switches.switched_off(self.disable_passes)

    def __post_init__(self) -> None:
        for name, takes in _VALUES.items():
            value = getattr(self, name)
            if not _takes(name, value):
                allowed = takes if isinstance(takes, str) else " or ".join(repr(v) for v in takes)
                raise OptionError(f"option '{PREFIX}{name}' takes {allowed}, not {value!r}{_spelled_now(takes, value)}")


# What each option takes, or, for one that takes more than can be listed, in words.
_VALUES: dict[str, tuple[Any, ...] | str] = {
    "nonfoldable": ("inductor", "eager"),
    "assist": ("auto", "off"),
    "training": ("auto", "on", "off"),
    "memory_budget": "a number of bytes (an int), a share of the parameters' bytes (a float from 0.0 to 1.0), or None",
    "check": ("values", "versions", "off"),
    "absorb_affine": ("auto", "on", "off"),
    "defer": ("auto", "on", "off"),
    "matrix_vector": ("auto", "on", "off"),
    "persistent": ("auto", "off"),
    "select": ("model", "measure"),
    "minimum_speedup": "a positive number, such as 1.0 or 1.02",
    "selection_file": "the name of a file, or None",
    "disable_passes": "names of passes, in a tuple or in a string with commas between",
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
    from lncompile.lowering import torch_private_inductor

    ours = parse_ours(with_selection_of(mode, options))
    inductors = {key: value for key, value in (options or {}).items() if not key.startswith(PREFIX)}
    known = torch_private_inductor.inductor_option_names()
    for key in inductors:
        if key.replace("-", "_") not in known:
            raise OptionError(
                f"unknown option '{key}'{_suggest(key, known)}: neither an Inductor option nor one of lnfold's "
                f"({_ours()})"
            )
    if ours.matrix_vector == "on":
        inductors.setdefault("coordinate_descent_tuning", True)
    try:
        return ours, torch_private_inductor.inductor_config(mode, inductors)
    except RuntimeError as error:
        # An Inductor option of the wrong type, or an unknown mode: torch's sentence says which.
        raise OptionError(str(error)) from None


def with_selection_of(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options with what a mode stands for among ours: ``"max-autotune"`` races, unless they say otherwise.

    Args:
        mode: a mode of torch.compile, or None.
        options: option names and values, or None.

    Example:
        >>> with_selection_of("max-autotune", {})
        {'lnfold.select': 'measure'}
    """
    chosen = dict(options or {})
    if mode == "max-autotune":
        chosen.setdefault(f"{PREFIX}select", "measure")
    return chosen


def parse_ours(options: Mapping[str, Any] | None) -> Options:
    """Read our options among others. Needs no torch.

    Args:
        options: option names and values, or None.

    Raises:
        OptionError: for an unknown option of ours, or a value it does not take.

    Example:
        >>> parse_ours({"lnfold.assist": "off", "max_autotune": True}).assist
        'off'
    """
    ours: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if not key.startswith(PREFIX):
            continue
        name = key.removeprefix(PREFIX)
        if name not in _VALUES:
            raise OptionError(f"unknown option '{key}'{_suggest(key)}; lnfold's options are {_ours()}")
        ours[name] = value
    named = _names(ours.pop("disable_passes", ()))
    by_environment = _names(os.environ.get(DISABLED_BY_ENVIRONMENT, ""))
    _check_passes(f"option '{PREFIX}disable_passes'", named)
    _check_passes(f"the environment variable {DISABLED_BY_ENVIRONMENT}", by_environment)
    return Options(**ours, disable_passes=tuple(dict.fromkeys((*named, *by_environment))))


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return switches.read_names(value)
    if not isinstance(value, tuple | list) or not all(isinstance(name, str) for name in value):
        raise OptionError(f"option '{PREFIX}disable_passes' takes {_VALUES['disable_passes']}, not {value!r}")
    return tuple(value)


def _check_passes(where: str, names: tuple[str, ...]) -> None:
    try:
        switches.switched_off(names)
    except ValueError as error:
        raise OptionError(f"{where}: {error}") from None


def arms(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return what to give ``torch.compile`` so that lnfold and stock Inductor do the same, our own options apart.

    ``torch.compile`` takes a mode or options; with both, the mode becomes the options that it stands for.

    Args:
        mode: a mode of torch.compile, or None.
        options: option names and values, or None.

    Returns:
        Keyword arguments by backend, ``"inductor"`` first.

    Example:
        >>> arms(None, {"lnfold.assist": "off", "max_autotune": True})["inductor"]
        {'options': {'max_autotune': True}}
    """
    patches = dict(options or {})
    if mode is not None and patches:
        from lncompile.lowering import torch_private_inductor

        ours = with_selection_of(mode, patches)
        patches, mode = {**torch_private_inductor.inductor_config(mode, {}), **ours}, None
    stock = {key: value for key, value in patches.items() if not key.startswith(PREFIX)}
    by_backend = {"inductor": stock, "lnfold": patches}
    return {
        backend: {"mode": mode} if mode is not None else {"options": chosen} if chosen else {}
        for backend, chosen in by_backend.items()
    }


def _takes(name: str, value: Any) -> bool:
    values = _VALUES[name]
    if name == "disable_passes":
        return isinstance(value, str) or (
            isinstance(value, Collection) and all(isinstance(part, str) for part in value)
        )
    if name == "selection_file":
        return value is None or (isinstance(value, str) and bool(value))
    if name == "minimum_speedup":
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    if isinstance(values, str):
        is_amount = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return value is None or is_amount or (isinstance(value, float) and 0 <= value <= 1)
    return any(value is allowed or (isinstance(value, str) and value == allowed) for allowed in values)


def _spelled_now(takes: tuple[Any, ...] | str, value: Any) -> str:
    """What to write instead of True or False, which switched some options on and off before they had names."""
    if not isinstance(value, bool) or "off" not in takes:
        return ""
    now = "off" if not value else "on" if "on" in takes else takes[0]
    return f": write '{now}'"


def _ours() -> str:
    return ", ".join(f"{PREFIX}{name}" for name in _VALUES)


def _suggest(key: str, inductors: Collection[str] = ()) -> str:
    close = difflib.get_close_matches(key, [*inductors, *(f"{PREFIX}{name}" for name in _VALUES)], n=1, cutoff=0.75)
    return f" (did you mean '{close[0]}'?)" if close else ""
