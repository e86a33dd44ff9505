"""Commands that behave: what cannot be is refused at once and in words, and only an answer ends like one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import typer
from command_line import answer, assert_refused, run
from torch import nn
from typer.testing import CliRunner

import lncompile
from lncompile.cli.group import command_group
from lncompile.factories import call_factory
from lncompile.machine import available_memory
from lncompile.model_names import Kind, ModelError, kind_of
from lncompile.models import inputs_of_length, load_model, randomise

HERE = Path(__file__).resolve()
CLONE = HERE.parent.parent
COMMANDS = ("explain", "verify", "bench", "ab")
TINY = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61, "bos_token_id": 1,
        "eos_token_id": 2, "architectures": ["GPT2LMHeadModel"]}  # fmt: skip


class Net(nn.Module):
    """Two norms that fold."""

    def __init__(self, spoiled: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.second, self.last = nn.Linear(8, 8), nn.LayerNorm(8)
        self.spoiled = spoiled

    def forward(self, x):
        return self.last(self.second(self.norm(self.first(x)))) + self.spoiled


def make_net():
    return randomise(Net()), torch.randn(2, 8)


def make_sized(batch=2, tokens=3):
    return randomise(Net()), torch.randn(batch, tokens, 8)


def make_seeded(seed=7):
    return randomise(Net(), seed), torch.full((2, 8), float(seed))


def make_any(**sizes):
    return randomise(Net()), torch.full((2, 8), float(sum(sizes.values())))


def make_seeding():
    torch.manual_seed(3)
    return Net(), torch.randn(2, 8)


def make_constant():
    model = nn.utils.skip_init(nn.LayerNorm, 8)
    return model, torch.ones(2, 8)


def make_transformer():
    return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY)))


def make_exit():
    sys.exit(0)


def make_exit_with_words():
    sys.exit("no licence")


def make_parsed():
    import argparse

    argparse.ArgumentParser().parse_args(["--nothing"])


def make_typer_exit():
    raise typer.Exit(0)


class Leaving(Net):
    def forward(self, x):
        if torch.compiler.is_compiling():
            return super().forward(x)
        raise SystemExit(0)


def make_leaving():
    return randomise(Leaving()), torch.randn(2, 8)


def make_large(batch=1):
    return randomise(Net()), torch.empty(batch << 40)


class Tied(nn.Module):
    """Its tensors are on the CPU whatever the default device is, and one parameter is in two places."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 8, device="cpu"), nn.LayerNorm(8, device="cpu")
        self.head = nn.Linear(8, 11, bias=False, device="cpu")
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.ones(8, device="cpu"))

    def forward(self, ids):
        return self.head(self.norm(self.table(ids) * self.scale))


def make_tied():
    return Tied(), torch.zeros(2, 3, dtype=torch.int64, device="cpu")


def make_on_meta():
    with torch.device("meta"):
        return Net(), torch.empty(2, 8)


def ok():
    return make_net()


def in_a_process(*arguments: str, **settings):
    """The command in a process of its own, in 80 columns."""
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "lncompile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=CLONE.parent, env=environment, **settings)


# --- Factories that do not return ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("make_exit", ("sys.exit(0)", "test_commands.py:")),
        ("make_exit_with_words", ("sys.exit('no licence')",)),
        ("make_parsed", ("sys.exit(2)", "test_commands.py:")),
        ("make_typer_exit", ("the factory", "failed: Exit")),
        ("make_leaving", ("ended the program", "explain")),
    ],
)
def test_a_factory_that_exits_is_no_success(factory, says):
    assert_refused("explain", f"{HERE}:{factory}", says=says)


def test_a_file_that_exits_as_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "leaving.py").write_text("import sys\nprint('usage: ...')\nsys.exit(0)\n")
    assert_refused("explain", tmp_path / "leaving.py:make", says=("leaving.py", "sys.exit(0)", "leaving.py:3"))
    monkeypatch.chdir(tmp_path)
    assert_refused("explain", "leaving:make", says=("'leaving' cannot be imported", "sys.exit(0)"))


def test_an_interrupt_of_a_factory_is_one(tmp_path):
    (tmp_path / "slow.py").write_text("raise KeyboardInterrupt\n")
    assert run("explain", tmp_path / "slow.py:make").exit_code == 130


