"""Centered weights: the memory the report says, one at a time; parameters that come centered are used as they are."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from architectures import randomise
from streams import CENTERED, IDS, TOLERANCE, made
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lncompile
from lncompile.compiled_graphs import compiled_graphs
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.factors import Factor
from lncompile.passes.rewrites import arithmetic
from lncompile.reporting.report import merge
from lncompile.runtime import materialize

pytestmark = pytest.mark.usefixtures("without_inductor")


# --- the arithmetic ---

SETS_OF_AXES = {
    "rows": Axes.of((8, 6), [0]),
    "columns": Axes.of((8, 6), [1]),
    "heads": Axes(((Factor(2, False), Factor(4, True)), (Factor(6, False),))),
    "a part": Axes(((Factor(2, False, (1,)), Factor(4, True)), (Factor(6, False),))),
    "everything": Axes.of((8, 6), [0, 1]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SETS_OF_AXES)
def test_what_is_centered_is_known(kind: str, dtype: torch.dtype) -> None:
    axes = SETS_OF_AXES[kind]
    weight = (torch.randn(8, 6, dtype=torch.float64) + 0.3).to(dtype)
    centered = arithmetic.center_weight(weight, axes)
    eps = torch.finfo(dtype).eps
    assert arithmetic.means_of(weight, axes).numel() < weight.numel()
    assert not arithmetic.is_centered(weight, axes)
    assert arithmetic.is_centered(centered, axes)
    assert not arithmetic.is_centered(centered + (4 * eps * centered.abs().max()), axes)


def centered_weight(name: str, value: Tensor) -> Tensor:
    """A weight of the model as it would be centered; anything else as it is."""
    along = value.dim() - 1 if "table" in name else 0
    return arithmetic.center_weight(value, Axes.of(value.shape, [along])) if name in CENTERED else value


def test_parameters_that_come_centered_need_no_copy() -> None:
    model = made()
    model.load_state_dict({name: centered_weight(name, value) for name, value in model.state_dict().items()})
    function = torch.compile(model, backend="lnfold")
    torch.testing.assert_close(function(IDS), model(IDS), **TOLERANCE)
    for report in (*lncompile.reports(function), lncompile.explain(function, IDS)):
        assert {weight.name: weight.storage for weight in report.weights} == dict.fromkeys(CENTERED, "centered")
        assert report.extra_bytes == 0


def test_already_centered_is_decided_anew_when_weights_change() -> None:
    raw = made().state_dict()
    centered = {name: centered_weight(name, value) for name, value in raw.items()}
    model = made()
    model.load_state_dict(centered)
    function = torch.compile(model, backend="lnfold")

    def copies() -> int:
        gc.collect()
        records = [record.materializer for record in compiled_graphs if record.report in lncompile.reports(function)]
        return sum(len(known.values) for m in records if m is not None for known in m._sets.values())

    counts = []
    for state in (centered, raw, centered, raw):
        model.load_state_dict(state)
        expected = model(IDS)
        for _ in range(2):
            torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)  # copy mode changes nothing
        counts.append(copies())
    assert counts == [0, 3, 0, 3]


def test_without_the_check_copies_outlive_changes() -> None:
    """A parameter holds nothing but the latest, so one that came centered is copied there."""
    model = made()
    model.load_state_dict({name: centered_weight(name, value) for name, value in model.state_dict().items()})
    function = torch.compile(model, backend="lnfold", options={"lnfold.check": "off"})
    torch.testing.assert_close(function(IDS), model(IDS), **TOLERANCE)
    (report,) = lncompile.reports(function)
    assert {weight.storage for weight in report.weights} == {"copy"}


# --- memory ---


class Deep(nn.Module):
    """Many linear layers in front of one norm, and a head that is tied to the first of them."""

    def __init__(self, layers: int = 40, width: int = 64, tied: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.tied = tied

    def forward(self, value: Tensor) -> Tensor:
        stream = self.layers[0](value)
        for layer in self.layers[1:]:
            stream = stream + layer(value)
        normed: Tensor = self.norm(stream)
        return self.layers[0](normed) if self.tied else normed


def living_bytes(known: set[int] = frozenset()) -> dict[int, int]:  # type: ignore[assignment]
    """Bytes of every storage of the process with values, by its identity, without those that are known."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter)]
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return {identity: size for identity, size in sizes.items() if identity not in known}


@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_of_the_report_are_those_that_were_allocated(tied: bool) -> None:
    model = randomise(Deep(layers=6, tied=tied)).eval()
    value = torch.randn(3, 64)
    before = set(living_bytes())
    function = torch.compile(model, backend="lnfold")
    function(value)
    function(value)
    new = living_bytes(before)
    report = merge(lncompile.reports(function))
    assert report.extra_bytes == sum(p.nbytes for p in model.layers.parameters())
    assert sum(new.values()) == report.extra_bytes


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it had at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        read = {value.untyped_storage()._cdata for value in args if type(value) in (Tensor, nn.Parameter)}
        for tensor in made if isinstance(made, tuple | list) else [made]:
            # An alias of what there was is no memory.
            if type(tensor) is Tensor and tensor.untyped_storage()._cdata not in self._seen | read:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        identity, size = storage._cdata, storage.nbytes()
        self._seen.add(identity)
        self.now += size
        self.most = max(self.most, self.now)

        def freed() -> None:
            self._seen.discard(identity)
            self.now -= size

        weakref.finalize(storage, freed)


def test_one_weight_at_a_time_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Deep()).eval()
    value = torch.randn(3, 64)
    function = torch.compile(model, backend="lnfold")
    function(value)
    for parameter in model.layers.parameters():
        parameter.add_(0.01)
    peak = Peak()

    def measured(self: Any, arguments: Any) -> Any:
        with peak:  # around the call itself it would keep Dynamo from using what it compiled
            return refresh(self, arguments)

    refresh = materialize.Materializer._refresh
    monkeypatch.setattr(materialize.Materializer, "_refresh", measured)
    function(value)
    weights = sum(p.nbytes for p in model.layers.parameters())
    assert weights < peak.most < 1.5 * weights, "the copies, and temporaries of one weight, in float64, of forty"
