"""The options of a race, and the ways that they leave open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import capture
from residual import model, value

from lncompile.lowering import is_folded_statistic
from lncompile.options import OptionError, Options, arms, parse_options, parse_ours
from lncompile.pipeline import prepare
from lncompile.selection.candidates import STOCK, candidates_of, fingerprint


def test_defaults() -> None:
    ours = parse_ours({})
    assert (ours.select, ours.minimum_speedup, ours.selection_file, ours.persistent) == ("model", 1.0, None, "auto")


@pytest.mark.parametrize(
    ("mode", "options", "select"),
    [
        (None, {}, "model"),
        ("reduce-overhead", {}, "model"),
        ("max-autotune", {}, "measure"),
        ("max-autotune", {"lnfold.select": "model"}, "model"),
        ("max-autotune-no-cudagraphs", {}, "model"),
        (None, {"lnfold.select": "measure"}, "measure"),
    ],
)
def test_a_mode_turns_it_on(mode: str | None, options: dict[str, Any], select: str) -> None:
    assert parse_options(mode, options)[0].select == select


def test_arms_keep_what_a_mode_turns_on() -> None:
    """A mode with options becomes the options that it stands for: ours among them."""
    by_backend = arms("max-autotune", {"lnfold.assist": "off"})
    assert by_backend["lnfold"]["options"]["lnfold.select"] == "measure"
    assert not [key for key in by_backend["inductor"]["options"] if key.startswith("lnfold.")]
    chosen = arms("max-autotune", {"lnfold.select": "model"})["lnfold"]["options"]
    assert parse_options(None, chosen)[0].select == "model"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("select", "race", "takes 'model' or 'measure', not 'race'"),
        ("select", True, "takes 'model' or 'measure', not True"),
        ("minimum_speedup", 0, "takes a positive number"),
        ("minimum_speedup", True, "takes a positive number"),
        ("minimum_speedup", float("nan"), "takes a positive number"),
        ("minimum_speedup", "1.02", "takes a positive number"),
        ("selection_file", 3, "takes the name of a file, or None"),
        ("selection_file", "", "takes the name of a file, or None"),
        ("persistent", "on", "takes 'auto' or 'off', not 'on'"),
    ],
)
def test_what_they_do_not_take(name: str, value: object, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_ours({f"lnfold.{name}": value})


def test_ways_differ_from_each_other() -> None:
    found = candidates_of(Options(), {})
    options = [way.options for name, way in found.items() if name != STOCK]
    assert len(set(map(repr, options))) == len(options) == 7
    assert found["sums for one row"].inductor == {"coordinate_descent_tuning": True}
    assert candidates_of(Options(), {"coordinate_descent_tuning": False})["sums for one row"].inductor == {
        "coordinate_descent_tuning": False
    }
    assert found["scales deferred"].changed == {"lnfold.defer": "on", "lnfold.matrix_vector": "off"}


def test_every_option_that_is_set_stays() -> None:
    fixed = Options(absorb_affine="off", defer="off", matrix_vector="off", persistent="off", assist="off")
    assert list(candidates_of(fixed, {})) == ["stock", "model"]


def test_rows_in_registers_are_a_difference_on_a_gpu_alone() -> None:
    captured = capture(model(), value())
    ways = candidates_of(Options(), {})
    prepared = {
        name: prepare(captured.graph_module, captured.example_inputs, ways[name].options)
        for name in ("model", "rows looped over")
    }
    marks = {
        name: sum(map(is_folded_statistic, found.graph_module.graph.nodes))
        for name, found in prepared.items()
        if found.graph_module is not None
    }
    assert marks["model"] > 0
    assert marks["rows looped over"] == 0
    for device, same in (("cpu", True), ("cuda", False)):
        prints = {fingerprint(ways[name], prepared[name], torch.device(device)) for name in prepared}
        assert (len(prints) == 1) is same