# --- Names as they are written ---------------------------------------------------------------------------------------


def test_no_name_is_read_as_an_emoji_or_as_markup(tmp_path):
    """`:ok:` is an emoji to rich, and `[bold]` a style."""
    file = tmp_path / "a:ok:[bold].py"
    file.write_text(HERE.read_text())
    page = tmp_path / "b:ok:[red].html"
    result = run("explain", f"{file}:ok", "--html", page)
    assert result.exit_code == 0, result.output
    for printed in (f"loading {file}:ok ...", f"     {file}:ok: Net", f"drawn in {page}"):
        assert printed in result.stderr
    assert "a:ok:[bold].py:" in result.stdout, "where the norms are"
    assert_refused("explain", f"{file}:nothing", says=(f"there is no 'nothing' in '{file}'",))
    assert "'fac:ok:'" in run("fac:ok:").stderr


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
    monkeypatch.setattr("lncompile.models.load_model", lambda *_, **__: pytest.fail("the work has begun"))
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


# --- Options that a model cannot heed --------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["make_net", "make_constant", "make_seeded"])
@pytest.mark.parametrize(("option", "value", "name"), [("--batch", 5, "batch"), ("--tokens", 128, "tokens")])
def test_sizes_that_a_factory_does_not_take_are_refused(factory, option, value, name):
    says = (f"has no parameter '{name}'", f"{name}={value}")
    assert_refused("explain", f"{HERE}:{factory}", option, value, says=says)
    assert_refused("ab", f"{HERE}:{factory}", option, value, says=says)


def test_sizes_that_a_factory_takes_arrive():
    assert "4×5×8" in answer("explain", f"{HERE}:make_sized", "--batch", 4, "--tokens", 5)["description"]
    assert "1×64×8" in answer("explain", f"{HERE}:make_sized")["description"]
    # One that takes any gets those that were asked for, and no defaults.
    assert load_model(f"{HERE}:make_any").arguments[0][0, 0] == 0
    assert load_model(f"{HERE}:make_any", batch=4, length=5).arguments[0][0, 0] == 9
    assert call_factory(f"{HERE}:make_sized", {"batch": 1, "depth": 2}).parameters == {"batch"}


def test_sizes_reach_a_transformers_model_of_a_factory():
    assert "input_ids 3×9" in answer("explain", f"{HERE}:make_transformer", "-b", 3, "-t", 9)["description"]


def test_a_seed_that_changes_nothing_is_refused():
    assert load_model(f"{HERE}:make_seeded").arguments[0][0, 0] == 7, "its own default"
    assert load_model(f"{HERE}:make_seeded", seed=4).arguments[0][0, 0] == 4
    first, other = (load_model(f"{HERE}:make_net", seed=seed).arguments[0] for seed in (0, 1))
    assert not torch.equal(first, other), "torch was seeded"
    assert_refused("explain", f"{HERE}:make_seeding", "--seed", 1, says=("sets torch's seed itself", "seed=1"))
    assert_refused("explain", f"{HERE}:make_constant", "--seed", 1, says=("draws no random numbers", "'seed'"))
    assert answer("explain", f"{HERE}:make_constant")["explain"]["total"] == 1


def test_dtype_reaches_a_factory_of_another(tmp_path):
    assert "bfloat16" in answer("explain", f"{HERE}:make_net", "--dtype", "bfloat16")["description"]


def test_tokens_that_a_model_cannot_take_are_refused(tmp_path):
    transformers.GPT2Config(**TINY).save_pretrained(tmp_path)
    assert "input_ids 1×32" in answer("explain", tmp_path)["description"], "64 positions, of which half"
    assert "input_ids 1×64" in answer("explain", tmp_path, "--tokens", 64)["description"]
    assert_refused("explain", tmp_path, "--tokens", 65, says=("64 tokens, fewer than the 65",))
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    vision = transformers.ViTConfig(**size, image_size=32, patch_size=8)
    vision.architectures = ["ViTModel"]
    vision.save_pretrained(tmp_path)
    assert "pixel_values 2×3×32×32" in answer("explain", tmp_path, "--batch", 2)["description"]
    assert_refused("explain", tmp_path, "--tokens", 8, says=("'pixel_values' and no tokens",))


