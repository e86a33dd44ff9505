"""One answer for one model on this machine: *use it*, *no gain* or *not possible*, and why.

It is put together from what :func:`lncompile.explain`, :func:`lncompile.verify` and
:func:`~lncompile.comparisons.latency.compare_in_processes` find. Each step is left out where an earlier one has
decided: what does not fold is not timed, and the speed of wrong answers is worth nothing.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lncompile.comparisons.latency import LIMIT, Latency
from lncompile.comparisons.machine import size_in_words
from lncompile.reporting.report import FoldReport
from lncompile.reporting.selection import Selection
from lncompile.reporting.selection import to_dict as selection_to_dict
from lncompile.reporting.words import folded_before
from lncompile.verification import Verification


class Outcome(enum.StrEnum):
    """The answer in a word."""

    USE_IT = "use it"
    NO_GAIN = "no gain"
    NOT_POSSIBLE = "not possible"


@dataclass(frozen=True)
class Answer:
    """What was found for a model. ``print`` shows the answer, and below it what it is made of.

    Attributes:
        name: of the model, as it was asked for.
        description: of it.
        machine: what was measured on, and how busy that was before the first step.
        weight_bytes: of the model's parameters.
        report: which of its LayerNorms fold.
        verification: errors against float64; None where nothing folds.
        latency: of stock, lnfold and, where that can be had, the model without norms; None where it was not measured.
        mode: of torch.compile.
        options: of torch.compile, those of the fastest way among them.
        selections: how the ways to compile each graph were raced; empty where they were not.
    """

    name: str
    description: str
    machine: Mapping[str, Any]
    weight_bytes: int
    report: FoldReport
    verification: Verification | None = None
    latency: Latency | None = None
    mode: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    selections: tuple[Selection, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """The answer in a word."""
        if not self.report.folded or (self.verification is not None and not self.verification.passed):
            return Outcome.NOT_POSSIBLE
        if self.latency is not None and self.latency.speedup.low > 1:
            return Outcome.USE_IT
        return Outcome.NO_GAIN

    @property
    def stays_exact(self) -> bool:
        """Whether predictions are as exact as those of stock torch.compile, as far as they were compared."""
        return self.verification is None or self.verification.passed

    def sentence(self) -> str:
        """The answer and its reason, in one sentence."""
        return f"{self.outcome.value.capitalize()}: {self._reason()}"

    def _reason(self) -> str:
        report, latency = self.report, self.latency
        if not report.total and report.differences:
            first, count = report.differences[0], len(report.differences)
            more = f" (and {count - 1} more)" if count > 1 else ""
            return f"no LayerNorm is recognised. A mean is subtracted at {first.location}{more}, but {first.detail}."
        if not report.total:
            return _first_to_lower(report.nothing_to_fold())
        if not report.folded:
            return f"none of the {report.total} LayerNorms folds ({self._obstacles()})."
        if not self.stays_exact:
            if self.verification is not None and self._stock_overflows(self.verification):
                return "outputs are not finite, with stock torch.compile as well: use a wider dtype."
            return "predictions would get worse. This is a bug in lncompile: please report it."
        if latency is None:
            return "latency was not measured."
        ratio = f"{latency.speedup.median:.3f} times as fast as stock torch.compile {_brackets(latency.speedup)}"
        if self.outcome is Outcome.USE_IT:
            return f"lnfold{self._way()} is {ratio}{latency.caveat()}."
        partly = "" if report.folded == report.total else f" Only {report.folded} of {report.total} LayerNorms fold."
        if latency.speedup.high < 1:
            return f"lnfold is slower, {ratio}.{partly}"
        limit = latency.limit
        if limit is not None and limit.low <= 1:
            return f"norms take no measurable time of this model on this machine.{partly}"
        if limit is not None:
            return f"norms take {_cost(limit)} of a call, and what lnfold saves of that cannot be measured.{partly}"
        return f"no difference from stock torch.compile can be measured.{partly}"

    @staticmethod
    def _stock_overflows(verification: Verification) -> bool:
        worse = [output for output in verification.outputs if not output.passed]
        return all(output.not_finite_inductor >= output.not_finite > 0 for output in worse)

    def _way(self) -> str:
        """The way that was chosen, where it has a name of its own."""
        chosen = {selection.chosen for selection in self.selections} - {"stock", "model"}
        return f" with {' or '.join(sorted(chosen))}" if chosen else ""

    def _obstacles(self) -> str:
        counted = Counter(site.reason.value for site in self.report.sites if site.reason is not None)
        return ", ".join(f"{count} {reason}" for reason, count in counted.most_common())

    def change(self) -> str | None:
        """What would have to change for a better answer; None where nothing is known that would."""
        report, latency = self.report, self.latency
        if not self.stays_exact:
            return None
        if not report.total:
            return report.differences[0].remedy if report.differences else None
        if report.headline():
            return report.headline()
        wanted = Counter((site.reason, site.remedy) for site in report.sites if site.reason is not None)
        if wanted:
            ((_, remedy), count), *_ = wanted.most_common(1)
            return f"for {count} more to fold: {remedy}"
        limit = None if latency is None else latency.limit
        if self.outcome is Outcome.NO_GAIN and limit is not None and limit.low <= 1:
            return "nothing in the model; try the batch and the lengths that you serve (--batch, --tokens), or a GPU"
        return None

    def line(self) -> str:
        """What to write to use it."""
        arguments = ['backend="lnfold"']
        if self.mode is not None:
            arguments.append(f'mode="{self.mode}"')
        if self.options:
            arguments.append(f"options={dict(self.options)!r}")
        return f"torch.compile(model, {', '.join(arguments)})"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts, lists, strings and numbers, ready for JSON."""
        limit = self.latency.limit if self.latency else None
        return {
            "model": self.name,
            "description": self.description,
            "outcome": self.outcome.value,
            "sentence": self.sentence(),
            "change": self.change(),
            "line": self.line() if self.outcome is Outcome.USE_IT else None,
            "machine": dict(self.machine),
            "passed": self.stays_exact,
            "weight_bytes": self.weight_bytes,
            "share_of_norms": None if limit is None else {"estimate": 1 - 1 / limit.median, **_ends(limit)},
            "explain": self.report.to_dict(),
            "verify": self.verification.to_dict() if self.verification else None,
            "bench": self.latency.to_dict() if self.latency else None,
            "races": [selection_to_dict(selection) for selection in self.selections],
        }

    def __rich_console__(self, console: Console, options: Any) -> Iterable[Any]:
        """How rich prints it: the answer first, then a line for each thing it is made of."""
        colours = {Outcome.USE_IT: "green", Outcome.NO_GAIN: "yellow", Outcome.NOT_POSSIBLE: "red"}
        yield Text(self.sentence(), style=f"bold {colours[self.outcome]}")
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, words in self._lines():
            table.add_row(Text(name, style="dim"), Text(words))
        yield Text()
        yield table

    def _lines(self) -> Iterable[tuple[str, str]]:
        report, latency = self.report, self.latency
        if report.total:
            yield "fold", f"{report.folded} of {report.total} LayerNorms{folded_before(report)}"
        if report.folded < report.total:
            yield "stay", self._obstacles()
        change = self.change()
        if change is not None:
            yield "to change", change
        if latency is not None:
            yield from self._measured(latency)
        for selection in self.selections:
            ways = ", ".join(way.in_words() for way in selection.raced if way.rounds)
            yield "raced", f"{ways}; fastest: {selection.chosen}"
        if report.folded:
            share = f" (+{100 * report.extra_bytes / self.weight_bytes:.0f}%)" if self.weight_bytes else ""
            yield (
                "memory",
                f"{size_in_words(report.extra_bytes)} of centered copies beside {size_in_words(self.weight_bytes)} of "
                f"weights{share}; lnfold.memory_budget limits them",
            )
        if self.verification is not None:
            worst = max(self.verification.outputs, key=lambda output: (not output.passed, output.lnfold))
            yield (
                "exactness",
                f"{'as exact as stock' if self.verification.passed else 'WORSE than stock'}: error {worst.lnfold:.1e} "
                f"from float64 (stock {worst.inductor:.1e}, eager {worst.eager:.1e})",
            )
        if self.outcome is Outcome.USE_IT:
            yield "to write", self.line()

    def _measured(self, latency: Latency) -> Iterable[tuple[str, str]]:
        yield "speed-up", f"{latency.speedup} over stock torch.compile, {latency.verdict()}{latency.caveat()}"
        limit = latency.limit
        if limit is not None:
            words = "nothing that can be measured" if limit.low <= 1 else f"{_cost(limit)} of a call"
            yield "norms cost", f"{words} (without any norm: {limit} times as fast)"
        else:
            why = latency.left_out.get(LIMIT, "it was not asked for")
            yield "norms cost", f"not measured: {why}"
        count = len(latency.timings.processes)
        yield (
            "one call",
            f"{1e3 * latency.timings.median('lnfold'):.3g} ms (stock {1e3 * latency.timings.median('inductor'):.3g}, "
            f"eager {1e3 * latency.timings.median('eager'):.3g}), {latency.timings.rounds} rounds in {count} "
            f"process{'' if count == 1 else 'es'}, {self.machine['threads']} CPU threads, {self.machine['device']}",
        )


def _first_to_lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _brackets(ratio: Any) -> str:
    return f"[{ratio.low:.3f}, {ratio.high:.3f}]"


def _ends(limit: Any) -> dict[str, float]:
    return {"low": 1 - 1 / limit.low, "high": 1 - 1 / limit.high}


def _cost(limit: Any) -> str:
    """The share of a call that norms take: of the limit's speed-up *s* it is 1 - 1/s."""
    low, high = (100 * value for value in _ends(limit).values())
    return f"{100 * (1 - 1 / limit.median):.1f}% [{low:.1f}, {high:.1f}]"
