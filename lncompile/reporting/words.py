"""The sentences of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lncompile.passes.decisions import PartKind, Verdict
from lncompile.passes.norms.folded_before import FOLDED_NORM
from lncompile.passes.placement.budget import amount
from lncompile.reporting import selection as report_selection

if TYPE_CHECKING:
    from lncompile.reporting.report import FoldReport

#: How many names a sentence gives before it counts the rest.
NAMES = 3


def headline(report: FoldReport) -> str:
    """What to know before anything else, in a sentence; ``""`` for most reports."""
    gain = report.folded_without_gradients
    if gain is not None and gain > report.folded:
        return (
            "Wrap the call in torch.no_grad() (or torch.inference_mode()): gradients are recorded though the model is "
            f"in evaluation mode. Without them {gain} of {report.total} LayerNorms fold, with them {report.folded}."
        )
    behind = _behind_a_norm(report)
    if behind * 2 > report.total:
        return (
            f"This is a post-norm model: {behind} of its {report.total} LayerNorms normalise a sum that another norm's "
            "output is part of, and the γ and β of that norm give it a mean. They could fold in a pre-norm model, "
            "where the norms stand in front of the layers."
        )
    return ""


def _behind_a_norm(report: FoldReport) -> int:
    """How many norms stay that read a stream by themselves which begins at another norm's output."""
    count = 0
    for stream in report.streams:
        norms = [part for part in stream.parts if part.kind is PartKind.NORM]
        entering = [part for part in stream.parts if part.kind is not PartKind.NORM and part.site is not None]
        count += bool(entering) and len(norms) == 1 and not norms[0].centered
    return count


def nothing_to_fold(report: FoldReport) -> str:
    """One line, for a report without LayerNorms."""
    where = "the graph" if report.graphs == 1 else f"the {report.graphs} graphs"
    if report.differences:
        count = len(report.differences)
        taken = "1 difference from a mean is" if count == 1 else f"{count} differences from a mean are"
        return (
            f"No LayerNorm is recognised in {where}, so nothing changes: stock Inductor compiles it as it is. But "
            f"{taken} taken in it:"
        )
    kind = ""
    if report.rms_norms:
        kind = f" ({report.rms_norms} RMSNorm{'s' if report.rms_norms > 1 else ''}, which subtract no mean)"
    return f"No LayerNorm in {where}{kind}: there is nothing to fold, stock Inductor compiles it as it is."


def summary(report: FoldReport) -> str:
    """One line: how many folded, what was centered, what it costs."""
    left = Counter(site.reason.value for site in report.sites if site.reason is not None)
    stay = "; left: " + ", ".join(f"{count} {reason}" for reason, count in left.most_common()) if left else ""
    if not report.folded:
        graphs = f", in {report.graphs} graphs" if report.graphs > 1 else ""
        return f"0 of {report.total} LayerNorms folded{graphs}{_budget(report)}{stay}."
    absorbed = sum(bool(site.affine_absorbed_by) for site in report.sites)
    kind = "centered or absorbing" if absorbed else "centered"
    before = sum(site.folded_before for site in report.sites)
    words = f"{report.folded} of {report.total} LayerNorms folded{folded_before(report)}"
    if report.weights or before < report.folded:
        words += f"{', with' if before else ' into'} {len(report.weights)} {kind} weights{_memory(report)}"
    words += f", in {report.graphs} graphs" if report.graphs > 1 else ""
    words += f"; γ and β of {absorbed} absorbed" if absorbed else ""
    return f"{words}{_budget(report)}{stay}."


def folded_before(report: FoldReport) -> str:
    """What to say of the norms that came folded, behind the number of those that are; ``""`` where none did."""
    before = sum(site.folded_before for site in report.sites)
    if not before:
        return ""
    return f" before ({FOLDED_NORM})" if before == report.folded else f", {before} of them before ({FOLDED_NORM})"


def _memory(report: FoldReport) -> str:
    words = f" ({report.extra_bytes / 2**20:.1f} MiB beside the model"
    counted = Counter(weight.storage for weight in report.weights)
    for storage, what in (
        ("centered", "centered before"),
        ("graph", "centered at every step"),
    ):
        words += f", {counted[storage]} {what}" if counted[storage] else ""
    return f"{words})"


def _budget(report: FoldReport) -> str:
    budget = report.memory_budget
    if budget is None or not budget.binds:
        return ""
    return f", within a memory budget of {amount(budget.limit)} (without: {amount(budget.wanted)})"


def why(site: Verdict) -> str:
    """Why a site was folded or not, in words."""
    reason = "" if site.reason is None else f"{site.reason.value}: "
    more = [site.affine] if site.affine_absorbed_by else []
    more += [site.deferral] if site.deferral else []
    return "; ".join([f"{reason}{site.detail}", *more])


def remedies(report: FoldReport) -> list[str]:
    """What to change so that more sites fold: a line for each reason and change, the one for most sites first."""
    wanted = Counter((site.reason, site.remedy) for site in report.sites if site.reason is not None)
    counted = [f"{reason.value} ({count}): {remedy}" for (reason, remedy), count in wanted.most_common()]
    others = Counter((difference.reason, difference.remedy) for difference in report.differences)
    return counted + [f"{reason.value} ({count}): {remedy}" for (reason, remedy), count in others.most_common()]


def notes(report: FoldReport) -> Iterator[str]:
    """What else there is to say of a report, below its sites."""
    for centering in report.centerings:
        yield f"centered at run time after {centering.after} ({centering.location}): {centering.detail}"
    if report.norms_outside:
        yield outside(report.norms_outside)
    for found in report.graph_breaks:
        yield f"graph break{f' at {found.location}' if found.location else ''}: {found.reason}"
    for selection in report.selections:
        yield from report_selection.in_words(selection)


def outside(names: Sequence[str]) -> str:
    """What to say of LayerNorm modules that no captured graph holds."""
    is_one = len(names) == 1
    modules, are, they = ("1 LayerNorm module", "is", "It is") if is_one else ("LayerNorm modules", "are", "They are")
    modules = modules if is_one else f"{len(names)} {modules}"
    return (
        f"{modules} of the model {are} in no captured graph: {some(names)}. {they} not called, or called in code that "
        "Dynamo does not capture."
    )


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    others = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return f"{', '.join(names[:NAMES])}{others}"
