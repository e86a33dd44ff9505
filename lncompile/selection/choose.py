"""From a graph to the way to compile it: kept from an earlier race, raced now, or left to the model of costs."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lncompile import safety_net
from lncompile.comparisons.freed_memory import keep_freed_memory
from lncompile.comparisons.machine import describe_machine
from lncompile.lowering import torch_private_dynamo
from lncompile.options import Options
from lncompile.passes.decisions import Reason
from lncompile.pipeline import Prepared
from lncompile.reporting.report import unfolded
from lncompile.reporting.selection import Raced, Selection
from lncompile.selection import contestants as racing
from lncompile.selection import kept, raceable
from lncompile.selection.candidates import MODEL, STOCK, Candidate, candidates_of, fingerprint
from lncompile.selection.contestants import Contestant
from lncompile.selection.identity import key_of
from lncompile.selection.race import Finish, run_race
from lncompile.selection.working_inputs import WorkingInputs, kept_random_state

log = logging.getLogger("lncompile")

#: How long the calls of one race may take, compiling not counted.
SECONDS = 30.0
#: No further way is compiled for a race after this long; those that are compiled are raced.
COMPILE_SECONDS = 600.0
#: Nothing is raced any more in a process whose races have taken this long.
PROCESS_SECONDS = 1800.0

Prepare = Callable[[fx.GraphModule, Sequence[Any], Options, Mapping[str, Any]], Prepared]
_spent = 0.0


def prepare_fastest(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: dict[str, Any],
    prepare: Prepare,
) -> tuple[Prepared, dict[str, Any]]:
    """Make a graph ready in the way that wins, or won earlier: as ``prepare_selected`` (:mod:`.entrance`) says.

    Example:
        >>> prepared, config = prepare_fastest(graph_module, inputs, Options(select="measure"), {}, prepare)
        >>> prepared.report.selections[0].chosen
        'fold alone'
    """
    asked = _Asked(graph_module, example_inputs, options, inductor, prepare)
    reason = raceable.why_not(graph_module, example_inputs)
    if not reason and _spent > PROCESS_SECONDS:
        reason = f"the races of this process have taken {_spent:.0f} s already"
    if reason:
        return asked.unraced(reason)
    key = key_of(graph_module, example_inputs, options, inductor, asked.device)
    known = kept.look_up(key, options.selection_file)
    if known is not None and known.chosen in asked.candidates:
        return asked.chosen(known)
    try:
        selection = asked.race()
    except torch_private_dynamo.DynamoException:
        raise  # Dynamo talks to itself in exceptions
    except torch.OutOfMemoryError as error:
        return asked.unraced(f"there is not enough memory for a race ({error})")
    except Exception as error:
        if not safety_net.enabled:
            raise
        return asked.unraced(f"the race failed: {safety_net.log_failure('a race failed and chooses nothing', error)}")
    if selection.raced:
        kept.keep(key, selection)
    return asked.chosen(selection)


class _Asked:
    """One graph for which a way is to be chosen."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        options: Options,
        inductor: dict[str, Any],
        prepare: Prepare,
    ) -> None:
        self.graph_module, self.example_inputs, self.options = graph_module, example_inputs, options
        self.inductor, self.prepare = inductor, prepare
        self.candidates = candidates_of(options, inductor)
        devices = [value.device for value in example_inputs if isinstance(value, Tensor)]
        # A graph on a GPU may take numbers from the CPU.
        self.device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        self._prepared: dict[str, Prepared] = {}

    def prepared(self, name: str) -> Prepared:
        """What the passes make of the graph in one way."""
        if name not in self._prepared:
            candidate = self.candidates[name]
            self._prepared[name] = self.prepare(
                self.graph_module, self.example_inputs, candidate.options, candidate.inductor
            )
        return self._prepared[name]

    def unraced(self, reason: str) -> tuple[Prepared, dict[str, Any]]:
        """The way of the model of costs, with why nothing was raced."""
        log.debug("not raced: %s", reason)
        return self.chosen(Selection(MODEL, reason=reason, minimum_speedup=self.options.minimum_speedup))

    def chosen(self, selection: Selection) -> tuple[Prepared, dict[str, Any]]:
        """The graph in the way that was chosen, with the selection in the report."""
        if selection.chosen == STOCK:
            prepared = self.prepared(MODEL)
            detail = f"it could be folded, but stock torch.compile won the race: {selection.reason}"
            report = dataclasses.replace(unfolded(prepared.report, Reason.MEASURED, detail), selections=(selection,))
            return Prepared(None, None, (), report, prepared.parameters), self.inductor
        prepared = self.prepared(selection.chosen)
        report = dataclasses.replace(prepared.report, selections=(selection,))
        config = dict(self.candidates[selection.chosen].inductor)
        return dataclasses.replace(prepared, report=report), config

    def race(self) -> Selection:
        """Race all ways that lead to different graphs."""
        keep_freed_memory()
        global _spent
        started = time.perf_counter()
        if self.prepared(MODEL).graph_module is None:
            return Selection(MODEL, reason="nothing folds in it: every way leads to the same code")
        written = raceable.written_inputs(self.graph_module, self.example_inputs)
        if written is None:
            return Selection(MODEL, reason="it may write into memory that is not one of its inputs")
        notes, distinct = self._distinct()
        if len(distinct) == 1:
            return Selection(MODEL, reason="every way leads to the same code")
        devices = {value.device for value in self.example_inputs if isinstance(value, Tensor)}
        with kept_random_state(devices), torch.no_grad():
            inputs = WorkingInputs(self.example_inputs, written)
            running = self._compiled(distinct, inputs, notes, started)
            order = list(running)
            finish = run_race(
                racing.calls_of(running),
                STOCK,
                stopwatch=racing.stopwatch_for(self.device),
                seconds=SECONDS,
                minimum_speedup=self.options.minimum_speedup,
                prepare=inputs.restore,
                drop=lambda name: racing.free(running, name, self.device),
            )
            for name in order:
                racing.free(running, name, self.device)
        seconds = time.perf_counter() - started
        _spent += seconds
        selection = self._selection(finish, notes, seconds)
        if selection.chosen != MODEL:
            # Centered copies that only ways that lost have kept are freed with these.
            self._prepared = {k: v for k, v in self._prepared.items() if k in (MODEL, selection.chosen)}
        return selection

    def _distinct(self) -> tuple[dict[str, str], list[str]]:
        """What is to be said of the ways that do not run, by name, and the names of those that do."""
        notes: dict[str, str] = {}
        first: dict[str, str] = {}
        for name, candidate in self.candidates.items():
            try:
                prepared = None if name == STOCK else self.prepared(name)
            except Exception as error:
                if name == MODEL or not safety_net.enabled:
                    raise
                notes[name] = f"failed: {safety_net.log_failure(f'{name} is not raced', error)}"
                continue
            same = first.setdefault(fingerprint(candidate, prepared, self.device), name)
            if same != name:
                notes[name] = f"the same as '{same}'"
        return notes, list(first.values())

    def _compiled(
        self, distinct: Sequence[str], inputs: WorkingInputs, notes: dict[str, str], started: float
    ) -> dict[str, Contestant]:
        running: dict[str, Contestant] = {}
        for name in distinct:
            if time.perf_counter() - started > COMPILE_SECONDS and len(running) > 1:
                notes[name] = "left out: compiling took too long"
                continue
            try:
                running[name] = self._contestant(self.candidates[name], inputs)
            except torch_private_dynamo.DynamoException:
                raise
            except Exception as error:
                is_ours = not isinstance(error, torch.OutOfMemoryError)
                if name == STOCK or (is_ours and not safety_net.enabled):
                    raise
                notes[name] = f"failed: {safety_net.log_failure(f'{name} is not raced', error)}"
        return running

    def _contestant(self, candidate: Candidate, inputs: WorkingInputs) -> Contestant:
        prepared = None if candidate.name == STOCK else self.prepared(candidate.name)
        return Contestant(candidate, prepared, self.graph_module, self.example_inputs, inputs, self.device)

    def _selection(self, finish: Finish, notes: Mapping[str, str], seconds: float) -> Selection:
        least = self.options.minimum_speedup
        raced = []
        for name, candidate in self.candidates.items():
            standing = finish.standings.get(name)
            options = dict(candidate.changed)
            if name == STOCK:
                raced.append(Raced(name, options, 1.0, 1.0, 1.0, finish.rounds, "what the others are compared with"))
            elif standing is None:
                raced.append(Raced(name, options, note=notes.get(name, "not timed")))
            else:
                raced.append(
                    Raced(
                        name,
                        options,
                        standing.speedup,
                        standing.low,
                        standing.high,
                        standing.rounds,
                        standing.dropped,
                    )
                )
        if not finish.enough:
            reason = f"a call takes too long to be raced ({finish.rounds} rounds in {seconds:.0f} s)"
            return Selection(MODEL, reason=reason, minimum_speedup=least)
        faster = "faster" if least == 1 else f"more than {least:g} times as fast"
        reason = f"no other way is shown to be {faster}"
        if finish.winner != STOCK:
            reason = (
                f"the lower end of its interval is above {least:g}, and no other is faster by more than half a percent"
            )
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
        machine = describe_machine(self.device)
        threads = "" if machine["device_type"] == "cuda" else f", {machine['threads']} threads"
        return Selection(
            finish.winner, tuple(raced), reason, now, f"{machine['device']}{threads}", seconds, least, "race"
        )