def test_inputs_of_another_length_leave_the_model_as_it_is(tmp_path):
    """Requests of several lengths are to one model, which is loaded once."""
    transformers.GPT2Config(**TINY).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), batch=2)
    other = inputs_of_length(loaded, 2, 5, None)
    assert other.model is loaded.model
    assert (loaded.inputs["input_ids"].shape, other.inputs["input_ids"].shape) == ((2, 32), (2, 5))
    with pytest.raises(ModelError, match="64 tokens, fewer than the 65"):
        inputs_of_length(loaded, 2, 65, None)


# --- Out of memory ---------------------------------------------------------------------------------------------------


def fail_to_allocate(*_, **__):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3000000000 bytes.")


def test_what_helps_is_what_is_at_work(monkeypatch):
    """Only options that this command has, that this model heeds, and that can be less than they are."""
    error = assert_refused("explain", f"{HERE}:make_large", says=("while the model was loaded", "4.4 TB in one piece"))
    assert error.endswith("less is needed with --device meta (which needs no memory for weights)\n")
    error = assert_refused("bench", f"{HERE}:make_large", says=("4.4 TB",))
    assert "no option of this command needs less" in error
    assert "a smaller --batch (now 3)" in assert_refused("bench", f"{HERE}:make_large", "-b", 3, says=())

    monkeypatch.setattr("lncompile.cli.verify.verify", fail_to_allocate)
    error = assert_refused("verify", f"{HERE}:make_net", says=("while verify ran", "3.0 GB", "--dtype bfloat16"))
    assert "the weights take 0.7 kB in float32; verify also holds a float64 copy of them, 1.4 kB" in error
    assert not any(option in error for option in ("--batch", "--tokens", "meta"))
    error = assert_refused("verify", f"{HERE}:make_sized", "-b", 6, says=("a smaller --batch (now 6)", "(now 64)"))
    error = assert_refused("verify", f"{HERE}:make_sized", "-t", 1, "--dtype", "bfloat16", says=("bfloat16",))
    assert "no option of this command needs less" in error

    monkeypatch.setattr("lncompile.cli.bench.compare_latency", fail_to_allocate)
    error = assert_refused("bench", f"{HERE}:make_net", says=("while bench ran", "--dtype bfloat16"))
    assert "float64" not in error


def test_sizes_of_a_configuration_are_known_where_it_cannot_be_loaded(tmp_path, monkeypatch):
    transformers.GPT2Config(**TINY).save_pretrained(tmp_path)
    load = lncompile.models.load_model

    def without_memory(*arguments, **named):
        return load(*arguments, **named) if named.get("device") == "meta" else fail_to_allocate()

    monkeypatch.setattr("lncompile.models.load_model", without_memory)
    monkeypatch.setattr("lncompile.cli.memory.load_model", load)
    error = assert_refused("explain", tmp_path / "config.json", says=("the weights take 117.9 kB in float32",))
    assert "--dtype" not in error, "random weights are made in float32 first"
    assert "--device meta" in error


def test_weights_that_no_memory_is_left_for_are_not_made(tmp_path, monkeypatch):
    """A system may end a process that takes too much, and nobody could say anything then."""
    transformers.GPT2Config(**TINY).save_pretrained(tmp_path)
    monkeypatch.setattr("lncompile.pretrained.available_memory", lambda: 100_000)
    monkeypatch.setattr("lncompile.pretrained.randomise", lambda *_: pytest.fail("they are made"))
    for name, says in (
        (tmp_path, "117.9 kB in float32, and 100.0 kB are left"),
        (tmp_path / "config.json", "117.9 kB"),
    ):
        error = assert_refused("explain", name, says=("random weights take", says, "--device meta"))
        assert "--dtype" not in error
    assert_refused("bench", tmp_path, "--dtype", "bfloat16", says=("no option of this command needs less",))
    monkeypatch.undo()
    monkeypatch.setattr("lncompile.pretrained.available_memory", lambda: 120_000)
    assert answer("explain", tmp_path)["explain"]["folded"] == 5


