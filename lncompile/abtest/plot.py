"""A test in one figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy

from lncompile.abtest.extras import require
from lncompile.abtest.sketch import LatencySketch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's blue and vermilion, told apart by everybody.
_COLOURS = ("#0072B2", "#D55E00")
_SHOWN_BUCKETS = 12


def draw(state: Mapping[str, Any], latencies: Mapping[str, LatencySketch]) -> Figure:
    """Draw three panels: latencies of both arms, speed-ups by input shape, and the speed-up as requests came in.

    Args:
        state: what :meth:`lncompile.ABTest.to_dict` returns.
        latencies: what :meth:`lncompile.ABTest.latencies` returns.

    Raises:
        ImportError: without matplotlib.
    """
    # Without pyplot, which keeps every figure and is not made for threads.
    figure: Figure = require("matplotlib.figure", "plot", "ABTest.plot").Figure(figsize=(13, 4.6), layout="constrained")
    verdict = state["verdict"]
    figure.suptitle(f"{verdict['candidate']} against {verdict['baseline']}: {verdict['outcome']}", fontweight="bold")
    left, middle, right = figure.subplots(1, 3)
    _latencies(left, latencies)
    _buckets(middle, state)
    _history(right, state)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


def _latencies(axes: Axes, latencies: Mapping[str, LatencySketch]) -> None:
    shares = numpy.linspace(0.005, 0.995, 199)
    axes.set(title="Latency", xlabel="milliseconds", ylabel="share of requests at most as long", ylim=(0, 1))
    for colour, (name, sketch) in zip(_COLOURS, latencies.items(), strict=True):
        if sketch.count == 0:
            continue
        milliseconds = [1e3 * value for value in sketch.quantiles(list(shares)) if value is not None]
        label = f"{name}: median {milliseconds[len(milliseconds) // 2]:.3g} ms, {sketch.count:,} requests"
        axes.plot(milliseconds, shares, color=colour, label=label)
    if any(sketch.count for sketch in latencies.values()):
        axes.set_xscale("log")
        # Ticks at 1, 2 and 5, in plain numbers: a narrow range has few powers of ten.
        ticks: Any = axes.xaxis.get_major_locator()
        ticks.set_params(subs=(1, 2, 5))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.legend(loc="lower right", fontsize="small")
    else:
        _nothing_yet(axes)


def _buckets(axes: Axes, state: Mapping[str, Any]) -> None:
    axes.set(title="Speed-up by input shape", xlabel=f"times as fast as {state['verdict']['baseline']}")
    tested = sorted((b for b in state["buckets"] if b["batches"]), key=lambda bucket: -bucket["batches"])
    rows = [(bucket["name"], bucket["speedup"]) for bucket in tested[:_SHOWN_BUCKETS]]
    if not rows:
        _nothing_yet(axes)
        return
    rows.append(("all", state["verdict"]["speedup"]))
    for place, (_, speedup) in enumerate(rows):
        last = place == len(rows) - 1
        if speedup["low"] is not None:
            axes.plot([speedup["low"], speedup["high"]], [place, place], color=_COLOURS[1], lw=3 if last else 1.5)
        axes.plot(speedup["estimate"], place, "D" if last else "o", color=_COLOURS[1])
    axes.axvline(1, color="black", lw=1, ls="--")
    axes.set_yticks(range(len(rows)), [name if len(name) < 32 else f"{name[:30]}…" for name, _ in rows])
    axes.invert_yaxis()


def _history(axes: Axes, state: Mapping[str, Any]) -> None:
    confidence = 100 * (1 - state["verdict"]["alpha"])
    axes.set(
        title="Speed-up as requests came in",
        xlabel="requests",
        ylabel=f"speed-up, {confidence:g}% confidence at every look",
    )
    points = [point for point in state["history"] if point["low"] is not None]
    if not points:
        _nothing_yet(axes)
        return
    requests = [point["requests"] for point in points]
    axes.plot(requests, [point["estimate"] for point in points], color=_COLOURS[1])
    axes.fill_between(
        requests, [p["low"] for p in points], [p["high"] for p in points], color=_COLOURS[1], alpha=0.2, lw=0
    )
    axes.axhline(1, color="black", lw=1, ls="--")
    # The first intervals are wide enough to hide all that follows.
    low, high = points[-1]["low"], points[-1]["high"]
    reach = 4 * max(1 - low, high - 1, 0.01)
    axes.set_ylim(max(0.0, 1 - reach), 1 + reach)


def _nothing_yet(axes: Axes) -> None:
    axes.text(0.5, 0.5, "too few requests yet", ha="center", va="center", transform=axes.transAxes, color="gray")
