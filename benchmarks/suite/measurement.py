"""Measuring one workload: compile every candidate, compare what they answer, then time them interleaved."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lncompile
from lncompile.comparisons.even_terms import begin_anew, settle
from lncompile.comparisons.machine import describe_machine
from lncompile.comparisons.processes import RepeatedTimings
from lncompile.comparisons.timing import Estimate, Stopwatch, measure
from lncompile.lowering import torch_private_caches, torch_private_dynamo
from lncompile.lowering.inspect import torch_private_codegen
from lncompile.lowering.inspect.generated_code import GeneratedCode
from lncompile.verification import relative_error
from suite.candidates import BASELINE, CANDIDATE, EAGER, LIMIT, Recipe
from suite.decoding import decode_step
from suite.peers import Unavailable
from suite.workloads import Workload

#: The speed of wrong answers is worth nothing: a candidate's error may be this many times stock Inductor's, ...
ERROR_BUDGET = 3.0
#: ... or this many roundings of its dtype.
ROUNDINGS = 16.0
#: Calls after the first before anything is believed: CUDA graphs warm up in one, record in the next, and replay then.
SETTLING_CALLS = 3


class WrongAnswer(Exception):
    """A candidate that computes something else."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: where.
        seconds: of timing, for each workload.
        minimum_rounds: at least so many.
        maximum_rounds: at most so many.
        empty_caches: whether each candidate is compiled with empty caches, as compile times need it.
        stopwatch: how a call is timed; None for the device's own.
    """

    device: str = "cpu"
    seconds: float = 20.0
    minimum_rounds: int = 15
    maximum_rounds: int = 300
    empty_caches: bool = True
    stopwatch: Stopwatch | None = None


@dataclass
class Prepared:
    """A candidate that was compiled and called.

    Attributes:
        call: one call.
        rewind: makes the next call the same as the last, outside of what is timed.
        answer: of the last call.
        facts: what was found while it was compiled, ready for JSON.
    """

    call: Callable[[], Any]
    rewind: Callable[[], None]
    answer: Tensor
    facts: dict[str, Any] = field(default_factory=dict)


def prepare(recipe: Recipe, workload: Workload, model: nn.Module, settings: Settings) -> Prepared:
    """Compile a candidate for a workload, and call it until it has settled.

    Args:
        recipe: the candidate.
        workload: what it runs.
        model: the workload's model, the same for all candidates.
        settings: how to measure.

    Raises:
        Unavailable: for a peer that does not exist here.
    """
    cuda = torch.device(settings.device).type == "cuda"
    inputs, rewind = _inputs(workload, model, settings.device)
    function = recipe.make(model, workload.mode)

    def call() -> Any:
        return function(**inputs)

    def step() -> None:
        # Says that the last answer is not needed any more, which CUDA graphs overwrite.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        rewind()

    before = _allocated(cuda)
    skipped = torch_private_codegen.count_of("inductor", "cudagraph_skips")
    failed = torch_private_codegen.count_of("lnfold", "internal_errors")
    caches = torch_private_codegen.empty_compiler_caches() if settings.empty_caches else contextlib.nullcontext()
    gc.collect()  # what earlier compilations left would be holes to fill
    apart = torch_private_caches.without_autograd_cache()
    with caches, apart, torch_private_dynamo.many_recompiles(), torch_private_codegen.recorded_wrappers() as wrappers:
        step()
        started = time.perf_counter()
        call()
        _wait(cuda)
        first = time.perf_counter() - started
        for _ in range(SETTLING_CALLS - 1):
            step()
            call()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step()
    answer = call()[0].clone()
    _wait(cuda)
    facts: dict[str, Any] = {"description": recipe.description}
    if recipe.compiles:
        code = GeneratedCode.from_wrappers(wrappers)
        facts["first_call_s"] = first
        facts["launches"] = {"generated": code.launches, "extern": code.extern_calls}
        facts["graphs"] = len(code.source)
        facts["cudagraph_skips"] = torch_private_codegen.count_of("inductor", "cudagraph_skips") - skipped
    if cuda:
        facts["device_bytes_kept"] = _allocated(cuda) - before
        facts["device_bytes_peak"] = torch.cuda.max_memory_allocated()
    if torch_private_codegen.count_of("lnfold", "internal_errors") != failed:
        raise RuntimeError("lnfold failed and fell back to stock torch.compile; its log says why")
    if recipe.name == CANDIDATE:
        facts |= _folding(function)
    return Prepared(call, step, answer, facts)


def measure_workload(
    workload: Workload,
    recipes: Sequence[Recipe],
    settings: Settings,
    say: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """Measure one workload.

    Args:
        workload: what to run.
        recipes: the candidates, in the order in which they are compiled. The baseline and lnfold are among them. A
            candidate besides these that fails is left out, with its reason.
        settings: how to measure.
        say: called with a few words before each step.

    Returns:
        Everything measured, ready for JSON.

    Raises:
        WrongAnswer: if lnfold's answer is not the model's.

    Example:
        >>> measure_workload(SUITES["cpu"][0].dry(), RECIPES, Settings(seconds=1.0))["speedup_over_inductor"]["lnfold"]
        {'median': ..., 'low': ..., 'high': ...}
    """
    _forget_the_last(settings.device)
    settle(settings.device)
    say("building the model")
    model = workload.build(settings.device)
    say("a reference in a wider dtype")
    reference = _reference(workload, model, settings.device)
    prepared: dict[str, Prepared] = {}
    left_out: dict[str, str] = {}
    for recipe in recipes:
        say(f"{recipe.name}: {'compiling' if recipe.compiles else 'running'}")
        try:
            prepared[recipe.name] = prepare(recipe, workload, model, settings)
        except Exception as error:  # a peer's own failure must not take the measurement with it
            if recipe.name in (BASELINE, CANDIDATE):
                raise
            left_out[recipe.name] = _why(error)
    _compare(recipes, prepared, reference, left_out)
    say("timing")
    timings = measure(
        {name: candidate.call for name, candidate in prepared.items()},
        seconds=settings.seconds,
        minimum_rounds=settings.minimum_rounds,
        maximum_rounds=settings.maximum_rounds,
        warmup=1,
        device=settings.device,
        prepare={name: candidate.rewind for name, candidate in prepared.items()},
        stopwatch=settings.stopwatch,
    )
    facts = {name: candidate.facts for name, candidate in prepared.items()}
    return {
        **workload.describe(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **summarise(RepeatedTimings((timings,)), facts),
        "left_out": left_out,
        "load_average_after": describe_machine(settings.device)["load_average"],
    }


def _forget_the_last(device: str) -> None:
    """Drop compiled code, CUDA graphs and memory of what was measured before, whether it ended well or not."""
    torch.compiler.reset()
    begin_anew()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def summarise(timings: RepeatedTimings, facts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Put samples and facts into what is written for a workload.

    Args:
        timings: of all candidates.
        facts: of each.
    """
    candidates: dict[str, dict[str, Any]] = {}
    for name in timings.names:
        candidates[name] = {
            **facts[name],
            "seconds": _plain(timings.latency(name)),
            "samples_s": [[float(f"{v:.6g}") for v in process.seconds[name]] for process in timings.processes],
        }
    compared = [name for name in timings.names if name != BASELINE]
    shares = {}
    if LIMIT in timings.names:
        for name in compared:
            if name not in (LIMIT, EAGER):
                share = timings.share_removed(name, BASELINE, LIMIT)
                shares[name] = _plain(share) if share else None
    first_calls = {name: found["first_call_s"] for name, found in facts.items() if "first_call_s" in found}
    return {
        "rounds": timings.rounds,
        "processes": len(timings.processes),
        "speedup_over_inductor": {name: _plain(timings.speedup(name, BASELINE)) for name in compared},
        "share_of_norm_cost_removed": shares,
        "compile_time_over_inductor": {
            name: first_call / first_calls[BASELINE] for name, first_call in first_calls.items()
        },
        "candidates": candidates,
    }


