"""The latency suite, on tiny models: that it measures what it says, and that no timing decides anything here.

Inductor's part is left out where it shows nothing (``without_inductor``): what a candidate computes is its graph's
property, and a C++ compiler takes longer than everything else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import equal_programs
import latency
import pytest
import torch
from latency_suite import QUICK, tiny, without_norms
from suite import measurement, peers, repeated, workloads
from suite.candidates import ALL_RECIPES, BASELINE, CANDIDATE, EAGER, LIMIT, PEERS, RECIPES, Recipe
from suite.decoding import decode_step
from suite.measurement import Settings, WrongAnswer, measure_workload
from suite.presentation import draw, summarise_run
from suite.repeated import combine
from suite.suites import SUITES

from lncompile.comparisons.machine import describe_machine
from lncompile.comparisons.processes import RepeatedTimings
from lncompile.comparisons.timing import PairedTimings
from lncompile.lowering.inspect import torch_private_codegen


@pytest.fixture
def recipes(without_inductor: None) -> tuple[Recipe, ...]:
    """The four of every workload, none of which calls Inductor."""
    stock = next(recipe for recipe in RECIPES if recipe.name == BASELINE)
    eager = dataclasses.replace(stock, make=lambda model, mode: torch.compile(model, backend="eager"))
    return tuple(eager if recipe is stock else recipe for recipe in RECIPES)


# --- Measurement -----------------------------------------------------------------------------------------------------


def test_a_workload_is_measured_with_every_candidate_that_can_run(recipes: tuple[Recipe, ...]) -> None:
    def fail(graph_module, example_inputs):
        raise peers.Unavailable("there is none here")

    absent = Recipe("absent", "", lambda model, mode: torch.compile(model, backend=fail))
    wrong = Recipe("wrong", "", lambda model, mode: without_norms(model), compiles=False)
    found = measure_workload(tiny("gpt2-medium decode 1x256", "gpu"), (*recipes, absent, wrong), QUICK)
    assert found["mode"] == "reduce-overhead"
    assert list(found["candidates"]) == [EAGER, BASELINE, CANDIDATE, LIMIT]
    assert found["rounds"] >= 5
    lnfold = found["candidates"][CANDIDATE]
    assert (lnfold["sites"], lnfold["folded"], lnfold["centerings"]) == (5, 5, 0)
    assert lnfold["extra_weight_bytes"] > 0
    assert 0 < lnfold["error"] < 1e-5
    assert math.isfinite(found["candidates"][LIMIT]["largest_answer"])
    assert lnfold["graphs"] == 0, "nothing reached Inductor here"
    assert list(map(len, lnfold["samples_s"])) == [found["rounds"]]
    assert found["speedup_over_inductor"].keys() == {EAGER, CANDIDATE, LIMIT}
    assert found["share_of_norm_cost_removed"].keys() == {CANDIDATE}
    assert found["left_out"].keys() == {"absent", "wrong"}
    assert found["left_out"]["absent"] == "there is none here"
    assert found["left_out"]["wrong"].startswith("its error is")
    json.dumps(found)


def test_a_step_of_a_decoder_reads_what_its_encoder_heard_from_the_cache(recipes: tuple[Recipe, ...]) -> None:
    workload = tiny("whisper-small decoder decode 1x224", "decoding")
    found = measure_workload(workload, recipes, QUICK)
    lnfold = found["candidates"][CANDIDATE]
    assert (lnfold["sites"], lnfold["folded"]) == (7, 7), "three a layer and the last; the encoder does not run"
    assert 0 < lnfold["error"] < 1e-5
    model = workload.build("cpu")
    with torch.no_grad():
        arguments, rewind = decode_step(workload, model, "cpu")
        expected = model(**arguments)[0]
        rewind()
        assert torch.equal(model(**arguments)[0], expected), "the same step again"
        rewind()
        (cache,) = (value for name, value in arguments.items() if name in ("cache", "past_key_values"))
        for held in cache.cross_attention_cache.layers:
            held.values.zero_()
        assert not torch.allclose(model(**arguments)[0], expected, atol=1e-3), "the control"


def test_the_speed_of_wrong_answers_is_not_measured(monkeypatch) -> None:
    stock = Recipe(BASELINE, "", lambda model, mode: model, compiles=False)
    wrong = Recipe(CANDIDATE, "", lambda model, mode: without_norms(model), compiles=False)
    monkeypatch.setattr(measurement, "_folding", lambda compiled: {})
    with pytest.raises(WrongAnswer, match="lnfold: its error is"):
        measure_workload(tiny("gpt2 prefill 1x128"), (stock, wrong), QUICK)


def test_what_is_written_is_computed_from_the_rounds() -> None:
    timings = PairedTimings(
        {
            BASELINE: tuple(1.0 + 0.001 * i for i in range(20)),
            CANDIDATE: tuple(0.97 + 0.001 * i for i in range(20)),
            LIMIT: tuple(0.96 + 0.001 * i for i in range(20)),
        }
    )
    facts = {BASELINE: {"first_call_s": 10.0}, CANDIDATE: {"first_call_s": 10.4}, LIMIT: {"first_call_s": 9.0}}
    found = measurement.summarise(RepeatedTimings((timings,)), facts)
    assert found["share_of_norm_cost_removed"][CANDIDATE]["median"] == pytest.approx(0.75)
    assert found["speedup_over_inductor"][LIMIT]["median"] == pytest.approx(1.0095 / 0.9695, rel=1e-3)
    assert found["compile_time_over_inductor"][CANDIDATE] == pytest.approx(1.04)
    assert found["candidates"][BASELINE]["seconds"]["median"] == pytest.approx(1.0095)


def test_processes_are_put_together() -> None:
    """Each process ran the candidates in another order; what one left out is left out."""

    def result(scale: float, *names: str) -> dict:
        timings = RepeatedTimings((PairedTimings(dict.fromkeys(names, (scale, scale * 1.01))),))
        facts = {name: {"first_call_s": scale} for name in names}
        left = {} if LIMIT in names else {LIMIT: "a reason"}
        return {"name": "w", **measurement.summarise(timings, facts), "left_out": left, "load_average_after": scale}

    found = combine([result(1.0, BASELINE, CANDIDATE, LIMIT), result(2.0, CANDIDATE, BASELINE)])
    assert found["processes"] == 2
    assert list(found["candidates"]) == [BASELINE, CANDIDATE]
    assert found["candidates"][CANDIDATE]["samples_s"] == [[1.0, 1.01], [2.0, 2.02]]
    assert found["candidates"][CANDIDATE]["first_call_s"] == 1.0
    assert found["speedup_over_inductor"][CANDIDATE]["median"] == pytest.approx(1.0)
    assert found["left_out"] == {LIMIT: "a reason"}
    assert found["load_average_after"] == 2.0


def test_a_workload_is_measured_in_processes(monkeypatch) -> None:
    """The task that a process gets names what it needs; the first process alone has empty caches."""
    (workload,) = (w for w in SUITES["cpu"] if w.name == "gpt2 prefill 1x128")
    recipes = [ALL_RECIPES[name] for name in (BASELINE, CANDIDATE)]
    asked: list[dict] = []

    def run(script, tasks, progress):
        asked.extend(json.loads(json.dumps(task)) for task in tasks)
        return [result_of(workload) | {"load_average_after": 0.0} for _ in tasks]

    monkeypatch.setattr(repeated, "run_processes", run)
    found = repeated.measure_in_processes("script", "cpu", workload.capped(2), recipes, Settings(seconds=8.0), 4)
    assert found["processes"] == 4
    assert [task["recipes"] for task in asked] == [[BASELINE, CANDIDATE], [CANDIDATE, BASELINE]] * 2
    assert [task["settings"]["empty_caches"] for task in asked] == [True, False, False, False]
    assert {task["settings"]["seconds"] for task in asked} == {2.0}
    measured: list = []
    monkeypatch.setattr(repeated, "measure_workload", lambda *task: measured.append(task) or {})
    threads = torch.get_num_threads()
    repeated.carry_out({**asked[1], "threads": threads})
    ((ran, ran_recipes, settings),) = measured
    assert (ran.name, ran.depth) == (workload.name, 2)
    assert [recipe.name for recipe in ran_recipes] == [CANDIDATE, BASELINE]
    assert settings == Settings(seconds=2.0, empty_caches=False)


def test_equal_programs_are_compared_and_counted(monkeypatch) -> None:
    """That the benchmark counts what it says; how often there is a winner is the benchmark's own result."""
    monkeypatch.setattr(equal_programs, "SIZES", {"tiny": (8, 2)})
    monkeypatch.setattr(equal_programs, "SECONDS", {"tiny": 0.05})
    with torch.no_grad():
        tests = [
            equal_programs.compare("tiny", pair, order)
            for pair in equal_programs.PAIRS
            for order in equal_programs.ORDERS
        ]
        tests.append(equal_programs.compare("tiny", equal_programs.BY_ITSELF, equal_programs.AS_REQUESTED))
    assert all(test["rounds"] >= 15 and test["median_s"] > 0 for test in tests)
    undecided = [{**test, "abtest": {**test["abtest"], "winner_at_any_look": None}} for test in tests]
    decided = {**tests[0], "abtest": {**tests[0]["abtest"], "winner_at_any_look": "candidate"}}
    found = equal_programs.summarise([[decided, *undecided[1:]], undecided])
    assert (found["tests"], found["abtest_winners"]) == (10, 1)
    first, *_, last = found["kinds"]
    assert (last["pair"], last["tests"], len(last["speedup_over_processes_by_order"])) == ("ABTest(model)", 2, 1)
    assert (first["size"], first["pair"], first["tests"], first["abtest_winners"]) == ("tiny", "stock, stock", 4, 1)
    json.dumps(found)


