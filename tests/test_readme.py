"""The README and docs/ say of models and reasons what code and tests say, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import more_architectures
import pytest
from architectures import ARCHITECTURES, Architecture

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()
KINDS: dict[str, list[Architecture]] = {
    "text encoders": list(more_architectures.TEXT_ENCODERS),
    "text decoders": list(more_architectures.TEXT_DECODERS),
    "sequence to sequence": list(more_architectures.SEQ2SEQ),
    "vision": list(more_architectures.VISION_MODELS),
    "audio": list(more_architectures.AUDIO_MODELS),
    "multimodal": list(more_architectures.MULTIMODAL_MODELS),
    "time series": list(more_architectures.TIME_SERIES_MODELS),
    "end to end through Inductor": list(ARCHITECTURES),
}


def row(kind: str, models: list[Architecture]) -> str:
    counts = (len(models), *(sum(getattr(m, name) for m in models) for name in ("sites", "folded", "centerings")))
    return f"| {kind} | {' | '.join(map(str, counts))} |"


def test_totals_of_models() -> None:
    everything = [model for models in KINDS.values() for model in models]
    rows = [row(kind, models) for kind, models in KINDS.items()] + [row("**all**", everything)]
    assert "\n".join(rows) in README, "\n".join(rows)
    assert f"{len(everything)} models are tested" in README
    assert len(everything) - len(ARCHITECTURES) == len(more_architectures.MORE_ARCHITECTURES)


def test_every_reason_is_explained() -> None:
    from lncompile import Reason

    explained = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert {reason.value for reason in Reason} <= explained


def test_models_through_inductor_are_listed() -> None:
    for model in ARCHITECTURES:
        centerings = f" (@{model.centerings})" if model.centerings else ""
        assert f"{model.name} {model.folded}/{model.sites}{centerings} |" in EVIDENCE


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked to: lower case, without punctuation, joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_nothing_is_left_to_be_filled_in() -> None:
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        assert "@@" not in document.read_text(), document
