"""``lncompile MODEL``: the answer follows from what was found, in words that fit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from command_factories import HERE as FACTORIES
from command_line import answer as answer_of
from command_line import run
from racing import Lab, in_a_lab
from rich.console import Console
from torch import Tensor, nn

import lncompile
from lncompile.comparisons.answer import Answer, Outcome
from lncompile.comparisons.latency import Latency, compile_candidates
from lncompile.comparisons.processes import RepeatedTimings
from lncompile.comparisons.timing import PairedTimings
from lncompile.models.loading import randomise
from lncompile.reporting.report import FoldReport
from lncompile.reporting.selection import Raced, Selection, options_of_choice
from lncompile.verification import OutputError, Verification

MACHINE = {"device": "a processor", "device_type": "cpu", "threads": 2, "load_average": 0.0}
EXACT = Verification((OutputError(".logits", "float32", 1e-7, 1e-7, 1e-7, True),))
OVERFLOWS = Verification((OutputError(".logits", "float16", 1e-3, 1e-3, 1e-3, True, 2, 2, 32),))
WORSE = Verification((OutputError(".logits", "float32", 1e-7, 1e-7, 1e-2, True),))
HERE = __file__


def make_pre_norm() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8), nn.LayerNorm(8))
    return randomise(model), torch.randn(4, 8)


def make_in_part() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.LayerNorm(16))
    return randomise(model), torch.randn(4, 8)


def make_blocked() -> tuple[nn.Module, Tensor]:
    return randomise(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16))), torch.randn(4, 8)


def make_unrecognised() -> tuple[nn.Module, Tensor]:
    class Centered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            stream = self.linear(x)
            return torch.exp(stream - stream.mean(-1, keepdim=True)) + stream.mean(-1, keepdim=True)

    return randomise(Centered()), torch.randn(4, 8)


def make_by_hand() -> tuple[nn.Module, Tensor]:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            stream = self.linear(x)
            return (stream - stream.mean(-1, keepdim=True)) / stream.std(-1, keepdim=True)

    return randomise(ByHand()), torch.randn(4, 8)


def make_rms() -> tuple[nn.Module, Tensor]:
    return randomise(nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16))), torch.randn(4, 8)


def report_of(make: Any) -> FoldReport:
    model, value = make()
    with torch.no_grad():
        return lncompile.explain(model.eval(), value)


def latency(lnfold: float, no_norms: float | None = None, spread: float = 0.002) -> Latency:
    """Four processes in which candidates take these shares of stock's time, give or take a spread."""
    processes = []
    for sign in (1, -1, 1, -1):
        seconds = {"eager": (1.2,), "inductor": (1.0,), "lnfold": (lnfold * (1 + sign * spread),)}
        if no_norms is not None:
            seconds["no norms"] = (no_norms * (1 + sign * spread),)
        processes.append(PairedTimings(seconds))
    return Latency(RepeatedTimings(tuple(processes)), MACHINE, {} if no_norms else {"no norms": "a reason"})


def make_answer(make: Any, verification: Verification | None = None, measured: Latency | None = None) -> Answer:
    return Answer("a model", "in words", MACHINE, 1000, report_of(make), verification, measured)


@pytest.mark.parametrize(
    ("make", "verification", "measured", "outcome", "says"),
    [
        (make_pre_norm, EXACT, latency(0.95, 0.9), Outcome.USE_IT, "1.053 times as fast"),
        (make_pre_norm, EXACT, latency(0.999, 0.999, 0.01), Outcome.NO_GAIN, "no measurable time"),
        (make_pre_norm, EXACT, latency(0.999, 0.9, 0.01), Outcome.NO_GAIN, "norms take 10.0%"),
        (make_pre_norm, EXACT, latency(1.0), Outcome.NO_GAIN, "no difference from stock"),
        (make_pre_norm, EXACT, latency(1.1, 0.9), Outcome.NO_GAIN, "slower"),
        (make_in_part, EXACT, latency(1.0), Outcome.NO_GAIN, "Only 1 of 2 LayerNorms fold"),
        (make_in_part, EXACT, latency(0.9), Outcome.USE_IT, "times as fast"),
        (make_pre_norm, WORSE, None, Outcome.NOT_POSSIBLE, "predictions would get worse"),
        (make_blocked, None, None, Outcome.NOT_POSSIBLE, "none of the 1 LayerNorms folds (1 non_commuting)"),
        (make_pre_norm, OVERFLOWS, None, Outcome.NOT_POSSIBLE, "with stock torch.compile as well"),
        (make_rms, None, None, Outcome.NOT_POSSIBLE, "1 RMSNorm, which subtract no mean"),
        (make_unrecognised, None, None, Outcome.NOT_POSSIBLE, "A mean is subtracted at test_answer.py"),
    ],
)
def test_the_answer_follows_from_what_was_found(
    make: Any, verification: Any, measured: Any, outcome: Outcome, says: str
) -> None:
    found = make_answer(make, verification, measured)
    assert found.outcome is outcome
    assert found.sentence().lower().startswith(outcome.value)
    assert says in found.sentence()
    assert found.stays_exact == (verification not in (WORSE, OVERFLOWS))
    data = found.to_dict()
    assert data["outcome"] == outcome.value
    assert (data["line"] is not None) == (outcome is Outcome.USE_IT)