def test_a_run_is_summed_up_also_where_norms_cost_something() -> None:
    def workload(task: str, speedup: float, limit: float) -> dict[str, Any]:
        speedups = {CANDIDATE: {"median": speedup}, LIMIT: {"median": limit}}
        return {"task": task, "speedup_over_inductor": speedups}

    found = summarise_run(
        [
            workload("encode", 1.0, 1.02),
            workload("encode", 1.25, 2.0),
            workload("encode", 0.8, 1.25),
            workload("decode", 1.01, 1.04),
            {"task": "prefill", "speedup_over_inductor": {CANDIDATE: {"median": 1.1}}},
        ]
    )
    assert found["encode"]["workloads"] == 3
    assert found["encode"]["geometric_mean"] == pytest.approx(1.0)
    assert found["encode"]["least"] == 0.8
    costly = found["encode"]["where_norms_cost_something"]
    assert (costly["workloads"], costly["least"]) == (2, 0.8)
    assert costly["geometric_mean"] == pytest.approx(1.0)
    assert costly["limit"] == pytest.approx(2.5**0.5)
    assert costly["share_removed"] == pytest.approx((0.2 - 0.25) / (0.5 + 0.2))
    assert "where_norms_cost_something" not in found["decode"] | found["prefill"]


def test_what_decides_where_memory_lies_is_said(monkeypatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")
    assert describe_machine()["memory"]["allocator"]
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    memory = describe_machine()["memory"]
    assert memory["allocator"] == "/usr/lib/libjemalloc.so"
    assert memory["huge_pages_asked_for"] == "1"


def test_a_tree_without_its_history_is_measured_all_the_same(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency.recording, "__file__", str(tmp_path / "recording.py"))
    assert latency.recording.commit() == "unknown: a tree without its history"
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    assert latency.recording.commit() == "abc"


# --- The command -----------------------------------------------------------------------------------------------------


def test_the_command_runs_one_tiny_workload(recipes, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    monkeypatch.setattr(latency, "RECIPES", recipes)
    peer = next(recipe for recipe in PEERS if recipe.name == "torch rms_norm")
    absent = next(recipe for recipe in PEERS if recipe.name == "liger rms_norm")
    monkeypatch.setattr(latency, "PEERS", (peer, absent))
    assert latency.main(["--suite", "cpu", "--dry-run", "--only", "gpt2 prefill", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "latency-cpu-dry-run.json").read_text())
    assert found["dry_run"]
    assert found["machine"]["device_type"] == "cpu"
    assert len(found["commit"].split()[0]) == 40
    assert found["versions"]["torch"] == torch.__version__
    (workload,) = found["workloads"]
    assert list(workload["candidates"]) == [EAGER, BASELINE, CANDIDATE, LIMIT, "torch rms_norm", "lnfold, measured"]
    assert found["summary"]["prefill"]["workloads"] == 1
    assert (tmp_path / "latency-cpu-dry-run.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "DRY RUN, no number means anything" in printed
    assert "gpt2 prefill 1x8" in printed
    assert "liger rms_norm" in printed


def test_a_failure_leaves_the_other_workloads(monkeypatch, tmp_path: Path, capsys) -> None:
    written = []

    def measured(workload, recipes, settings, say):
        if workload.task == "encode":
            raise WrongAnswer("lnfold: wrong")
        return result_of(workload)

    monkeypatch.setattr(latency, "measure_workload", measured)
    monkeypatch.setattr(latency, "_write", lambda found, path, console: written.append(found["workloads"][:]))
    assert latency.main(["--suite", "cpu", "--dry-run", "--output", str(tmp_path)]) == 1
    assert [len(members) for members in written] == [1, 1, 2, 3]
    assert "failed: vit-b encode 1: WrongAnswer: lnfold: wrong" in capsys.readouterr().out


def test_what_does_not_fit_is_said_to_be_not_measured(monkeypatch) -> None:
    clock = iter([0.0, 0.0, 100.0, 100.0, 100.0, 200.0])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    budget = latency.Budget(minutes=3)
    gpt2, vit = tiny("gpt2 prefill 1x128"), tiny("vit-b encode 1")
    assert budget.fits(gpt2, 4, 20.0)
    budget.spent(gpt2, 4, 20.0)  # 100 seconds, 80 of them for two layers of four candidates
    assert not budget.fits(vit, 4, 20.0)  # 20 + 80 more would end at 200
    assert budget.fits(vit, 2, 20.0)  # 20 + 40 end at 160


def test_arguments_that_cannot_be_are_explained(capsys) -> None:
    assert latency.main(["--only", "no such model"]) == 2
    assert "there are gpt2 prefill 1x128" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        latency.main(["--seconds", "-1"])
    assert "-1 is not a positive number" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert latency.main(["--suite", "gpu"]) == 2
        assert "needs an NVIDIA GPU" in capsys.readouterr().err


def result_of(workload: workloads.Workload) -> dict:
    """A result of made-up rounds."""
    seconds = {EAGER: 3.0, BASELINE: 2.0, CANDIDATE: 1.0}
    timings = PairedTimings({name: (s, s * 1.01, s * 0.99) for name, s in seconds.items()})
    facts = {n: {"first_call_s": 1.0, "launches": {"generated": 1, "extern": 1}} for n in timings.seconds}
    facts[CANDIDATE]["extra_weight_bytes"] = 1
    return {**workload.describe(), **measurement.summarise(RepeatedTimings((timings,)), facts), "left_out": {}}


def test_a_plot_of_a_workload_without_a_limit(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    machine = {"device": "a device", "torch": torch.__version__}
    result = {"workloads": [result_of(tiny("vit-b encode 1"))], "machine": machine, "commit": "0" * 40, "dry_run": True}
    draw(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_caches_are_empty_while_compile_times_are_taken(monkeypatch) -> None:
    import os

    before = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    with torch_private_codegen.empty_compiler_caches():
        inside = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert not os.listdir(inside)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == before != inside
