"""Keeping a plan in a file, and applying it: to what it fits, all at once, and once."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_models import IDS, WIDTH, Once, QueriesAndKeysNormed, Residual, Tied, error, randomised, value
from torch import nn

import lncompile
from lncompile.nn import CenteredEmbedding, RMSNorm
from lncompile.plans import application

TOLERANCE = 1e-10


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- files ---


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("model", [Residual, Tied, QueriesAndKeysNormed])
def test_saved_and_loaded(model: type[nn.Module], untie: bool, tmp_path: Path) -> None:
    made, x = randomised(model()), IDS if issubclass(model, Residual) else value(2, 5)
    plan = lncompile.plan(made, x, untie=untie)
    plan.save(tmp_path / "model.fold.json")
    loaded = lncompile.FoldPlan.load(tmp_path / "model.fold.json")
    assert loaded == plan
    assert error(loaded.apply(copy.deepcopy(made)), made, x) <= TOLERANCE


def test_a_file_says_what_is_centered_by_names_of_the_state_dict(tmp_path: Path) -> None:
    lncompile.plan(randomised(QueriesAndKeysNormed()), value(2, 5)).save(tmp_path / "plan.json")
    values = json.loads((tmp_path / "plan.json").read_text())
    assert (values["format"], values["version"]) == ("lncompile fold plan", 1)
    bias = values["center"][1]
    assert (bias.pop("scaled_by"), bias.pop("dimension")) == ([], 0)
    assert bias == {
        "name": "qkv.bias",
        "also": [],
        "shape": [48],
        "centerings": [
            {"view": [3, 2, 8], "axes": [2], "rows": {"0": [0]}},
            {"view": [3, 2, 8], "axes": [2], "rows": {"0": [1]}},
        ],
    }


def changed(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**values, **changes}


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda v: changed(v, version=2), "this plan has version 2, and this lncompile reads version 1"),
    "another_file": (lambda v: {"weights": []}, "not a fold plan"),
    "a_list": (lambda v: [v], "not a fold plan"),
    "unknown": (lambda v: changed(v, rotate=[]), "the plan has rotate"),
    "incomplete": (lambda v: {k: x for k, x in v.items() if k != "form"}, "the plan has no form"),
    "of_another_type": (lambda v: changed(v, unreached="all"), "unreached is 'all'"),
    "inside": (lambda v: changed(v, center=[{**v["center"][0], "name": 3}]), r"center\[0\]\.name is 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    values = change(lncompile.plan(randomised(Residual()), IDS).to_dict())
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(lncompile.PlanError, match=message):
        lncompile.FoldPlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(lncompile.PlanError, match="is not a fold plan"):
        lncompile.FoldPlan.load(tmp_path / "plan.json")


def test_a_centering_that_does_not_fit_its_shape_is_refused() -> None:
    for view, axes, rows in (([3, 16], [1], {}), ([48, 16], [2], {}), ([48, 16], [], {}), ([48, 16], [1], {"0": [48]})):
        values = lncompile.plan(randomised(Residual()), IDS).to_dict()
        values["center"][0]["centerings"] = [{"view": view, "axes": axes, "rows": rows}]
        with pytest.raises(lncompile.PlanError, match="not a centering of a parameter of shape"):
            lncompile.FoldPlan.from_dict(values)


# --- what fits ---


class Flagged(Residual):
    """With a flag that says what it computes."""

    def __init__(self, width: int = WIDTH, post_norm: bool = False) -> None:
        super().__init__(width)
        self.post_norm = post_norm


class LongerResidual(Residual):
    """With one more parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.zeros(3))


def without_bias() -> nn.Module:
    model = Residual()
    model.branch = nn.Linear(WIDTH, WIDTH, bias=False)
    return model


def with_another_norm() -> nn.Module:
    model = Residual()
    model.norm = nn.RMSNorm(WIDTH)
    model.norm.register_parameter("bias", nn.Parameter(torch.zeros(WIDTH)))
    return model


