"""Showing a run: tables for the terminal, a plot for people who read the results later."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from suite.candidates import BASELINE, CANDIDATE, EAGER, LIMIT

_MAIN = (EAGER, BASELINE, CANDIDATE, LIMIT)


#: From this limit on, norms are said to cost something: without any, a model would be so many times as fast as stock.
NORMS_COST_SOMETHING = 1.05

#: By the name of what is drawn, an estimate for each workload, or None.
Dots = Mapping[str, Sequence[Mapping[str, float] | None]]


@dataclass(frozen=True)
class Panel:
    """One of the panels of a plot, side by side, with a line for each workload.

    Attributes:
        label: what its axis shows.
        dots: what is drawn.
        lines: where upright lines help the eye.
    """

    label: str
    dots: Dots
    lines: Sequence[float]


def summarise_run(workloads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what lnfold gains over stock torch.compile, by task, also where norms cost something.

    Args:
        workloads: as :func:`suite.measurement.measure_workload` returns them.

    Returns:
        For each task the number of workloads, the geometric mean of lnfold's speed-ups, and the least of them. Under
        ``where_norms_cost_something`` the same of the workloads that would be at least 1.05 times as fast without any
        norm; the geometric mean of these limits; and the share of the norms' cost that is removed there, of all of them
        together, where a call of stock torch.compile counts the same for each:
        ``Σ (1 - 1 / speed-up) / Σ (1 - 1 / limit)``.
    """
    tasks: dict[str, list[tuple[float, float]]] = {}
    for workload in workloads:
        speedups = workload["speedup_over_inductor"]
        limit = speedups[LIMIT]["median"] if LIMIT in speedups else 1.0
        tasks.setdefault(workload["task"], []).append((speedups[CANDIDATE]["median"], limit))
    return {task: _summary(pairs) for task, pairs in tasks.items()}


