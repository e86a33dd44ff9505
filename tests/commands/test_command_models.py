"""What commands do with models: factories that exit, sizes that are not heeded, memory, the meta device, NaN."""

from __future__ import annotations

import pytest
import torch
import transformers
from command_factories import HERE, TINY, make_transformer
from command_line import answer, assert_refused, run
from torch import nn

import lncompile
from lncompile.comparisons.machine import available_memory
from lncompile.comparisons.processes import ProcessError
from lncompile.models.factories import call_factory
from lncompile.models.loading import inputs_of_length, load_model
from lncompile.models.names import ModelError

# --- Factories that do not return ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "says"),
    [
        ("make_exit", ("sys.exit(0)", "command_factories.py:")),
        ("make_exit_with_words", ("sys.exit('no licence')",)),
        ("make_parsed", ("sys.exit(2)", "command_factories.py:")),
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

    def end_for_want_of_memory(*arguments, **named):
        raise ProcessError("process 1 of 4 ran out of memory", out_of_memory=True)

    monkeypatch.setattr("lncompile.comparisons.latency.compare_in_processes", end_for_want_of_memory)
    error = assert_refused("bench", f"{HERE}:make_net", says=("while bench ran", "process 1 of 4", "--dtype bfloat16"))
    assert "float64" not in error
    assert "the weights take 0.7 kB" in error


def test_sizes_of_a_configuration_are_known_where_it_cannot_be_loaded(tmp_path, monkeypatch):
    transformers.GPT2Config(**TINY).save_pretrained(tmp_path)
    load = lncompile.models.loading.load_model

    def without_memory(*arguments, **named):
        return load(*arguments, **named) if named.get("device") == "meta" else fail_to_allocate()

    monkeypatch.setattr("lncompile.models.loading.load_model", without_memory)
    monkeypatch.setattr("lncompile.cli.out_of_memory.load_model", load)
    error = assert_refused("explain", tmp_path / "config.json", says=("the weights take 117.9 kB in float32",))
    assert "--dtype" not in error, "random weights are made in float32 first"
    assert "--device meta" in error


def test_weights_that_no_memory_is_left_for_are_not_made(tmp_path, monkeypatch):
    """A system may end a process that takes too much, and nobody could say anything then."""
    transformers.GPT2Config(**TINY).save_pretrained(tmp_path)
    monkeypatch.setattr("lncompile.models.pretrained.available_memory", lambda: 100_000)
    monkeypatch.setattr("lncompile.models.pretrained.randomise", lambda *_: pytest.fail("they are made"))
    for name, says in (
        (tmp_path, "117.9 kB in float32, and 100.0 kB are left"),
        (tmp_path / "config.json", "117.9 kB"),
    ):
        error = assert_refused("explain", name, says=("random weights take", says, "--device meta"))
        assert "--dtype" not in error
    assert_refused("bench", tmp_path, "--dtype", "bfloat16", says=("no option of this command needs less",))
    monkeypatch.undo()
    monkeypatch.setattr("lncompile.models.pretrained.available_memory", lambda: 120_000)
    assert answer("explain", tmp_path)["explain"]["folded"] == 5


def test_memory_that_is_left():
    left = available_memory()
    assert left is None or 10_000_000 < left < 1 << 50


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
            seconds = {name: expected[name] for name in ("seconds", "passes")}
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
    monkeypatch.setattr("lncompile.models.loading.load_model", lambda *_, **__: pytest.fail("the work has begun"))
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