def test_memory_that_is_left():
    left = available_memory()
    assert left is None or 10_000_000 < left < 1 << 50


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

    monkeypatch.setattr("lncompile.models.load_model", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert run("explain", f"{HERE}:make_net").exit_code == 130
    assert handlers == [before]
    assert signal.getsignal(signal.SIGINT) is before


# --- Versions, help, the group ---------------------------------------------------------------------------------------


def test_versions():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"lncompile {lncompile.__version__}, torch {torch.__version__}, Python 3.")
    assert in_a_process("--version").stdout == result.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_in_80_columns(command):
    printed = in_a_process(*command.split(), "--help").stdout
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert not set("╭│╰") & set(printed)
    described = [line for line in lines if line.startswith(tuple(f"  {name} " for name in COMMANDS))]
    assert len(described) == (0 if command else 4)
    assert not any(line.endswith("...") for line in described), "cut short"
    assert "lncompile" in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "nowhere/model.py:make"),
        ("explain", "nowhere/config.json"),
        ("explain", "no_such_module:make"),
        ("explain", "--nonsense"),
        ("explain", "gpt2", "--option", "lnfold.asist=false"),
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
    assert "COMMAND gpt2, one of explain, verify, bench, ab" in run("gpt2").stderr
    assert CliRunner().invoke(named(None), ["--version", "verify"]).stdout == "a version\nverify gpt2\n"


# --- The meta device -------------------------------------------------------------------------------------------------


def test_explain_without_weights(tmp_path):
    """A configuration, a folder with weights and a factory, whatever device the latter puts its tensors on."""
    transformers.GPT2Config(**TINY).save_pretrained(tmp_path)
    expected = answer("explain", tmp_path)["explain"]
    found = answer("explain", tmp_path / "config.json", "--device", "meta")
    assert "on meta" in found["description"]
    make_transformer().save_pretrained(tmp_path)
    again = answer("explain", tmp_path, "--device", "meta")
    assert "without weights" in again["description"]
    factory = answer("explain", f"{HERE}:make_transformer", "--device", "meta", "--tokens", 32)
    if not torch.cuda.is_available():
        for other in (found, again, factory):
            seconds = {"seconds": expected["seconds"]}
            assert {**other["explain"], **seconds} == expected
    assert (expected["total"], expected["folded"]) == (5, 5)


def test_what_a_factory_puts_elsewhere_comes_to_the_meta_device_as_it_is():
    loaded = load_model(f"{HERE}:make_tied", device="meta")
    assert loaded.model.head.weight is loaded.model.table.weight
    assert isinstance(loaded.model.head.weight, nn.Parameter)
    assert {value.device.type for value in loaded.model.state_dict().values()} == {"meta"}
    assert loaded.arguments[0].device.type == "meta"
    assert "without weights" in loaded.description
    found, expected = (answer("explain", f"{HERE}:make_tied", *more) for more in (("--device", "meta"), ()))
    if not torch.cuda.is_available():
        assert found["explain"]["weights"] == expected["explain"]["weights"]
    assert found["explain"]["folded"] == expected["explain"]["folded"]


@pytest.mark.parametrize("command", ["verify", "bench", "ab"])
def test_what_needs_values_refuses_the_meta_device(command, monkeypatch):
    assert_refused(command, f"{HERE}:make_on_meta", says=("no values", f"{command} needs values", "explain"))
    monkeypatch.setattr("lncompile.models.load_model", lambda *_, **__: pytest.fail("the work has begun"))
    assert_refused(command, f"{HERE}:make_net", "--device", "meta", says=("no values", "only explain works there"))


# --- Predictions that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_end_with_exit_code_1(value, monkeypatch):
    def compile(module, backend, **_):
        module.spoiled = 0.0
        return lambda *arguments: module(*arguments) + (value if backend == "lnfold" else 0.0)

    monkeypatch.setattr("torch.compile", compile)
    monkeypatch.setattr("lncompile.cli.running.Run.compile", lambda self, loaded: loaded.model)
    result = run("verify", f"{HERE}:make_net")
    assert result.exit_code == 1, result.output
    assert "output is not finite: lnfold gives NaN or infinity in 16 of 16 elements" in result.stdout
    found = answer("verify", f"{HERE}:make_net", exit_code=1)
    assert found["passed"] is False
    assert found["verify"]["outputs"][0]["not_finite"] == 16
    assert found["verify"]["outputs"][0]["lnfold"] is None


def test_python_m_lncompile_is_the_command():
    started = time.perf_counter()
    done = in_a_process("explain", f"{HERE}:make_net", "--json")
    print(f"{time.perf_counter() - started:.1f} s")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["explain"]["folded"] == 2