def tied_after_all() -> nn.Module:
    model = Residual()
    model.head.weight = model.table.weight
    return model


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shape": (lambda: Residual(32), r"'table\.weight' has shape \[48, 32\], not \[48, 16\]"),
    "missing": (without_bias, r"'branch\.bias' is missing"),
    "more": (LongerResidual, r"(?s)Residual, not of a .*LongerResidual.*'more' is not in the plan's model"),
    "module": (with_another_norm, r"module 'norm' is torch\.nn\.modules\.normalization\.RMSNorm, not .*LayerNorm"),
    "tied": (tied_after_all, r"'head\.weight' is tied to 'table\.weight'"),
    "meta": (lambda: Residual().to("meta"), r"'table\.weight' is on the meta device and has no values"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_models_that_it_does_not_fit(name: str) -> None:
    make, message = MISFITS[name]
    plan = lncompile.plan(randomised(Residual()), IDS)
    model = make().double().eval()
    before = {} if name == "meta" else state(model)
    with pytest.raises(lncompile.PlanError, match=message):
        plan.apply(model)
    assert name == "meta" or same(model, before)
    assert not any(isinstance(module, RMSNorm) for module in model.modules())


def test_a_flag_of_a_module_has_to_be_the_same() -> None:
    plan = lncompile.plan(randomised(Flagged()), IDS)
    assert plan.apply(randomised(Flagged(), seed=3))
    with pytest.raises(lncompile.PlanError, match="'post_norm' of module '' is True, not False"):
        plan.apply(randomised(Flagged(post_norm=True)))


def test_weights_that_cannot_be_written() -> None:
    plan = lncompile.plan(randomised(Residual()), IDS)
    with torch.inference_mode():
        model = Residual().double().eval()
    with pytest.raises(lncompile.PlanError, match=r"'table\.weight' was made under torch\.inference_mode\(\)"):
        plan.apply(model)
    quantization = pytest.importorskip("torchao.quantization")
    model = Residual().eval()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(lncompile.PlanError, match=r"'branch\.weight' is a Int8Tensor"):
        plan.apply(model)
    assert type(model.norm) is nn.LayerNorm


def test_hooks_that_came_after_the_plan_are_not_lost() -> None:
    plan = lncompile.plan(randomised(Residual()), IDS)
    model = randomised(Residual())
    before = state(model)
    model.final.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(
        lncompile.PlanError, match=r"module 'final' has the hooks .*<lambda>, and in the plan's model no hooks"
    ):
        plan.apply(model)
    assert same(model, before)
    assert type(model.norm) is nn.LayerNorm


# --- applying ---


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("model", [Residual, Tied, QueriesAndKeysNormed])
def test_twice_is_once_and_a_folded_model_has_an_empty_plan(model: type[nn.Module], untie: bool) -> None:
    made, x = randomised(model()), IDS if issubclass(model, Residual) else value(2, 5)
    plan = lncompile.plan(made, x, untie=untie)
    folded = plan.apply(copy.deepcopy(made))
    before, modules = state(folded), list(folded.modules())
    assert plan.apply(folded) is folded
    assert same(folded, before)
    assert all(one is other for one, other in zip(folded.modules(), modules, strict=True))
    again = lncompile.plan(folded, x, untie=untie)
    assert again.is_empty
    assert again.total == 0
    assert "0 of 0 LayerNorms fold; nothing to change." in str(again)


def test_norms_that_stay_on_a_centered_stream_have_an_empty_plan_as_well() -> None:
    model = Once()
    model.norm = nn.Sequential(nn.LayerNorm(WIDTH))
    model.norm.register_forward_hook(lambda *_: None)
    model.norm[0].register_forward_hook(lambda *_: None)
    folded = lncompile.fold(randomised(model), value(2, 3))
    again = lncompile.plan(folded, value(2, 3))
    assert (again.folded, again.total) == (1, 1)
    assert again.is_empty


def test_centered_weights_of_modules_that_are_replaced_already() -> None:
    """A model that has the modules of a folded one and raw weights is not taken for folded."""
    model = randomised(Residual())
    plan = lncompile.plan(model, IDS)
    half = plan.replace_modules(copy.deepcopy(model))
    assert error(half, model, IDS) > 1e-4
    assert error(plan.apply(half), model, IDS) <= TOLERANCE


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(Residual())
    plan = lncompile.plan(model, IDS)
    before = state(model)
    shift, calls = application._shift, []

    def fail_at_the_third(entry: Any, tensor: Any, means: Any) -> None:
        calls.append(entry)
        if len(calls) == 3:
            raise MemoryError
        shift(entry, tensor, means)

    monkeypatch.setattr(application, "_shift", fail_at_the_third)
    with pytest.raises(MemoryError):
        plan.apply(model)
    assert len(calls) == 5, "two were written, and are put back"
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-15, atol=1e-15)
    assert type(model.norm) is nn.LayerNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_element_is_rounded_once(dtype: torch.dtype) -> None:
    model = randomised(Residual()).to(dtype)
    wide = copy.deepcopy(model).double()
    plan = lncompile.plan(model, IDS)
    folded, exact = plan.apply(model), plan.apply(wide)
    for name, tensor in exact.state_dict().items():
        assert torch.equal(folded.state_dict()[name], tensor.to(dtype)), name