def test_what_would_have_to_change() -> None:
    assert make_answer(make_pre_norm, EXACT, latency(0.95, 0.9)).change() is None
    assert "linear layer" in str(make_answer(make_blocked).change())
    assert "linear layer" in str(make_answer(make_in_part, EXACT, latency(0.9)).change())
    assert "--batch" in str(make_answer(make_pre_norm, EXACT, latency(0.999, 0.999, 0.01)).change())
    assert make_answer(make_rms).change() is None


def test_the_share_of_norms() -> None:
    """Without norms a call takes 0.9 of its time: they take a tenth of it."""
    share = make_answer(make_pre_norm, EXACT, latency(0.95, 0.9)).to_dict()["share_of_norms"]
    assert share["estimate"] == pytest.approx(0.1, abs=1e-3)
    assert share["low"] < 0.1 < share["high"]
    assert make_answer(make_pre_norm, EXACT, latency(0.95)).to_dict()["share_of_norms"] is None


@pytest.mark.parametrize("width", [80, 60, 44])
def test_it_fits_and_loses_nothing(width: int) -> None:
    found = make_answer(make_in_part, EXACT, latency(0.95, 0.9))
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(found)
    printed = buffer.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    words = " ".join(printed.split())
    assert found.sentence() in words
    for wanted in ("1 of 2 LayerNorms", "1 non_commuting", "put a linear layer between", "as exact as stock", "memory"):
        assert wanted in words
    assert 'torch.compile(model, backend="lnfold")' in words


def test_the_line_to_write_has_mode_and_options() -> None:
    found = Answer("m", "", MACHINE, 0, FoldReport(()), options={"lnfold.assist": "off", "max_autotune": True})
    assert found.line() == (
        "torch.compile(model, backend=\"lnfold\", options={'lnfold.assist': 'off', 'max_autotune': True})"
    )
    assert 'mode="reduce-overhead"' in Answer("m", "", MACHINE, 0, FoldReport(()), mode="reduce-overhead").line()


# --- The command -----------------------------------------------------------------------------------------------------


def test_one_command_gives_the_answer_of_measured_processes() -> None:
    """End to end: two processes, which compile in opposite orders."""
    found = answer_of(f"{HERE}:make_pre_norm", "--seconds", "0.4", "--processes", "2")
    assert found["outcome"] in ("use it", "no gain")
    assert (found["explain"]["folded"], found["explain"]["total"]) == (2, 2)
    assert found["passed"] is True
    assert found["verify"]["passed"] is True
    assert [list(process) for process in found["bench"]["timing"]["processes"]] == [
        ["eager", "inductor", "lnfold", "no norms"]
    ] * 2
    ratio = found["bench"]["speedup_over_inductor"]["lnfold"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert found["share_of_norms"] is not None


def test_what_does_not_fold_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*arguments: Any, **named: Any) -> Latency:
        raise AssertionError("there is nothing to measure")

    monkeypatch.setattr("lncompile.comparisons.latency.compare_in_processes", measure)
    monkeypatch.setattr("lncompile.cli.ab.send_requests", measure)
    for make, says in (("make_blocked", "none of the 1 LayerNorms"), ("make_rms", "no LayerNorm")):
        result = run(f"{HERE}:{make}")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("Not possible: ")
        assert says in " ".join(result.stdout.split())
        for command in ("bench", "ab"):
            compared = answer_of(command, f"{HERE}:{make}")
            assert compared["measured"] is False
            assert "nothing to compare" in compared["sentence"]


def test_worse_predictions_are_not_timed_and_end_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lncompile.cli.advise.verify", lambda *_, **__: WORSE)
    found = answer_of(f"{HERE}:make_pre_norm", exit_code=1)
    assert found["outcome"] == "not possible"
    assert found["bench"] is None
    assert "WORSE than stock" in run(f"{HERE}:make_pre_norm").stdout


def test_where_something_else_changes_than_folds_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """lnfold.nonfoldable="eager" rewrites a graph in which nothing folds."""
    asked: list[Any] = []

    def measure(*arguments: Any, **named: Any) -> Latency:
        asked.append(named["options"])
        return latency(1.0)

    monkeypatch.setattr("lncompile.comparisons.latency.compare_in_processes", measure)
    found = answer_of("bench", f"{HERE}:make_blocked", "-o", "lnfold.nonfoldable=eager")
    assert found["measured"] is True
    assert answer_of("bench", f"{HERE}:make_blocked", "-o", "lnfold.matrix_vector=on")["measured"] is True
    assert asked == [{"lnfold.nonfoldable": "eager"}, {"lnfold.matrix_vector": "on"}]


