"""Results of races on disk: the next process compiles the winner alone; what is damaged is ignored."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from racing import MEASURE, Lab, again, compiled, selection
from residual import TOLERANCE, model, value

from lncompile.selection import kept


def test_another_process_compiles_the_winner_alone(lab: Lab) -> None:
    lab.seconds = {"affine absorbed": 0.5}
    net = model()
    compiled(net)(value())
    assert len(lab.compiled) > 2
    assert len(lab.files()) == 1
    again(lab)
    fast = compiled(net)
    torch.testing.assert_close(fast(x := value()), net(x), **TOLERANCE)
    assert len(lab.compiled) == 1
    assert not lab.calls
    found = selection(fast)
    assert found.chosen == "affine absorbed"
    assert found.source == str(lab.files()[0])
    assert [way.speedup for way in found.raced if way.name == "affine absorbed"] == [2.0]


def test_another_process_compiles_stock_alone(lab: Lab) -> None:
    lab.seconds = {"stock": 0.5}
    net = model()
    compiled(net)(value())
    again(lab)
    fast = compiled(net)
    fast(value())
    assert len(lab.compiled) == 1
    assert selection(fast).chosen == "stock"


@pytest.mark.parametrize(
    "change",
    [
        lambda net, x: (compiled(net), x[:3]),
        lambda net, x: (compiled(net, minimum_speedup=1.1), x),
        lambda net, x: (compiled(net, defer="off"), x),
        lambda net, x: (compiled(model(width=8)), x[:, :8]),
        lambda net, x: (torch.compile(net, backend="lnfold", options={**MEASURE, "epilogue_fusion": False}), x),
    ],
    ids=["shape", "least speed-up", "option", "graph", "Inductor's option"],
)
def test_what_differs_is_raced_for_itself(lab: Lab, change: Any) -> None:
    net, x = model(), value()
    compiled(net)(x)
    again(lab)
    fast, other = change(net, x)
    fast(other)
    assert lab.calls, "it was raced"
    assert len(lab.files()) == 2


def test_another_number_of_threads_is_raced_for_itself(lab: Lab) -> None:
    net = model()
    compiled(net)(value())
    again(lab)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        compiled(net)(value())
    finally:
        torch.set_num_threads(threads)
    assert lab.calls


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "selections": []}', '{"format": 99}', "half"])
def test_a_damaged_file_is_ignored_and_replaced(lab: Lab, text: str, caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    compiled(net)(value())
    (file,) = lab.files()
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2] if text == "half" else text)
    again(lab)
    with caplog.at_level(logging.WARNING, logger="lncompile"):
        compiled(net)(value())
    assert lab.calls, "it was raced anew"
    assert any(str(file) in record.getMessage() and "ignored" in record.getMessage() for record in caplog.records)
    assert kept.read_file(file), "and the file is whole again"
    assert not [path for path in lab.folder.iterdir() if path != file], "and nothing is left beside it"


def test_a_way_that_there_is_not_is_raced_anew(lab: Lab) -> None:
    net = model()
    compiled(net)(value())
    (file,) = lab.files()
    (key, found), = kept.read_file(file).items()  # fmt: skip
    kept.write_file(file, {key: dataclasses.replace(found, chosen="by magic")})
    again(lab)
    compiled(net)(value())
    assert lab.calls


def test_a_folder_that_cannot_be_written_costs_a_line(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lab.folder.write_text("a file in its place")
    with caplog.at_level(logging.WARNING, logger="lncompile"):
        compiled(net := model())(x := value())
    assert any("not kept" in record.getMessage() for record in caplog.records)
    torch.testing.assert_close(compiled(net)(x), net(x), **TOLERANCE)


def test_a_file_that_was_shipped(lab: Lab, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.seconds = {"affine absorbed": 0.5}
    net = model()
    with kept.raced_anew() as made:
        compiled(net)(value())
    shipped = tmp_path / "shipped.json"
    kept.write_file(shipped, made)
    for file in lab.files():
        file.unlink()
    again(lab)
    fast = compiled(net, selection_file=str(shipped))
    fast(value())
    assert (selection(fast).chosen, selection(fast).source) == ("affine absorbed", str(shipped))
    assert len(lab.compiled) == 1
    again(lab)
    monkeypatch.setenv(kept.FILE_VARIABLE, str(shipped))
    compiled(net)(value())
    assert len(lab.compiled) == 1
    assert not lab.files(), "nothing was raced"


def test_a_shipped_file_that_is_not_there_costs_a_line(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lncompile"):
        compiled(model(), selection_file="/nowhere/shipped.json")(value())
    assert any("/nowhere/shipped.json" in record.getMessage() for record in caplog.records)
    assert lab.calls


def test_raced_anew_whatever_was_kept(lab: Lab) -> None:
    net = model()
    compiled(net)(value())
    again(lab)
    with kept.raced_anew() as made:
        compiled(net)(value())
    assert lab.calls
    assert len(made) == 1