def _plain(estimate: Estimate) -> dict[str, float]:
    return dataclasses.asdict(estimate)


def _inputs(workload: Workload, model: nn.Module, device: str) -> tuple[dict[str, Any], Callable[[], None]]:
    """The arguments of one call, and what makes the next call the same."""
    if workload.task == "decode":
        return decode_step(workload, model, device)
    return workload.inputs(model, device), lambda: None


def _reference(workload: Workload, model: nn.Module, device: str) -> Tensor:
    """The answer of the model in a wider dtype, on the same weights and inputs: what all errors are against."""
    dtype = torch.float64 if workload.dtype == torch.float32 else torch.float32
    wide = dataclasses.replace(workload, dtype=dtype)
    copied = copy.deepcopy(model).to(dtype)
    inputs, _ = _inputs(wide, copied, device)
    # Inputs are those of the workload, rounded to its dtype.
    rounded = {
        key: value.to(workload.dtype).to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    answer: Tensor = copied(**rounded)[0].clone()
    return answer


def _compare(
    recipes: Sequence[Recipe], prepared: dict[str, Prepared], reference: Tensor, left_out: dict[str, str]
) -> None:
    """Note every candidate's error, and leave out those that answer something else.

    Raises:
        WrongAnswer: if lnfold is one of them.
    """
    for recipe in recipes:
        candidate = prepared.get(recipe.name)
        if candidate is None:
            continue
        if recipe.predicts:
            candidate.facts["error"] = relative_error(candidate.answer, reference.double())
        else:
            candidate.facts["largest_answer"] = float(candidate.answer.abs().max())
    stock = prepared[BASELINE]
    allowed = max(ERROR_BUDGET * stock.facts["error"], ROUNDINGS * torch.finfo(stock.answer.dtype).eps)
    for name, candidate in list(prepared.items()):
        error = candidate.facts.get("error", 0.0)
        if error <= allowed:
            continue
        words = f"its error is {error:.1e}, stock torch.compile's {stock.facts['error']:.1e}"
        if name == CANDIDATE:
            raise WrongAnswer(f"{name}: {words}")
        left_out[name] = words
        del prepared[name]


def _folding(compiled: Callable[..., Any]) -> dict[str, Any]:
    """What lnfold made of the norms, and what its centered weights weigh."""
    reports = lncompile.reports(compiled)
    return {
        "sites": sum(report.total for report in reports),
        "folded": sum(report.folded for report in reports),
        "centerings": sum(len(report.centerings) for report in reports),
        "extra_weight_bytes": sum(report.extra_bytes for report in reports),
    }


def _why(error: BaseException) -> str:
    """A reason in one line; Dynamo wraps what a backend raises."""
    inner = getattr(error, "inner_exception", None) or error
    text = str(inner).strip().splitlines() or [""]
    return text[0] if isinstance(inner, Unavailable) else f"{type(inner).__name__}: {text[0]}"


def _allocated(cuda: bool) -> int:
    return torch.cuda.memory_allocated() if cuda else 0


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
