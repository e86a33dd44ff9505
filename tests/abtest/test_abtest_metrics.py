"""How an A/B test times a GPU, and its metrics and plots."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from abtesting import ONE, SimulatedTime, arms, noisy

import lncompile
from lncompile.abtest import Outcome


class FakeEvent:
    """A CUDA event of a device that is two measurements behind."""

    recorded: list[FakeEvent]

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.recorded.append(self)

    def query(self) -> bool:
        return len(self.recorded) - self.recorded.index(self) > 4

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.query()
        return 250.0


def test_events_are_read_when_the_device_gets_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "recorded", [], raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    ab = lncompile.ABTest(arms=arms(), device="cuda", warmup=0)
    for _ in range(30):
        ab(ONE)
    state = ab.to_dict()
    assert state["waiting_for_device"] == 2
    assert sum(arm["seconds"]["requests"] for arm in state["arms"]) == 28
    assert state["arms"][0]["seconds"]["p50"] == pytest.approx(0.25, rel=0.01)


def test_a_device_that_never_answers_costs_constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "recorded", [], raising=False)
    monkeypatch.setattr(FakeEvent, "query", lambda self: False)
    monkeypatch.setattr(FakeEvent, "record", lambda self, stream: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    ab = lncompile.ABTest(arms=arms(lambda value: value, lambda value: value), device="cuda", warmup=0)
    for number in range(5000):
        ab(number)
    assert ab.to_dict()["waiting_for_device"] == 4096


def test_metrics() -> None:
    from prometheus_client import generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    ab = lncompile.ABTest(arms=arms(), warmup=1, shadow=0.5, name="encoder")

    def samples() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        text = generate_latest(ab.metrics).decode()
        families = text_string_to_metric_families(text)
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def value(name: str, **labels: str) -> float:
        return samples()[(f"lncompile_ab_{name}", tuple(sorted({"test": "encoder", **labels}.items())))]

    assert numpy.isnan(value("speedup", bound="low"))
    for _ in range(800):
        ab(ONE)
    assert value("requests_total", arm="old") + value("requests_total", arm="new") == 800
    assert value("latency_seconds_count", arm="old") == value("requests_total", arm="old") - 1
    assert value("latency_seconds_bucket", arm="old", le="+Inf") == value("latency_seconds_count", arm="old")
    assert value("latency_seconds_sum", arm="new") == pytest.approx(ab.latencies()["new"].total)
    assert value("speedup", bound="low") == ab.verdict().speedup.low
    assert value("comparisons_total", result="agree") == ab.verdict().comparisons
    assert value("in_service", arm="new") == 1
    assert sum(value("outcome", outcome=outcome.value) for outcome in Outcome) == 1
    ab.take_out("new")
    assert value("in_service", arm="new") == 0


def test_several_tests_in_one_registry() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from lncompile.abtest.metrics import ABTestCollector

    registry = CollectorRegistry(auto_describe=True)
    one, two = (lncompile.ABTest(arms=arms(), name=name) for name in ("one", "two"))
    registry.register(ABTestCollector(one, two))
    text = generate_latest(registry).decode()
    assert 'lncompile_ab_requests_total{arm="old",test="one"} 0.0' in text
    assert 'lncompile_ab_requests_total{arm="old",test="two"} 0.0' in text
    assert text.count("# TYPE lncompile_ab_requests_total") == 1
    with pytest.raises(ValueError, match="different names, not 'one', 'one'"):
        ABTestCollector(one, one)


def test_plot(time: SimulatedTime, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    random = numpy.random.default_rng(0)
    ab = lncompile.ABTest(arms=arms(time.arm(noisy(random)), time.arm(noisy(random, 0.9))))
    for panel in ab.plot().axes:
        assert [text.get_text() for text in panel.texts] == ["too few requests yet"]
    for number in range(3000):
        ab(torch.empty(1 if number % 3 else 50))
    figure = ab.plot(tmp_path / "ab.png", dpi=50)
    assert (tmp_path / "ab.png").read_bytes().startswith(b"\x89PNG")
    latencies, buckets, history = figure.axes
    assert [line.get_label().split(":")[0] for line in latencies.get_lines()] == ["old", "new"]
    assert [label.get_text() for label in buckets.get_yticklabels()] == ["float32[1]", "float32[64]", "all"]
    estimates = history.get_lines()[0].get_ydata()
    assert float(estimates[-1]) == pytest.approx(1 / 0.9, rel=0.05)
    assert not any(panel.texts for panel in figure.axes)
    picture = io.BytesIO()
    ab.plot(picture, format="svg")
    assert b"<svg" in picture.getvalue()


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("prometheus_client", "metrics", lambda ab: ab.metrics),
        ("matplotlib", "plot", lambda ab: ab.plot()),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, extra: str, use: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'lncompile\[{extra}\]'"):
        use(lncompile.ABTest(arms=arms()))