def test_a_measurement_on_a_busy_machine_is_not_to_be_relied_on() -> None:
    busy = Latency(latency(1.0).timings, {**MACHINE, "load_average": 1000.0})
    assert "not to be relied on" in busy.sentence()
    assert "not to be relied on" not in latency(1.0).sentence()
    unknown = Latency(latency(1.0).timings, {**MACHINE, "load_average": None})
    assert "not to be relied on" not in unknown.sentence()


def test_a_busy_machine_is_in_the_first_line() -> None:
    busy = Latency(latency(0.95, 0.9).timings, {**MACHINE, "load_average": 1000.0})
    assert "not to be relied on" in make_answer(make_pre_norm, EXACT, busy).sentence()


def test_why_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms by hand cannot be taken out: the reason is that of the backend, not Dynamo's."""
    monkeypatch.setattr("lncompile.comparisons.latency.settle", lambda device: None)
    model, value = make_by_hand()
    with torch.no_grad():
        found = compile_candidates(model.eval(), (value,), {}, ("eager", "no norms"))
        assert "is not a single call of layer_norm" in found.left_out["no norms"]
        assert list(found.calls) == ["eager"]
        function = compile_candidates(torch.relu, (value,), {}, ("eager", "no norms"))
    assert "not a module" in function.left_out["no norms"]


def test_the_latency_table_fits_80_columns() -> None:
    assert max(map(len, str(latency(0.95, 0.9)).splitlines())) <= 80
    assert "no norms: not measured, a reason" in str(latency(0.95))


# --- The fastest way -------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lab:
    return in_a_lab(monkeypatch, tmp_path)


@pytest.fixture
def measured_with(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each measurement, all of which find lnfold faster."""
    found: list[dict[str, Any]] = []

    def compare(*_: Any, options: dict[str, Any], **__: Any) -> Latency:
        found.append(options)
        return latency(0.95, 0.9)

    monkeypatch.setattr("lncompile.comparisons.latency.compare_in_processes", compare)
    monkeypatch.setattr("lncompile.cli.advise.verify", lambda *_, **__: EXACT)
    return found


def test_the_fastest_way_is_what_is_measured_and_written(lab: Lab, measured_with: list[dict[str, Any]]) -> None:
    lab.seconds = {"fold alone": 0.5}
    alone = {"lnfold.absorb_affine": "off", "lnfold.defer": "off", "lnfold.matrix_vector": "off"}
    found = answer_of(f"{FACTORIES}:make_net")
    assert measured_with == [alone]
    assert found["line"] == f'torch.compile(model, backend="lnfold", options={alone!r})'
    assert found["sentence"].startswith("Use it: lnfold with fold alone is 1.053 times as fast")
    assert [race["chosen"] for race in found["races"]] == ["fold alone"]
    torch._dynamo.reset()
    calls = len(lab.calls)
    printed = " ".join(run(f"{FACTORIES}:make_net").stdout.split())
    assert "fold alone 2.000 [2.000, 2.000] (12 rounds)" in printed
    assert "fastest: fold alone" in printed
    assert len(lab.calls) == calls, "what was raced before is known"


@pytest.mark.parametrize("asked", [(), ("-o", "lnfold.select=model")], ids=["stock is the fastest", "no race wanted"])
def test_without_a_faster_way_the_default_is_measured(
    lab: Lab, measured_with: list[dict[str, Any]], asked: tuple[str, ...]
) -> None:
    lab.seconds = {"stock": 0.5}
    found = answer_of(f"{FACTORIES}:make_net", *asked)
    assert measured_with == [{"lnfold.select": "model"} if asked else {}]
    assert [race["chosen"] for race in found["races"]] == ([] if asked else ["stock"])
    assert bool(lab.calls) is not bool(asked)


def test_graphs_may_differ_in_what_is_fastest() -> None:
    ways = [Raced(name, {"lnfold.defer": name}, 1.1, 1.05, 1.15, 12) for name in ("a", "b")]
    races = [Selection(way.name, (way,)) for way in ways]
    assert options_of_choice(races) == {"lnfold.select": "measure"}
    assert options_of_choice(races[:1]) == options_of_choice([*races[:1], Selection("model")]) == {"lnfold.defer": "a"}
    assert options_of_choice([Selection("model")]) is None
    assert options_of_choice([*races[:1], Selection("stock", (ways[0],))]) == {"lnfold.select": "measure"}
    assert options_of_choice([Selection("stock", (ways[0],))]) is None
