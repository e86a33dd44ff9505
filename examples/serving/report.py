"""The test as a page for people: verdict, picture, arms, kinds of requests, comparisons."""

from __future__ import annotations

import base64
import io
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from serving.service import Service

#: Drawing takes a good part of a second of a core that the model could use.
_REDRAW_SECONDS = 5.0
_TITLES = {
    "faster": "Faster",
    "slower": "Slower",
    "equivalent": "No difference that matters",
    "undecided": "Undecided so far",
}


class Report:
    """Renders the page. Any thread may.

    Args:
        service: whose test it is.

    Attributes:
        HEADERS: for the response. The page is whole in itself, and the browser holds it to that.
    """

    HEADERS = {  # noqa: RUF012
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        "Cache-Control": "no-store",
    }

    def __init__(self, service: Service) -> None:
        self._service = service
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(ms=_milliseconds, speedup=_speedup, place=_place)
        self._template = environment.get_template("ab.html")
        self._lock = threading.Lock()
        self._plot, self._drawn = "", float("-inf")

    def html(self, refresh: int = 10) -> str:
        """Render the page.

        Args:
            refresh: seconds after which the browser asks again, 0 for never.
        """
        state = self._service.ab.to_dict()
        verdict = state["verdict"]
        return self._template.render(
            ab=state,
            verdict=verdict,
            title=_title(verdict),
            mood=_mood(verdict),
            service=self._service,
            plot=self._picture(),
            refresh=max(0, refresh),
            now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        )

    def _picture(self) -> str:
        """The plot as a data URL, at most a few seconds old."""
        with self._lock:
            if time.monotonic() - self._drawn > _REDRAW_SECONDS:
                picture = io.BytesIO()
                self._service.ab.plot(picture, format="svg", transparent=True)
                self._plot = "data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode()
                self._drawn = time.monotonic()
            return self._plot


def _title(verdict: dict[str, Any]) -> str:
    if verdict["failed"]:
        return f"{' and '.join(verdict['failed'])} failed"
    if verdict["outputs_agree"] is False:
        return "Outputs differ"
    return _TITLES[verdict["outcome"]]


def _mood(verdict: dict[str, Any]) -> str:
    if verdict["regression"] or verdict["failed"]:
        return "bad"
    return "good" if verdict["improvement"] else "neutral"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _speedup(interval: dict[str, float | None]) -> str:
    if interval["estimate"] is None:
        return "–"
    if interval["low"] is None:
        return f"{interval['estimate']:.3f}"
    return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _place(ratio: float) -> float:
    """Where a speed-up stands on the scale from a half to twice as fast, in percent."""
    low, high = 0.5, 2.0
    ratio = min(max(ratio, low), high)
    # Symmetric around 1: half as fast is as far from it as twice as fast.
    return 50.0 + 50.0 * (ratio - 1 if ratio >= 1 else 1 - 1 / ratio)
