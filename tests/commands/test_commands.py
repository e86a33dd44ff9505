"""The command line before and around the work: what is checked without torch, interrupts, versions, help."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from command_factories import HERE
from command_line import assert_refused, run
from typer.testing import CliRunner

import lncompile
from lncompile.cli.commands import app
from lncompile.cli.group import command_group
from lncompile.models.names import Kind, ModelError, kind_of

CLONE = HERE.parent.parent
COMMANDS = ("explain", "verify", "bench", "tune", "ab")


def in_a_process(*arguments: str, **settings):
    """The command in a process of its own, in 80 columns."""
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "lncompile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=CLONE.parent, env=environment, **settings)


# --- A file without a function ---------------------------------------------------------------------------------------


def test_a_file_without_a_function_names_those_it_defines(tmp_path):
    file = tmp_path / "fac.py"
    file.write_text("import torch\nraise SystemExit\ndef make(): ...\ndef _private(): ...\ndef other(batch): ...\n")
    error = assert_refused("explain", file, says=(f"write {file}:function", "it defines make, other\n"))
    assert "_private" not in error
    assert_refused("explain", f"{file}:", says=("it defines make, other",))
    file.write_text("class Net: ...\n")
    assert_refused("explain", file, says=("it defines Net",))
    file.write_text("x = 1\n")
    assert_refused("explain", file, says=("it defines no function yet",))
    file.write_text("def make(:\n")
    assert_refused("explain", file, says=("not valid Python", "line 1"))
    assert_refused("explain", tmp_path / "nowhere.py", says=("there is no file", "nowhere.py:function"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gpt2", Kind.BUILT_IN), ("json:loads", Kind.FACTORY), (f"{HERE}:ok", Kind.FACTORY),
     ("openai-community/gpt2", Kind.HUB), ("bert-base-uncased", Kind.HUB), ("facebook/opt-6.7b", Kind.HUB)],
)  # fmt: skip
def test_kinds_of_names(name, kind):
    assert kind_of(name) is kind


def test_folders_and_configurations(tmp_path):
    with pytest.raises(ModelError, match="holds no config"):
        kind_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert kind_of(str(tmp_path)) is Kind.FOLDER
    assert kind_of(str(tmp_path / "config.json")) is Kind.CONFIG


# --- Files to be written ---------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("lncompile.models.loading.load_model", lambda *_, **__: pytest.fail("the work has begun"))
    model = f"{HERE}:make_net"
    for command, option in (("explain", "--html"), ("ab", "--plot")):
        assert_refused(command, model, option, tmp_path, says=(option, "is a folder"))
        assert_refused(command, model, option, ".", says=(option, "is a folder"))
        assert_refused(command, model, option, tmp_path / "no" / "out.html", says=("there is no folder", option))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert_refused("explain", model, "--html", tmp_path / "out.html", says=("cannot be written", "Permission denied"))


def test_looking_whether_a_file_can_be_written_leaves_nothing_behind(tmp_path):
    kept = tmp_path / "kept.html"
    kept.write_text("kept")
    for file in (kept, tmp_path / "new.html"):
        assert_refused("explain", f"{HERE}:make_exit", "--html", file, says=("sys.exit",))
    assert [file.name for file in tmp_path.iterdir()] == ["kept.html"]
    assert kept.read_text() == "kept"


# --- Interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["typer", "torch.storage", "torch._dynamo.variables.lists"])
def test_an_interrupt_during_imports_is_quiet(module):
    """Python says of each module that it is imported; then it is interrupted."""
    command = [sys.executable, "-X", "importtime", "-m", "lncompile", "explain", f"{HERE}:make_net"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CLONE.parent)
    assert process.stderr is not None
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == module:
            break
    else:
        pytest.fail(f"{module} is not imported")
    process.send_signal(signal.SIGINT)
    printed, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed == ""
    assert [line for line in rest.splitlines() if not line.startswith("import time:")] == []


def test_an_interrupt_behind_imports_is_an_exception_again(monkeypatch):
    """What was begun can be put in order, and it ends with 130 all the same."""
    handlers = []

    def interrupted(*_, **__):
        handlers.append(signal.getsignal(signal.SIGINT))
        raise RuntimeError("a library's own words") from KeyboardInterrupt()

    monkeypatch.setattr("lncompile.models.loading.load_model", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert run("explain", f"{HERE}:make_net").exit_code == 130
    assert handlers == [before]
    assert signal.getsignal(signal.SIGINT) is before


# --- Versions, help, the group ---------------------------------------------------------------------------------------


def test_versions():
    result = run("--version")
    assert result.exit_code == 0
    # Of the package: it need not have the local part ("+cu130") that the module has.
    torch_version = importlib.metadata.version("torch")
    assert torch.__version__.startswith(torch_version)
    assert result.stdout.startswith(f"lncompile {lncompile.__version__}, torch {torch_version}, Python 3.")
    assert in_a_process("--version").stdout == result.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_in_80_columns(command):
    printed = in_a_process(*command.split(), "--help").stdout
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert not set("╭│╰") & set(printed)
    described = [
        line for line in lines if line.startswith(tuple(f"  {name} " for name in (*COMMANDS, "advise", "fold")))
    ]
    assert len(described) == (0 if command else len(COMMANDS) + 2)
    assert not any(line.endswith("...") for line in described), "cut short"
    assert "lncompile" in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "nowhere/model.py:make"),
        ("explain", "nowhere/config.json"),
        ("explain", "no_such_module:make"),
        ("explain", "--nonsense"),
        ("explain", "gpt2", "--option", "lnfold.asist=off"),
        ("explain", "gpt2", "--html", "."),
        ("verify", "gpt2", "--device", "meta"),
        ("--version",),
        ("--help",),
    ],
)
def test_arguments_are_checked_without_torch(arguments):
    """Importing torch takes seconds, and transformers as long again."""
    code = (
        "import sys, time; started = time.perf_counter()\n"
        "from lncompile.cli.commands import app\n"
        "try: app()\n"
        "finally: print(time.perf_counter() - started, sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=CLONE.parent, check=False
    )
    seconds, imported = done.stdout.splitlines()[-1].split(" ", 1)
    print(f"{' '.join(arguments)}: {float(seconds):.2f} s")
    assert imported == "[]"
    assert done.returncode == (0 if arguments[0].startswith("--") else 2)
    assert "Traceback" not in done.stderr


def named(default: str | None) -> typer.Typer:
    """Commands that say what they were called with; `explain` may be the default."""
    app = typer.Typer(cls=command_group(default=default), rich_markup_mode=None, no_args_is_help=True)

    @app.callback()
    def options(version: bool = False) -> None:
        if version:
            typer.echo("a version")

    @app.command()
    def explain(model: str = typer.Argument("gpt2"), as_json: bool = typer.Option(False, "--json")) -> None:
        typer.echo(f"explain {model} {as_json}")

    @app.command()
    def verify(model: str = typer.Argument("gpt2")) -> None:
        typer.echo(f"verify {model}")

    return app


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ("some/model", "explain some/model False\n"),
        ("--json some/model", "explain some/model True\n"),
        ("some/model --json", "explain some/model True\n"),
        ("explain some/model", "explain some/model False\n"),
        ("verify some/model", "verify some/model\n"),
        ("fac.py:verify", "explain fac.py:verify False\n"),
        ("--version verify", "a version\nverify gpt2\n"),
    ],
)
def test_a_default_command(arguments, printed):
    result = CliRunner().invoke(named("explain"), arguments.split())
    assert (result.exit_code, result.stdout) == (0, printed)


def test_a_misspelt_command_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for default in ("explain", None):
        result = CliRunner().invoke(named(default), ["explian"])
        assert result.exit_code == 2
        assert "did you mean 'explain'?" in result.stderr
    (tmp_path / "explian").mkdir()
    assert CliRunner().invoke(named("explain"), ["explian"]).stdout == "explain explian False\n"


def test_without_a_default_the_command_has_to_be_named():
    result = CliRunner().invoke(named(None), ["some/model"])
    assert result.exit_code == 2
    assert "COMMAND some/model, one of explain, verify" in result.stderr
    assert app.info.cls.default == "advise"  # that of the command itself
    assert CliRunner().invoke(named(None), ["--version", "verify"]).stdout == "a version\nverify gpt2\n"


def test_python_m_lncompile_is_the_command():
    started = time.perf_counter()
    done = in_a_process("explain", f"{HERE}:make_net", "--json")
    print(f"{time.perf_counter() - started:.1f} s")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["explain"]["folded"] == 2
