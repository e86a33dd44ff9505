"""Folding a checkpoint that is stopped half way, or goes wrong: no half target, and nothing done twice."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import randomise
from checkpoints import PROMPT, contents, gpt2, saved
from plan_models import IDS, Scaled
from safetensors.torch import save_file

import lncompile
from lncompile.plans import checkpoint
from lncompile.plans.safetensors_file import CheckpointError, SafetensorsFile


def killed_at(moment: int, do: Callable[[Callable[..., None]], object]) -> bool:
    """Do something in a process that kills itself at its n-th step; returns whether it got that far."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    steps = 0

    def step(*arguments: object) -> None:
        nonlocal steps
        steps += 1
        if steps == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        # Every look at the disk is a step, and every piece that is written.
        for name in ("_sync", "_write_text", "_digest", "_verify"):
            setattr(checkpoint, name, behind(step, getattr(checkpoint, name)))
        do(step)
    finally:
        os._exit(0)


def behind(step: Callable[..., None], function: Callable[..., object]) -> Callable[..., object]:
    def run(*arguments: object) -> object:
        step()
        result = function(*arguments)
        step()
        return result

    return run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked there")
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_leaves_no_half_target_and_goes_on(seed: int, tmp_path: Path) -> None:
    model = gpt2()
    source, target = saved(model, tmp_path / "model", "20KB"), tmp_path / "folded"
    plan = lncompile.plan(model, **PROMPT)
    plan.apply_to_checkpoint(source, tmp_path / "expected")
    chance = random.Random(seed)
    killed = 0
    while killed_at(chance.randint(1, 60), lambda step: plan.apply_to_checkpoint(source, target, step)):
        killed += 1
        if target.exists():
            break  # killed when all was done
    assert killed >= 2
    assert contents(target) == contents(tmp_path / "expected")


def test_interrupted_behind_every_file(tmp_path: Path) -> None:
    model = gpt2()
    source, target = saved(model, tmp_path / "model", "20KB"), tmp_path / "folded"
    plan = lncompile.plan(model, **PROMPT)
    shards = len(list(source.glob("*.safetensors")))
    for count in range(1, shards + 1):
        with pytest.raises(KeyboardInterrupt):
            plan.apply_to_checkpoint(source, target, interrupted_in(count))
        assert not target.exists()
        assert len(list((tmp_path / ".folded.folding" / "model").glob("*.safetensors"))) == count - 1
    assert len(plan.apply_to_checkpoint(source, target).resumed) == shards - 1


def interrupted_in(shard: int) -> Callable[..., None]:
    def say(words: str, share: float | None = None) -> None:
        if words.startswith(f"{shard} of"):
            raise KeyboardInterrupt

    return say


def test_what_is_finished_is_checked_before_it_is_taken_over(tmp_path: Path) -> None:
    model = gpt2()
    source, target = saved(model, tmp_path / "model", "20KB"), tmp_path / "folded"
    plan = lncompile.plan(model, **PROMPT)
    work = tmp_path / ".folded.folding"
    with pytest.raises(KeyboardInterrupt):
        plan.apply_to_checkpoint(source, target, interrupted_in(4))
    finished = sorted((work / "model").glob("*.safetensors"))
    assert len(finished) == 3
    # One is damaged since, and one lies there that is of something else.
    content = finished[1].read_bytes()
    finished[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (work / "model" / "of another.safetensors").write_bytes(b"")
    written = plan.apply_to_checkpoint(source, target)
    assert written.resumed == (finished[0].name, finished[2].name)
    plan.apply_to_checkpoint(source, tmp_path / "expected")
    assert contents(target) == contents(tmp_path / "expected")


@pytest.mark.parametrize("change", ["plan", "source"])
def test_what_another_plan_or_source_made_is_made_anew(change: str, tmp_path: Path) -> None:
    model = gpt2()
    source, target = saved(model, tmp_path / "model", "20KB"), tmp_path / "folded"
    plan = lncompile.plan(model, **PROMPT)
    with pytest.raises(KeyboardInterrupt):
        plan.apply_to_checkpoint(source, target, interrupted_in(4))
    if change == "plan":
        plan = dataclasses.replace(plan, center=plan.center[1:])
    else:
        shutil.rmtree(source)
        saved(gpt2(torch.float32), source, "20KB")
    assert plan.apply_to_checkpoint(source, target).resumed == ()
    plan.apply_to_checkpoint(source, tmp_path / "expected")
    assert contents(target) == contents(tmp_path / "expected")


@pytest.mark.skipif(os.name != "posix", reason="folders are not locked there")
def test_two_at_once(tmp_path: Path) -> None:
    model = gpt2()
    source, target = saved(model, tmp_path / "model", "20KB"), tmp_path / "folded"
    plan, refused = lncompile.plan(model, **PROMPT), []

    def say(words: str, share: float | None = None) -> None:
        if not refused:
            with pytest.raises(CheckpointError, match="another process is writing") as error:
                plan.apply_to_checkpoint(source, target)
            refused.append(error)

    plan.apply_to_checkpoint(source, target, say)
    assert refused
    assert target.exists()


def test_what_is_written_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    source = saved(model, tmp_path / "model")
    plan = lncompile.plan(model, **PROMPT)
    monkeypatch.setattr(checkpoint, "center_in_place", lambda entry, tensor: False)
    with pytest.raises(CheckpointError, match="cannot be centered"):
        plan.apply_to_checkpoint(source, tmp_path / "folded")
    monkeypatch.undo()
    read = SafetensorsFile.read

    def damaged(path: Path) -> SafetensorsFile:
        if path.name.endswith(".writing"):
            whole = path.read_bytes()
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        return read(path)

    monkeypatch.setattr(SafetensorsFile, "read", staticmethod(damaged))
    with pytest.raises(CheckpointError, match="reads back other"):
        plan.apply_to_checkpoint(source, tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_a_scale_in_another_file_that_changed_meanwhile(tmp_path: Path) -> None:
    """What was finished was made of the old one."""
    model = randomise(Scaled().double()).eval()
    plan, source, target = lncompile.plan(model, IDS), tmp_path / "model", tmp_path / "folded"
    state = model.state_dict()
    source.mkdir()
    save_file({name: value for name, value in state.items() if name != "scale"}, source / "a.safetensors")
    for values in (state["scale"], torch.randn(16, dtype=torch.float64)):
        save_file({"scale": values}, source / "b.safetensors")
        if not target.exists() and not (tmp_path / ".folded.folding").exists():
            with pytest.raises(KeyboardInterrupt):
                plan.apply_to_checkpoint(source, target, interrupted_in(2))
    written = plan.apply_to_checkpoint(source, target)
    assert written.resumed == ()
    plan.apply_to_checkpoint(source, tmp_path / "expected")
    assert contents(target) == contents(tmp_path / "expected")