def _summary(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    summary: dict[str, Any] = _means([speedup for speedup, _ in pairs])
    costly = [(speedup, limit) for speedup, limit in pairs if limit >= NORMS_COST_SOMETHING]
    if costly:
        saved, cost = (sum(1 - 1 / ratio for ratio in ratios) for ratios in zip(*costly, strict=True))
        summary["where_norms_cost_something"] = {
            **_means([speedup for speedup, _ in costly]),
            "limit": _means([limit for _, limit in costly])["geometric_mean"],
            "share_removed": saved / cost,
        }
    return summary


def _means(ratios: Sequence[float]) -> dict[str, Any]:
    return {
        "workloads": len(ratios),
        "geometric_mean": math.exp(sum(map(math.log, ratios)) / len(ratios)),
        "least": min(ratios),
    }


def print_tables(result: Mapping[str, Any], console: Console) -> None:
    """Print what was measured: a row for each workload, and one for each peer.

    Args:
        result: of a run, as it is written.
        console: where to print.
    """
    dry = "DRY RUN, no number means anything: " if result["dry_run"] else ""
    table = Table(title=f"{dry}latency on {result['machine']['device']}", box=None, pad_edge=False)
    for header in (
        "workload",
        "layers",
        *(f"{name} ms" for name in _MAIN),
        "speed-up over inductor",
        "norm cost removed",
        "launches",
        "compile",
        "extra MB",
    ):
        table.add_column(header)
    for workload in result["workloads"]:
        table.add_row(*_row(workload))
    table.caption = (
        "Medians; speed-up and share with 95% intervals. Launches: of Inductor, lnfold and without norms. "
        "Compile: first call of lnfold over Inductor's. Extra MB: centered copies of weights."
    )
    table.caption_justify = "left"
    console.print(table)
    _print_peers(result["workloads"], console)
    for task, found in result["summary"].items():
        console.print(f"{task}: {_means_in_words(found)}", soft_wrap=True)
        costly = found.get("where_norms_cost_something")
        if costly:
            console.print(
                f"   where norms cost something (limit {NORMS_COST_SOMETHING} or more): {_means_in_words(costly)}; "
                f"limit {costly['limit']:.3f}, share of the norms' cost removed {costly['share_removed']:.2f}",
                soft_wrap=True,
            )
    for key in ("not_measured", "failed"):
        for name, reason in result[key].items():
            console.print(f"{key.replace('_', ' ')}: {name}: {reason}", soft_wrap=True)


def _means_in_words(found: Mapping[str, Any]) -> str:
    mean, number, least = found["geometric_mean"], found["workloads"], found["least"]
    return f"{mean:.3f} times stock torch.compile's speed, geometric mean of {number}; least {least:.3f}"


def _row(workload: Mapping[str, Any]) -> list[str]:
    candidates = workload["candidates"]
    counts = [candidates[name]["launches"] if name in candidates else None for name in _MAIN[1:]]
    ratio = workload["compile_time_over_inductor"][CANDIDATE]
    return [
        workload["name"],
        f"{workload['layers']} of {workload['layers_of_the_real_model']}",
        *(_milliseconds(candidates.get(name)) for name in _MAIN),
        _interval(workload["speedup_over_inductor"][CANDIDATE]),
        _interval(workload["share_of_norm_cost_removed"].get(CANDIDATE)),
        " / ".join("-" if count is None else str(count["generated"] + count["extern"]) for count in counts),
        f"{ratio:.2f}",
        f"{candidates[CANDIDATE]['extra_weight_bytes'] / 1e6:.1f}",
    ]


def _print_peers(workloads: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table(title="peers", box=None, pad_edge=False)
    for header in ("workload", "peer", "ms", "speed-up over inductor", "norm cost removed"):
        table.add_column(header)
    for workload in workloads:
        for name, candidate in workload["candidates"].items():
            if name not in _MAIN:
                speedup = workload["speedup_over_inductor"][name]
                share = workload["share_of_norm_cost_removed"].get(name)
                table.add_row(workload["name"], name, _milliseconds(candidate), _interval(speedup), _interval(share))
    if table.row_count:
        console.print(table)
    for workload in workloads:
        for name, reason in workload["left_out"].items():
            console.print(f"left out of {workload['name']}: {name}: {reason}", soft_wrap=True)


def _milliseconds(candidate: Mapping[str, Any] | None) -> str:
    return "-" if candidate is None else f"{1e3 * candidate['seconds']['median']:.3f}"


def _interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "within noise"
    return f"{estimate['median']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a run: speed-ups over stock torch.compile on the left, the share of the norms' cost removed on the right.

    Args:
        result: of a run, as it is written; with one workload at least.
        path: of the PNG.

    Raises:
        ImportError: without matplotlib.
    """
    workloads = result["workloads"]
    names = list(dict.fromkeys(name for workload in workloads for name in workload["candidates"]))
    shown = [name for name in names if name not in (BASELINE, EAGER)]

    def dots(key: str) -> Dots:
        return {name: [workload[key].get(name) for workload in workloads] for name in shown}

    panels = (
        Panel("speed over stock torch.compile", dots("speedup_over_inductor"), (1.0,)),
        Panel("share of the norms' cost removed", dots("share_of_norm_cost_removed"), (0.0, 1.0)),
    )
    _draw_panels(result, [workload["name"] for workload in workloads], panels, path)


def draw_choices(result: Mapping[str, Any], path: Path) -> None:
    """Draw what races chose: over stock torch.compile on the left, next to the best way on the right.

    Args:
        result: of ``selection.py``, as it is written; workloads that were not raced are left out.
        path: of the PNG.

    Raises:
        ImportError: without matplotlib.
    """
    raced = [workload for workload in result["workloads"] if workload["raced"]]
    over_stock: Dots = {
        "what a race chose": [workload["over_stock"] for workload in raced],
        "what the model of costs chose": [workload["speedups"].get("model") for workload in raced],
    }
    panels = (
        Panel("speed over stock torch.compile", over_stock, (1.0,)),
        Panel("speed over the best way", {"what a race chose": [found["of_the_best"] for found in raced]}, (0.99, 1.0)),
    )
    _draw_panels(result, [workload["workload"] for workload in raced], panels, path)


def _draw_panels(result: Mapping[str, Any], workloads: Sequence[str], panels: Sequence[Panel], path: Path) -> None:
    figure_class: Any = importlib.import_module("matplotlib.figure").Figure
    # A figure of its own, not pyplot's: no window, no state shared with anybody.
    figure = figure_class(figsize=(12, 2 + 0.6 * len(workloads)), layout="constrained")
    both = figure.subplots(1, len(panels), sharey=True, width_ratios=(3, 2))
    for axes, panel in zip(both, panels, strict=True):
        for line in panel.lines:
            axes.axvline(line, color="0.6", linewidth=1, linestyle="--")
        for index, (name, estimates) in enumerate(panel.dots.items()):
            offset = 0.7 * ((index + 0.5) / len(panel.dots) - 0.5)
            points = [(y + offset, found) for y, found in enumerate(estimates) if found is not None]
            if points:
                medians = [found["median"] for _, found in points]
                errors = [
                    [max(0.0, found["median"] - found["low"]) for _, found in points],
                    [max(0.0, found["high"] - found["median"]) for _, found in points],
                ]
                color = f"C{index}"
                axes.errorbar(medians, [y for y, _ in points], xerr=errors, fmt="o", capsize=3, color=color, label=name)
        axes.set_xlabel(f"{panel.label} (95% interval)")
        axes.margins(x=0.1)
    first = both[0]
    first.set_yticks(range(len(workloads)), workloads)
    first.set_ylim(len(workloads) - 0.5, -0.5)  # the first on top
    columns = max(1, len(panels[0].dots))
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    dry = "DRY RUN, no number means anything: " if result["dry_run"] else ""
    figure.suptitle(f"{dry}{result['machine']['device']}, torch {result['machine']['torch']}, {result['commit'][:10]}")
    figure.savefig(path, dpi=120)
