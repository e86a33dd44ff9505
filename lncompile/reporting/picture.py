"""The fold report as a picture: one HTML page with the streams drawn layer by layer and every norm explained.

A row for every norm, as ``git log --graph`` draws commits: what enters the stream in front of the norm on the left, the
streams as lines in the middle, the norm and its verdict on the right. The page needs nothing else: no network, no
fonts, no library.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

import jinja2
import torch

from lncompile.passes.decisions import PartKind, Stream, StreamPart, Verdict
from lncompile.reporting.report import FoldReport
from lncompile.reporting.selection import in_words as selection_in_words

#: Height of a row and distance of two lanes, in pixels; where what enters meets the stream, and where the norm stands.
ROW, LANE, ENTERS, NORM = 34, 22, 10, 24


@dataclass(frozen=True)
class Segment:
    """A piece of a stream in one row: from ``top`` to ``bottom``, in pixels, centered or not."""

    x: int
    top: int
    bottom: int
    style: str


@dataclass(frozen=True)
class Row:
    """A norm, what enters its stream in front of it, and the lines beside it."""

    index: int
    site: Verdict
    verdict: str
    name: str
    x: int
    layer: str
    starts_layer: bool
    entering: tuple[StreamPart, ...]
    lines: tuple[Segment, ...] = field(default=())


def draw(report: FoldReport, title: str = "", description: str = "") -> str:
    """Draw a report.

    Args:
        report: of :func:`lncompile.explain` or :func:`lncompile.reports`.
        title: the model's name.
        description: a line about it.

    Returns:
        The page.

    Example:
        >>> pathlib.Path("out.html").write_text(draw(lncompile.explain(model, input_ids), "my model"))
    """
    rows = lay_out(report)
    weight_bytes: Counter[str] = Counter()  # one parameter may have several copies
    for weight in report.weights:
        weight_bytes[weight.name] += weight.bytes
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["bytes"] = readable_bytes
    style, script = _file("picture.css"), _file("picture.js")
    return environment.from_string(_file("picture.html")).render(
        report=report,
        title=title or "LayerNorms",
        description=description,
        rows=rows,
        layers=[list(group) for _, group in itertools.groupby(rows, key=lambda row: row.layer)],
        verdicts=Counter(row.verdict for row in rows),
        reasons=Counter((site.reason, site.remedy) for site in report.sites if site.reason is not None).most_common(),
        weight_bytes=weight_bytes,
        entry_name=entry_name,
        selection_in_words=selection_in_words,
        labels=layer_labels(rows),
        width=max((line.x for row in rows for line in row.lines), default=LANE) + LANE,
        height=ROW,
        enters=ENTERS,
        norm=NORM,
        torch_version=torch.__version__,
        style=style,
        script=script,
        # What the page may do: show itself. Nothing is fetched, and no other script runs, whatever a name contains.
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
    )


def lay_out(report: FoldReport) -> list[Row]:
    """Give every norm a row and every stream a lane.

    Args:
        report: what is drawn.

    Returns:
        The rows, in the order of the report.
    """
    streams = [*report.streams, *_lone_norms(report)]
    lanes = _lanes([_norms(stream) for stream in streams])
    entering: dict[int, tuple[StreamPart, ...]] = {}
    lane_of: dict[int, int] = {}
    lines: dict[int, list[Segment]] = {index: [] for index in range(report.total)}
    for stream, lane in zip(streams, lanes, strict=True):
        x = LANE * lane + LANE // 2
        pending: list[StreamPart] = []
        for part in stream.parts:
            if part.kind is not PartKind.NORM:
                pending.append(part)
                continue
            assert part.site is not None  # a norm stands in the report
            entering[part.site], pending, lane_of[part.site] = tuple(pending), [], lane
        for row, line in _stream_lines(_norms(stream), x, report):
            lines[row].append(line)
        # A stream that starts from the norm one row further up goes on from there, interrupted.
        first = _norms(stream)[0]
        above = first - 1
        if any(part.site == above for part in entering[first]) and lane_of.get(above) == lane:
            lines[above].append(Segment(x, NORM, ROW, "output"))
            lines[first].append(Segment(x, 0, ENTERS, "output"))
    rows: list[Row] = []
    for index, site in enumerate(report.sites):
        layer = layer_of(site.name)
        name = shortened(site.name, layer)
        starts = not rows or rows[-1].layer != layer
        x = LANE * lane_of[index] + LANE // 2
        rows.append(Row(index, site, verdict_of(site), name, x, layer, starts, entering[index], tuple(lines[index])))
    return rows


def _lone_norms(report: FoldReport) -> list[Stream]:
    """A stream for every norm that no stream of the report mentions (a graph that was compiled untouched)."""
    known = {part.site for stream in report.streams for part in stream.parts if part.kind is PartKind.NORM}
    return [
        Stream((StreamPart(PartKind.NORM, site.name, site.location, site.folded, "", (), index),))
        for index, site in enumerate(report.sites)
        if index not in known
    ]


def _norms(stream: Stream) -> list[int]:
    """The rows of the norms that read a stream."""
    return [part.site for part in stream.parts if part.kind is PartKind.NORM and part.site is not None]


def _lanes(norms: Sequence[Sequence[int]]) -> list[int]:
    """A lane for every stream, so that streams beside each other are in different ones; the lowest that is free."""
    lanes = [0] * len(norms)
    last: list[int] = []  # by lane, the row in which its latest stream ends
    for stream in sorted(range(len(norms)), key=lambda stream: min(norms[stream])):
        free = [lane for lane, row in enumerate(last) if row < min(norms[stream])]
        lanes[stream] = free[0] if free else len(last)
        if not free:
            last.append(-1)
        last[lanes[stream]] = max(norms[stream])
    return lanes


def _stream_lines(norms: Sequence[int], x: int, report: FoldReport) -> list[tuple[int, Segment]]:
    """The pieces of one stream, row by row: each is drawn as the next norm that reads it finds it."""
    pieces = []
    first, last = min(norms), max(norms)
    remaining = sorted(norms)
    for row in range(first, last + 1):
        style = "centered" if report.sites[remaining[0]].folded else "raw"
        top = ENTERS if row == first else 0
        if row != remaining[0]:
            pieces.append((row, Segment(x, top, ROW, style)))
            continue
        pieces.append((row, Segment(x, top, NORM, style)))
        remaining.pop(0)
        if remaining:
            style = "centered" if report.sites[remaining[0]].folded else "raw"
            pieces.append((row, Segment(x, NORM, ROW, style)))
    return pieces


def verdict_of(site: Verdict) -> str:
    """Return what became of a norm: ``"folded"``, ``"run_time"`` (folded, centered at run time) or ``"stays"``."""
    if not site.folded:
        return "stays"
    return "run_time" if site.centered_after else "folded"


def layer_of(name: str) -> str:
    """Return the layer a module stands in: its path up to the last number in front of its own name, or ``""``.

    Example:
        >>> layer_of("transformer.h.0.ln_1")
        'transformer.h.0'
    """
    parts = name.split(".")[:-1]
    numbered = [position for position, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[-1] + 1]) if numbered else ""


def common_path(layers: Sequence[str]) -> str:
    """Return the module path that all layers have in front of their container's name, with its dot; or ``""``.

    Example:
        >>> common_path(["bert.encoder.layer.0", "bert.encoder.layer.1"])
        'bert.encoder.'
    """
    folders = zip(*(layer.split(".")[:-2] for layer in layers), strict=False)
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1 and not parts[0].isdigit(), folders)
    return "".join(f"{parts[0]}." for parts in shared)


def shortened(name: str, layer: str = "") -> str:
    """Return a module's name as it is told apart in a row, where there is no room for all of it.

    Args:
        name: the module's path; several are joined by " · ".
        layer: the layer of the row: what stands in it is called relative to it.

    Example:
        >>> shortened("bert.encoder.layer.0.output.dense", "bert.encoder.layer.1")
        'layer.0.output.dense'
    """
    names = []
    for path in name.split(" · "):
        other = layer_of(path)
        if layer and path.startswith(f"{layer}."):
            names.append(path.removeprefix(f"{layer}."))
        elif other:
            names.append(".".join(other.split(".")[-2:]) + path.removeprefix(other))
        else:
            names.append(".".join(path.split(".")[-2:]))
    return " · ".join(names)


def entry_name(part: StreamPart, row: Row) -> str:
    """Return what a part that enters in front of a row's norm is called there."""
    if part.site is not None and part.site == row.index - 1:
        return "the norm above"
    if part.kind is PartKind.WEIGHTS and not layer_of(part.name) and part.name not in part.parameters:
        return part.name.rpartition(".")[2]  # an embedding in front of the first layer
    return shortened(part.name, row.layer)


def layer_labels(rows: Sequence[Row]) -> dict[int, str]:
    """Return what each layer is called beside its first row: ``"h.0"``, the tower's name in front of its first layer.

    Args:
        rows: all rows.
    """
    containers = dict.fromkeys(row.layer.rpartition(".")[0] for row in rows if row.layer)
    root = common_path([row.layer for row in rows if row.layer])
    labels: dict[int, str] = {}
    last = ""
    for row in rows:
        container = row.layer.rpartition(".")[0]
        if not row.starts_layer or not row.layer:
            continue
        label = ".".join(row.layer.split(".")[-2:])
        tower = row.layer.removeprefix(root).partition(".")[0]
        is_new = len(containers) > 1 and container != last and not label.startswith(f"{tower}.")
        labels[row.index] = f"{tower} {label}" if is_new else label
        last = container
    return labels


def readable_bytes(number: float) -> str:
    """Return a number of bytes in a unit that suits it: ``"1.5 KiB"``."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _file(name: str) -> str:
    return resources.files("lncompile.reporting").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What a content security policy calls an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
