"""What the command line says of what cannot be: models, options, factories that fail."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest
import torch
from command_factories import HERE as FACTORIES
from command_factories import Net
from command_line import assert_refused, run
from places import ROOT

import lncompile.models.loading
from lncompile import cli
from lncompile.models.factories import ModelError
from lncompile.models.loading import load_model

HERE = Path(__file__).resolve()


def make_lonely():
    return Net()


def make_nothing():
    return "no model"


def make_odd_inputs():
    return Net(), 3


def make_wrong_inputs():
    return Net(), (torch.randn(2, 9),)


def make_trouble():
    raise RuntimeError("no weights on this disk\nand more words")


def make_too_large():
    return Net(), torch.empty(1 << 60)


not_callable = 3


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("make_trouble", ("the factory", "RuntimeError: no weights on this disk", "test_cli_refusals.py:")),
        ("make_nothing", ("returned a str", "torch.nn.Module")),
        ("make_odd_inputs", ("a int for its inputs", "tuple of positional arguments")),
        ("make_wrong_inputs", ("cannot be called with the inputs that came with it",)),
        ("make_lonely", ("return (model, inputs)",)),
        ("make_too_large", ("out of memory", "--device meta")),
        ("make_no_such", ("there is no 'make_no_such'", "it defines", "make_lonely")),
        ("not_callable", ("is a int",)),
    ],
)
def test_a_factory_that_fails(factory, says):
    assert_refused("explain", f"{HERE}:{factory}", says=says)


def test_a_file_that_cannot_be_imported(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind\n")
    assert_refused("explain", f"{tmp_path}/broken.py:make", says=("cannot be imported", "nothing_of_the_kind"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:make", ("there is no module 'no_such_module'", "current folder")),
        ("nowhere/at_all.py:make", ("there is no file",)),
        (":make", ("module:function",)),
        ("nowhere/at_all.py", ("at_all.py:function",)),
        ("nobody/no-such-model", ("cannot be reached", "network")),
        ("no such name!", ("there is no model",)),
    ],
)
def test_a_model_that_cannot_be_had(name, says):
    assert_refused("explain", name, says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-o", "lnfold.asist=off"), ("lnfold.asist", "did you mean 'lnfold.assist'")),
        (("-o", "lnfold.assist=maybe"), ("lnfold.assist", "'auto' or 'off'")),
        (("-o", "lnfold.assist=false"), ("lnfold.assist", "write 'off'")),
        (("-o", "max_autotune"), ("KEY=VALUE",)),
        (("--mode", "fastest"), ("fastest",)),
        (("--device", "quantum"), ("--device", "quantum")),
        (("--device", "cuda:99"), ("no device 'cuda:99'",)),
        (("--html", "/no/such/folder/out.html"), ("there is no folder",)),
    ],
)
def test_options_that_cannot_be(arguments, says):
    assert_refused("explain", f"{FACTORIES}:make_net", *arguments, says=says)


@pytest.mark.parametrize("arguments", [("--batch", "0"), ("--tokens", "many"), ("--dtype", "int3"), ("--nonsense",)])
def test_usage_errors_end_with_exit_code_2(arguments):
    assert run("explain", *arguments).exit_code == 2


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    for command in ("verify", "bench", "ab"):
        assert_refused(command, f"{FACTORIES}:make_net", says=("no-such-compiler",))


def test_traceback_shows_where():
    result = run("explain", f"{HERE}:make_trouble", "--traceback")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "in make_trouble" in result.stderr


def test_an_interrupt_is_no_answer(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lncompile.models.loading, "load_model", interrupt)
    assert run("explain").exit_code == 130


@pytest.mark.parametrize("command", ["explain", "verify", "bench", "ab"])
def test_help_names_the_kinds_of_models(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    for words in ("config.json", "module:factory", "--json", "--option"):
        assert words in result.output


def test_a_model_error_is_an_exception_of_ours():
    with pytest.raises(ModelError):
        load_model("no_such_module:make")


def test_the_installed_command_is_this_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["lncompile"].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.main
