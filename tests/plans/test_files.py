"""Plans that were written by hand: what is wrong in them is said, whatever it is."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plan_models import IDS, QueriesAndKeysNormed, Residual, Tied, randomised, value

import lncompile

Change = Callable[[dict[str, Any]], Any]


def values_of(absorb: str | None = "affine") -> dict[str, Any]:
    return lncompile.plan(randomised(Tied()), IDS, untie=True, absorb=absorb).to_dict()


def put(path: str, new: Any) -> Change:
    """Put something in the place of what a path of keys leads to."""

    def change(values: dict[str, Any]) -> None:
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in keys:
            values = values[key]
        values[last] = new

    return change


def again(path: str) -> Change:
    """Say an entry twice."""
    return lambda values: values[path].append(copy.deepcopy(values[path][0]))


WRONG: dict[str, tuple[Change, str]] = {
    "name": (put("center/0/name", "gone"), "'gone' speaks of 'gone', which its model does not have"),
    "another name": (put("center/0/also", ["gone"]), "speaks of 'gone'"),
    "scale": (put("center/0/scaled_by", ["gone"]), "speaks of 'gone'"),
    "twice": (again("center"), "is to be changed 2 times"),
    "along nothing": (put("center/0/centerings", []), "along nothing"),
    "negative sizes": (put("center/0/centerings/0/view", [-1, 16]), "is not a centering"),
    "no sizes": (put("center/0/centerings/0/view", []), "is not a centering"),
    "shape of another": (put("form/tensors/branch.weight", [16, 17]), "has shape"),
    "epsilon is not a number": (put("replace/0/eps", float("nan")), "the ε of 'norm' is nan"),
    "epsilon is negative": (put("replace/0/eps", -1e-5), "the ε of 'norm' is -1e-05"),
    "epsilon is infinite": (put("replace/0/eps", float("inf")), "the ε of 'norm' is inf"),
    "norm": (put("replace/0/path", "gone"), "does not have a module 'gone'"),
    "norm twice": (again("replace"), "is to be replaced 2 times"),
    "normalised": (put("replace/0/normalized_shape", [0]), "normalises"),
    "γ of another size": (put("replace/0/normalized_shape", [8]), r"'norm\.weight' has shape \[16\]"),
    "look-up": (put("lookups/0/path", "gone"), "does not have a module 'gone'"),
    "table": (put("lookups/0/table", "gone"), "speaks of 'gone'"),
    "table of another shape": (put("lookups/0/shape", [48]), "has shape"),
    "absorbing layer": (put("absorb/0/layers/0/path", "gone"), "does not have a module 'gone'"),
    "absorbing weight": (put("absorb/0/layers/0/weight", "gone"), "speaks of 'gone'"),
    "along another dimension": (put("absorb/0/layers/0/dimension", 0), "cannot absorb 'final' along dimension 0"),
    "along no dimension": (put("absorb/0/layers/0/dimension", 7), "cannot absorb 'final' along dimension 7"),
    "γ": (put("absorb/0/weight", "branch.weight"), "is not γ of 'final'"),
    "absorbed": (put("absorb/0/path", "branch"), "does not become an RMSNorm"),
    "no bias": (put("absorb/0/layers/0/bias", None), "needs a bias in"),
    "a bias that is there": (put("absorb/0/layers/0/bias", "branch.bias"), "is there already"),
    "outcome": (put("norms/0/becomes", "batch_norm"), "becomes 'batch_norm'"),
    "tie": (put("form/tied/0", ["gone", "table.weight"]), "speaks of 'gone'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_contradicts_itself_is_refused(what: str, tmp_path: Path) -> None:
    change, says = WRONG[what]
    values = values_of()
    assert lncompile.FoldPlan.from_dict(copy.deepcopy(values)), "the control"
    change(values)
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(lncompile.PlanError, match=says):
        lncompile.FoldPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(("rows", "overlap"), [([[0], [0]], True), ([[0, 1], [1, 2]], True), ([[0], [1]], False)])
def test_centerings_of_one_parameter_share_no_element(rows: list[list[int]], overlap: bool) -> None:
    values = lncompile.plan(randomised(QueriesAndKeysNormed()), value(2, 5)).to_dict()
    parts = [{"view": [3, 2, 8], "axes": [2], "rows": {"0": part}} for part in rows]
    values["center"][1]["centerings"] = parts
    if overlap:
        with pytest.raises(lncompile.PlanError, match=r"centerings of 'qkv\.bias' share elements"):
            lncompile.FoldPlan.from_dict(values)
    else:
        assert lncompile.FoldPlan.from_dict(values)
    other = {"view": [48], "axes": [0], "rows": {"0": list(range(40, 48))}}  # seen in another shape
    values["center"][1]["centerings"] = [parts[0], other]
    assert lncompile.FoldPlan.from_dict(values)
    other["rows"] = {"0": list(range(15, 48))}
    with pytest.raises(lncompile.PlanError, match=r"share elements"):
        lncompile.FoldPlan.from_dict(values)


JUNK = (None, True, -1, 0, 3, 1e300, float("nan"), "", "gone", [], {}, [[]], [None], {"a": 1}, [10**30], ["gone"])


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_written_is_read_or_refused(seed: int) -> None:
    """Values, entries and keys exchanged at random: never another error, and what is read can be printed and tried."""
    draw = random.Random(seed)
    model = randomised(Tied())
    for base in (values_of(), lncompile.plan(randomised(Residual()), IDS).to_dict()):
        for _ in range(12):
            values = copy.deepcopy(base)
            for _ in range(draw.randint(1, 2)):
                _spoil(values, draw)
            try:
                plan = lncompile.FoldPlan.from_dict(json.loads(json.dumps(values)))
                str(plan)
                plan.apply(copy.deepcopy(model))
            except lncompile.PlanError:
                continue


def _spoil(values: Any, draw: random.Random) -> None:
    while True:
        keys = list(values) if isinstance(values, dict) else list(range(len(values)))
        key = draw.choice(keys)
        inner = values[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.85:
            values = inner
            continue
        if isinstance(values, dict) and draw.random() < 0.2:
            del values[key]
        else:
            values[key] = copy.deepcopy(draw.choice(JUNK))
        return