def test_a_plan_of_one_model_folds_another_of_its_architecture() -> None:
    plan = lncompile.plan(randomised(Tied()), IDS)
    other = randomised(Tied(), seed=7)
    folded = plan.apply(copy.deepcopy(other))
    assert error(folded, other, IDS) <= TOLERANCE
    assert isinstance(folded.table, CenteredEmbedding)


def test_a_plan_from_the_meta_device_folds_the_model_with_weights() -> None:
    with torch.device("meta"):
        plan = lncompile.plan(Tied().double().eval(), IDS.to("meta"))
    model = randomised(Tied())
    assert error(plan.apply(copy.deepcopy(model)), model, IDS) <= TOLERANCE


def test_parameters_stay_the_same_objects_and_count_the_write() -> None:
    model = randomised(Residual())
    parameters = dict(model.named_parameters())
    version = model.branch.weight._version
    lncompile.plan(model, IDS).apply(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.branch.weight._version > version
    assert model.branch.weight.requires_grad


def test_a_compiled_model_notices(without_inductor: None) -> None:
    model = randomised(Residual())
    expected = model(IDS)["logits"]
    compiled = torch.compile(model, backend="lnfold")
    compiled(IDS)
    plan = lncompile.plan(model, IDS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="lnfold")
    torch.testing.assert_close(compiled(IDS)["logits"], expected, rtol=1e-10, atol=1e-10)
    plan.apply(model)
    torch.testing.assert_close(compiled(IDS)["logits"], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(IDS)["logits"], expected, rtol=1e-10, atol=1e-10)


def test_modules_without_the_values_are_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    """With RMSNorms and weights that are not centered a model computes something else."""
    model = randomised(Residual())
    plan = lncompile.plan(model, IDS)
    with pytest.warns(UserWarning, match="is not centered: load the state dict of a folded model next"):
        plan.replace_modules(copy.deepcopy(model))
    folded = plan.apply(copy.deepcopy(model))
    recwarn.clear()
    for dtype in (torch.float64, torch.bfloat16):
        loaded = copy.deepcopy(model).to(dtype)
        loaded.load_state_dict(copy.deepcopy(folded).to(dtype).state_dict())
        plan.replace_modules(loaded)
    plan.replace_modules(copy.deepcopy(model).to("meta"))
    assert not [warning for warning in recwarn if "centered" in str(warning.message)]
