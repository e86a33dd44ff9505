"""Who runs a workload: stock Inductor, lnfold, the limit, eager, and peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lncompile.comparisons.even_terms import compile_apart
from lncompile.comparisons.no_norm import no_norm, with_small_weights
from lncompile.options import arms
from suite import peers

BASELINE, CANDIDATE, LIMIT, EAGER = "inductor", "lnfold", "no norm", "eager"


@dataclass(frozen=True)
class Recipe:
    """One way to run a model.

    Attributes:
        name: in tables and results.
        description: what it is.
        make: takes the model and a mode of torch.compile, and returns what is called.
        predicts: whether it computes what the model computes.
        compiles: whether torch.compile has a part in it.
    """

    name: str
    description: str
    make: Callable[[nn.Module, str | None], Callable[..., Any]]
    predicts: bool = True
    compiles: bool = True


#: The order in which they are compiled.
RECIPES = (
    Recipe(EAGER, "the model as it is", lambda model, mode: model, compiles=False),
    Recipe(BASELINE, "torch.compile(model)", lambda model, mode: compile_apart(model, backend=BASELINE, mode=mode)),
    Recipe(
        CANDIDATE,
        "torch.compile(model, backend='lnfold')",
        lambda model, mode: compile_apart(model, backend="lnfold", mode=mode),
    ),
    Recipe(
        LIMIT,
        "the same graph with every norm replaced by the identity, on weights that keep its stream bounded",
        lambda model, mode: compile_apart(with_small_weights(model), backend=no_norm(mode)),
        predicts=False,
    ),
)

#: Where the choice is to be seen beside what lnfold does by itself.
MEASURED = Recipe(
    "lnfold, measured",
    "lnfold with lnfold.select='measure'",
    lambda model, mode: compile_apart(model, backend="lnfold", **arms(mode, {"lnfold.select": "measure"})["lnfold"]),
)


def _lnfold_with(name: str, options: Mapping[str, str]) -> Recipe:
    chosen = {"lnfold.select": "model", **options}
    return Recipe(
        f"lnfold, {name}",
        "lnfold with " + " ".join(f"{option}={value}" for option, value in options.items()),
        lambda model, mode: compile_apart(model, backend="lnfold", **arms(mode, chosen)["lnfold"]),
    )


_FOLD_ALONE = _lnfold_with("fold alone", {"lnfold.defer": "off", "lnfold.matrix_vector": "off"})
_DEFERRED = _lnfold_with("scales deferred", {"lnfold.defer": "on", "lnfold.matrix_vector": "off"})
_SUMS = _lnfold_with("products as sums", {"lnfold.matrix_vector": "on"})

#: For steps of decoding on a GPU: each lever by itself, to see whether it should be on without being asked for.
FOR_ONE_ROW = (_FOLD_ALONE, _DEFERRED, _SUMS)
#: The same on a CPU, where products of one row are sums without being asked for, if their weights need no copy for it.
FOR_ONE_ROW_ON_A_CPU = (_FOLD_ALONE, _SUMS)

#: Peers, where a workload asks for them.
PEERS = (
    Recipe(
        "torch rms_norm",
        "lnfold's weights, with nn.RMSNorm's function and β",
        lambda model, mode: compile_apart(model, backend=peers.folded_with(peers.torch_rms_norm, mode)),
    ),
    Recipe(
        "liger layer_norm",
        "Liger's LayerNorm kernel for every norm",
        lambda model, mode: compile_apart(model, backend=peers.liger_layer_norm(mode)),
    ),
    Recipe(
        "liger rms_norm",
        "lnfold's weights, with Liger's RMSNorm kernel and β",
        lambda model, mode: compile_apart(model, backend=peers.liger_rms_norm(mode)),
    ),
    Recipe(
        "pre-RMSNorm by hand",
        "stock torch.compile on a copy of GPT-2 rewritten by hand (arXiv:2305.14858)",
        lambda model, mode: compile_apart(peers.pre_rms_norm_by_hand(model), backend=BASELINE, mode=mode),
    ),
)

#: Every candidate that there is, by name.
ALL_RECIPES = {recipe.name: recipe for recipe in (*RECIPES, MEASURED, *FOR_ONE_ROW, *PEERS)}
