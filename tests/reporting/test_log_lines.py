"""What the log says of a model: one line when it is first compiled, a warning where nothing folds."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from torch.nn import functional

D = 16


class Folds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class Stays(Folds):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(functional.relu(self.linear(x)))


class None_(Folds):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.linear(x))


class Breaks(Folds):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x))
        torch._dynamo.graph_break()
        return self.norm(x)


Lines = Callable[[], list[tuple[int, str]]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, without_inductor: None) -> Lines:
    """What was logged since the last time, of information and warnings."""
    caplog.set_level(logging.INFO, logger="lncompile")

    def taken() -> list[tuple[int, str]]:
        found = [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "lncompile"]
        caplog.clear()
        return found

    return taken


def compiled(module: nn.Module, dtype: torch.dtype = torch.float64, **options: object) -> Callable[[Tensor], Tensor]:
    return torch.compile(randomise(module.to(dtype)).eval(), backend="lnfold", options=options)


def value(rows: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, D, dtype=dtype)


def test_one_line_at_the_first_compilation(lines: Lines) -> None:
    function = compiled(Folds())
    for rows in (3, 4, 5):
        function(value(rows))
    ((level, text),) = lines()
    assert level == logging.INFO
    assert text.startswith("test_log_lines.py:")
    assert "1 of 1 LayerNorms folded into 2 centered weights" in text
    assert "\n" not in text
    compiled(Folds(), torch.float32)(value(dtype=torch.float32))
    assert [level for level, _ in lines()] == [logging.INFO], "another model of the class has a line of its own"
    torch._dynamo.reset()
    function(value())
    assert len(lines()) == 1, "it is compiled for the first time again"


def test_a_warning_where_nothing_folds_once_with_the_reason_and_what_to_do(lines: Lines) -> None:
    function = compiled(Stays())
    for rows in (3, 4, 5):
        function(value(rows))
    ((level, text),) = lines()
    assert level == logging.WARNING
    assert (
        "0 of 1 LayerNorms folded; left: 1 non_commuting. non_commuting: the stream comes out of an activation" in text
    )
    assert "relu (test_log_lines.py:" in text
    assert text.endswith("To let them fold: put a linear layer between that operation and the norm.")
    assert "\n" not in text
    compiled(Stays(), torch.float32)(value(dtype=torch.float32))
    assert [level for level, _ in lines()] == [logging.INFO], "the same code for the same reason is no news"
    torch._dynamo.reset()
    function(value())
    assert [level for level, _ in lines()] == [logging.WARNING]


def test_a_graph_without_norms_is_not_spoken_of(lines: Lines) -> None:
    compiled(None_())(value())
    assert lines() == []


def test_what_folds_in_front_of_a_graph_break_is_enough(lines: Lines) -> None:
    """The norm behind it reads what the graph in front hands over, and stays."""
    compiled(Breaks())(value())
    (first, second) = lines()
    assert (first[0], second[0]) == (logging.INFO, logging.INFO)
    assert ("1 of 1" in first[1], "0 of 1" in second[1]) == (True, True)


@pytest.mark.parametrize("training", ["auto", "off"])
def test_gradients_that_keep_norms_from_folding_come_first(training: str, lines: Lines) -> None:
    function = compiled(Folds(), **{"lnfold.training": training})
    with torch.enable_grad():
        function(value())
    ((level, text),) = lines()
    assert level == logging.WARNING
    place, _, rest = text.partition(": ")
    assert place.startswith("test_log_lines.py:")
    assert rest.startswith("Wrap the call in torch.no_grad() (or torch.inference_mode()): gradients are recorded")
    assert "Without them 1 of 1 LayerNorms fold, with them 0." in rest
    function(value())
    assert lines() == [], "compiled once more, without gradients"


def test_a_model_that_is_trained_is_not_told_to_stop_that(lines: Lines) -> None:
    module = Folds()
    function = compiled(module)
    module.train()
    with torch.enable_grad():
        function(value())
    ((level, text),) = lines()
    assert level == logging.WARNING
    assert "Wrap the call" not in text
    assert "training: in training its 2 weights would be centered at every step" in text
