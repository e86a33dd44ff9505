"""Pages in headless Chromium: the document after its scripts ran."""

from __future__ import annotations

import html.parser
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Elements that have no end.
VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())


@dataclass
class Element:
    """An element of a page, with what is inside it."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    def elements(self) -> Iterator[Element]:
        """Itself and all elements inside it."""
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.elements()

    def find(self, tag: str = "", **attributes: str) -> list[Element]:
        """Elements of a tag, of a class (``class_``), or with an attribute."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [
            element
            for element in self.elements()
            if (not tag or element.tag == tag)
            and all(value in (element.attributes.get(key) or "").split() for key, value in wanted.items())
        ]

    @property
    def text(self) -> str:
        """The text inside it, each gap one space."""
        pieces = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join(" ".join(pieces).split())


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if any(element.tag == tag for element in self.open[1:]):
            while self.open.pop().tag != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Element:
    """Return the elements of a page."""
    reader = _Reader()
    reader.feed(page)
    return reader.root


def load(page: Path, *, width: int = 1280) -> Element:
    """Return a page as it is after its scripts ran; skips the test where there is no Chromium.

    Args:
        page: the file.
        width: of the window, in pixels.
    """
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser to load the page in: none of {', '.join(NAMES)} is installed")
    # Its sandbox needs rights that containers lack; the page is our own.
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=1000", f"--window-size={width},900"]
    profile = f"--user-data-dir={page.parent / 'browser'}"
    done = subprocess.run(
        [browser, *flags, profile, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )
    return parse(done.stdout)
