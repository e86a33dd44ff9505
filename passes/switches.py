"""The passes that can be switched off, and those that cannot, by name.

A switch is for finding which pass is to blame: outputs stay right with every one of them off, and only what that pass
does is left out. The names are those of :mod:`lncompile.passes.pipeline.order`. This module needs no torch, so that
options can be checked without it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

#: What is left out where a pass is switched off, by its name.
SWITCHES: dict[str, str] = {
    "regions": "calls of compiled regions stay calls, and the norms in them stay LayerNorms",
    "expand": "opaque encoder layers stay closed, and the norms in them stay LayerNorms",
    "gather": "norms that were folded before are compiled as stock compiles them, and not counted",
    "handwritten": "norms written by hand are not looked for, and stay as they are written",
    "obstacles": "the report names the nearest operation in the way, and not all that have to go",
    "center": "nothing is centered, and every norm stays a LayerNorm",
    "absorb": "γ and β stay in the norms, so that of norms with either no scale is deferred",
    "defer": "folded norms scale their rows themselves",
    "matrix_vector": "products of one row stay products",
    "lower": "folded norms stay LayerNorms, of inputs that are centered",
    "eager": "norms that do not fold are Inductor's, whatever lnfold.nonfoldable says",
}

#: Why a pass cannot be switched off, by its name.
NEEDED: dict[str, str] = {
    "writes": "it finds what is written to in place, and without it a tensor would be read before a write and after",
    "facts": "it finds whose values are parameters, and without it nothing could be centered once",
    "sites": "it finds the norms that all other passes are about",
    "gradients": "it finds whether gradients are wanted, and without it trained weights would be taken for frozen ones",
    "streams": "it finds what can be centered and who would notice, and without it nothing could be placed",
    "verdicts": "it writes the report",
    "hoist": "it takes centered weights out of the graph, and without it they would be centered at every call",
}

#: Passes that decide what another one carries out: they are switched off together, under the other's name.
DECIDES_FOR: dict[str, str] = {
    "chains": "handwritten",
    "place": "center",
    "absorptions": "absorb",
    "deferrals": "defer",
    "one_row": "matrix_vector",
    "transpose": "matrix_vector",
}


def read_names(text: str) -> tuple[str, ...]:
    """Read names that stand behind one another with commas between: ``"defer, absorb"``.

    Example:
        >>> read_names("defer, absorb")
        ('defer', 'absorb')
    """
    return tuple(name for part in text.split(",") if (name := part.strip()))


def switched_off(names: Iterable[str]) -> frozenset[str]:
    """Return the passes that do not run where some are switched off: those, and what decides for them.

    Args:
        names: of passes.

    Raises:
        ValueError: for a name that is not a pass, or a pass that cannot be switched off. The message says why.

    Example:
        >>> sorted(switched_off(["defer"]))
        ['defer', 'deferrals']
    """
    off = {DECIDES_FOR.get(name, name) for name in names}
    for name in sorted(off):
        if name in NEEDED:
            raise ValueError(f"pass '{name}' cannot be switched off: {NEEDED[name]}")
        if name not in SWITCHES:
            raise ValueError(
                f"there is no pass '{name}'{_suggest(name, SWITCHES)}; those that can be switched off are "
                f"{', '.join(SWITCHES)}"
            )
    return frozenset(off | {part for part, name in DECIDES_FOR.items() if name in off})


def _suggest(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
