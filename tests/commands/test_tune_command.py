"""``lncompile tune``: a race before it is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_factories import HERE, make_net
from command_line import assert_refused, run
from racing import Lab, again, in_a_lab

import lncompile


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lab:
    return in_a_lab(monkeypatch, tmp_path)


def test_what_it_keeps_is_used(lab: Lab, tmp_path: Path) -> None:
    lab.seconds = {"fold alone": 0.5}
    shipped = tmp_path / "shipped.json"
    result = run("tune", f"{HERE}:make_net", "--output", str(shipped), "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    (selection,) = found["selections"]
    assert selection["chosen"] == "fold alone"
    assert [way["speedup"] for way in selection["raced"] if way["name"] == "fold alone"] == [2.0]
    assert found["kept"]["races"] == 1
    assert len(lab.files()) == 1
    lab.files()[0].unlink()
    again(lab)
    net, x = make_net()
    fast = torch.compile(
        net, backend="lnfold", options={"lnfold.select": "measure", "lnfold.selection_file": str(shipped)}
    )
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    assert not lab.calls
    assert lncompile.reports(fast)[0].selections[0].chosen == "fold alone"


def test_it_races_anew_and_says_so(lab: Lab) -> None:
    for winner in ("model", "fold alone"):
        lab.seconds = {winner: 0.5}
        result = run("tune", f"{HERE}:make_net")
        assert result.exit_code == 0, result.stderr
        text = " ".join(result.stdout.split())
        assert f"'{winner}' is chosen" in text
        assert f"{winner} 2.000 [2.000, 2.000] (12 rounds)" in text
        assert str(lab.folder) in " ".join(result.stderr.split())
        torch._dynamo.reset()


def test_a_model_with_nothing_to_race(lab: Lab) -> None:
    result = run("tune", f"{HERE}:make_linear")
    assert result.exit_code == 0, result.stderr
    assert "every way leads to the same code" in " ".join(result.stdout.split())


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    assert_refused("tune", f"{HERE}:make_net", "--output", tmp_path, says=("--output", "is a folder"))
