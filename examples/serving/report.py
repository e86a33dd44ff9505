"""The pages for people: what there is, and the test with verdict, picture, arms, kinds of batches, comparisons."""

from __future__ import annotations

import base64
import io
import math
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from serving.service import Service

#: For the response. The page is whole in itself, and the browser holds it to that.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "Cache-Control": "no-store",
}
#: Drawing takes a good part of a second of a core that the model could use.
_REDRAW_SECONDS = 5.0
_STATUS = {
    "ready": "Ready.",
    "warming up": "Warming up: the model is being compiled.",
    "shutting down": "Shutting down: requests are still answered.",
}
_TITLES = {
    "faster": "{candidate} is faster",
    "slower": "{candidate} is slower",
    "equivalent": "No difference that matters",
    "undecided": "Undecided so far",
}


class Report:
    """Renders the page. Any thread may.

    Args:
        service: whose test it is.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(ms=_milliseconds, speedup=_speedup)
        self._template, self._index = (environment.get_template(name) for name in ("ab.html", "index.html"))
        self._lock = threading.Lock()
        self._plot, self._drawn = "", float("-inf")

    def html(self, refresh: int = 10) -> str:
        """Render the page.

        Args:
            refresh: seconds after which the browser asks again, 0 for never.
        """
        state = self._service.ab.to_dict()
        buckets = [bucket for bucket in state["buckets"] if _measured(bucket)]
        buckets.sort(key=_measured, reverse=True)
        verdict = state["verdict"]
        return self._template.render(
            ab=state,
            buckets=buckets,
            without_measurements=len(state["buckets"]) - len(buckets),
            verdict=verdict,
            title=_title(verdict),
            scale=_scale(verdict["speedup"]),
            mood=_mood(verdict),
            service=self._service,
            status=status_of(self._service),
            plot=self._picture(),
            refresh=max(0, refresh),
            now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        )

    def index(self) -> str:
        """Render the page that says what there is."""
        return self._index.render(service=self._service, status=status_of(self._service))

    def _picture(self) -> str:
        """The plot as a data URL, at most a few seconds old."""
        with self._lock:
            if time.monotonic() - self._drawn > _REDRAW_SECONDS:
                picture = io.BytesIO()
                self._service.ab.plot(picture, format="svg", transparent=True)
                self._plot = "data:image/svg+xml;base64," + base64.b64encode(picture.getvalue()).decode()
                self._drawn = time.monotonic()
            return self._plot


def _measured(bucket: dict[str, Any]) -> int:
    """How many measurements a kind of batches has: none before each arm's first calls, which are not counted."""
    return sum(int(arm["requests"]) for arm in bucket["seconds"].values())


def _title(verdict: dict[str, Any]) -> str:
    if verdict["failed"]:
        return f"{' and '.join(verdict['failed'])} failed"
    if verdict["outputs_agree"] is False:
        return "Outputs differ"
    return _TITLES[verdict["outcome"]].format(**verdict)


def status_of(service: Service) -> str:
    """What the server is doing, as a sentence."""
    return f"Not able to answer: {service.broken}." if service.broken else _STATUS[service.status]


def _mood(verdict: dict[str, Any]) -> str:
    if verdict["regression"] or verdict["failed"]:
        return "bad"
    return "good" if verdict["improvement"] else "neutral"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:#.3g}".rstrip(".") if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _speedup(interval: dict[str, float | None]) -> str:
    if interval["estimate"] is None:
        return "–"
    if interval["low"] is None:
        return f"{interval['estimate']:.3f}"
    return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _scale(speedup: dict[str, float | None]) -> dict[str, float] | None:
    """Where the interval stands on a logarithmic scale around 1 that shows it well, in percent of its width."""
    low, estimate, high = (speedup[name] for name in ("low", "estimate", "high"))
    if low is None or estimate is None or high is None:
        return None
    reach = 1.3 * max(abs(math.log(low)), abs(math.log(high)), math.log(1.02))
    places = {name: 50 + 50 * math.log(value) / reach for name, value in (("low", low), ("high", high))}
    return {**places, "estimate": 50 + 50 * math.log(estimate) / reach, "end": math.exp(reach)}
