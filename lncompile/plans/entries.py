"""What a fold plan is made of: one record for each change to a model, by state-dict names and module paths.

Every record is plain data that can be written as JSON and applied one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.factors import Factor
from lncompile.passes.rewrites.affine import scale_weight
from lncompile.passes.rewrites.arithmetic import EXACT, is_centered, means_of


class PlanError(ValueError):
    """A fold plan that cannot be read, or does not fit a model. The message lists what differs."""


@dataclass(frozen=True)
class Centering:
    """Which elements of a parameter lose their common mean.

    The parameter is looked at in the shape ``view``, which splits its dimensions and never joins them. The mean over
    ``axes`` of that view is subtracted. Where ``rows`` names an axis of the view, only these of its indices take part,
    and the rest of the parameter stays as it is::

        a linear layer's weight [768, 3072]          view (768, 3072), axes (0,)
        the queries and keys of a joint projection   view (3, 768, 768), axes (1,), rows {0: (0, 1)}
        an embedding [50257, 768]                    view (50257, 768), axes (1,)

    Attributes:
        view: a shape.
        axes: which of its dimensions the mean goes over.
        rows: chosen indices, by dimension of the view.
    """

    view: tuple[int, ...]
    axes: tuple[int, ...]
    rows: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, axes: Axes) -> Centering:
        """The centering along a set of axes that the passes found, of a parameter of known shape."""
        factors = [factor for dimension in axes.dimensions for factor in dimension or (Factor(1, False),)]
        return cls(
            tuple(int(factor.size) for factor in factors),
            tuple(index for index, factor in enumerate(factors) if factor.normalised),
            {index: factor.chosen for index, factor in enumerate(factors) if factor.chosen is not None},
        )

    def on(self, shape: Sequence[int]) -> Axes:
        """The set of axes, on a parameter of this shape.

        Raises:
            PlanError: where the view does not split the shape, or an index does not exist.
        """
        factors = [Factor(size, index in self.axes, self.rows.get(index)) for index, size in enumerate(self.view)]
        names_all = set(self.axes) | set(self.rows) <= set(range(len(self.view)))
        rows_exist = all(
            rows and list(rows) == sorted(set(rows)) and rows[0] >= 0 and rows[-1] < self.view[axis]
            for axis, rows in self.rows.items()
            if axis < len(self.view)
        )
        dimensions = []
        for size in shape:
            dimension: list[Factor] = []
            while factors and (not dimension or math.prod(factor.size for factor in dimension) < size):
                dimension.append(factors.pop(0))
            if math.prod(factor.size for factor in dimension) != size or not dimension:
                names_all = False
            dimensions.append(tuple(factor for factor in dimension if factor.size != 1))
        if factors or not names_all or not rows_exist or not self.axes or min(self.view) < 1:
            raise PlanError(f"{self} is not a centering of a parameter of shape {list(shape)}")
        return Axes(tuple(dimensions))

    def in_words(self, shape: Sequence[int]) -> str:
        """Along what, for a table: ``axis 0``, ``axis 0 (rows 0..1535 of 2304)``, ``axis 1 in groups of 64``."""
        if self.view == tuple(shape):
            axes = f"axis {self.axes[0]}" if len(self.axes) == 1 else f"axes {', '.join(map(str, self.axes))}"
            return axes if not self.rows else f"{axes}, {self._rows_in_words()}"
        words = f"axes {list(self.axes)} of it as {list(self.view)}"
        return words if not self.rows else f"{words}, {self._rows_in_words()}"

    def _rows_in_words(self) -> str:
        return ", ".join(f"at {_ranges(rows)} of axis {axis}" for axis, rows in self.rows.items())


def _ranges(numbers: Sequence[int]) -> str:
    """``0..3, 8`` for 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)


@dataclass(frozen=True)
class CenteredParameter:
    """A parameter or persistent buffer that is centered.

    Attributes:
        name: its name in the state dict.
        also: its other names there, where it is tied.
        shape: its shape.
        centerings: parts of it that are centered, which share no element.
        scaled_by: the names of parameters that its channels are multiplied with before (LayerScale). These are one
            afterwards.
        dimension: the dimension of its channels, where they are.
    """

    name: str
    also: tuple[str, ...]
    shape: tuple[int, ...]
    centerings: tuple[Centering, ...]
    scaled_by: tuple[str, ...] = ()
    dimension: int = 0

    def __post_init__(self) -> None:
        """Raise PlanError for a centering that is not one of a parameter of this shape."""
        self.axes()

    def axes(self) -> tuple[Axes, ...]:
        """Along what, as the passes say it."""
        return tuple(centering.on(self.shape) for centering in self.centerings)

    def is_done(self, tensor: Tensor, scales: Sequence[Tensor] = ()) -> bool:
        """Whether a tensor is centered like this already, to the rounding of its dtype, and its scales are one."""
        return all(bool((scale == 1).all()) for scale in scales) and is_centered(tensor, self.axes())

    def scaled(self, tensor: Tensor, scales: Sequence[Tensor]) -> Tensor:
        """A tensor with its channels multiplied, in float64."""
        for scale in scales:
            tensor = scale_weight(tensor, scale.reshape(-1), self.dimension, EXACT)
        return tensor

    def means(self, tensor: Tensor) -> list[Tensor]:
        """What centering takes out of a tensor, in float64, one tensor for each part."""
        return [means_of(tensor, axes) for axes in self.axes()]

    def in_words(self) -> str:
        """Along what, for a table."""
        words = "; ".join(centering.in_words(self.shape) for centering in self.centerings)
        return f"{words}, times {' and '.join(self.scaled_by)}" if self.scaled_by else words


@dataclass(frozen=True)
class ReplacedNorm:
    """A norm's module whose place :class:`lncompile.nn.RMSNorm` takes, with the same parameters under the same names.

    Attributes:
        path: of the module in the model.
        also: its other paths, where it is shared.
        class_name: the class it has, with the name of its Python module.
        normalized_shape: sizes of the normalised axes, the last ones.
        eps: ε.
        weight: the name of γ in the module, or None where it has none.
        bias: the name of β in the module, or None where it has none.
        argument: the name that the module gives to what it normalises.
    """

    path: str
    also: tuple[str, ...]
    class_name: str
    normalized_shape: tuple[int, ...]
    eps: float
    weight: str | None
    bias: str | None
    argument: str = "input"


@dataclass(frozen=True)
class CenteredLookup:
    """An embedding whose table is tied to something that reads it as it is.

    Either what it looks up is centered at each call (:class:`lncompile.nn.CenteredEmbedding` takes its place, and the
    tie stays), or it gets a centered table of its own.

    Attributes:
        path: of the embedding in the model.
        also: its other paths, where it is shared.
        class_name: the class it has, with the name of its Python module.
        table: the name of its table in the state dict.
        tied: the other names of the table.
        shape: of the table.
        untied: whether it gets a table of its own.
        bytes: what that table takes of memory, in the dtype that the model had when it was planned.
    """

    path: str
    also: tuple[str, ...]
    class_name: str
    table: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]
    untied: bool
    bytes: int


@dataclass(frozen=True)
class AbsorbingLayer:
    """A layer that reads a norm's output, and takes γ or β of it.

    Attributes:
        path: of the layer in the model.
        weight: the name of its weight in the state dict.
        dimension: which dimension of the weight is the features that it reads.
        bias: the name of its bias, which takes ``Wβ``; None where it takes γ alone.
        adds_bias: whether it has no bias yet.
    """

    path: str
    weight: str
    dimension: int
    bias: str | None
    adds_bias: bool


@dataclass(frozen=True)
class AbsorbedNorm:
    """A norm whose γ or β the layers behind it take: ``W ← W diag(γ)``, ``b ← b + Wβ``.

    γ is then one, and β is not there any more.

    Attributes:
        path: of the norm in the model.
        weight: the name of γ in the state dict; None where it stays.
        bias: the name of β in the state dict; None where it stays, or there is none.
        layers: all that read the norm.
    """

    path: str
    weight: str | None
    bias: str | None
    layers: tuple[AbsorbingLayer, ...]


@dataclass(frozen=True)
class PlannedNorm:
    """A LayerNorm of the captured calls, and what the plan makes of it.

    Attributes:
        name: its module path, or what a report calls it.
        location: ``"file.py:line"``, or ``""``.
        becomes: ``"rms_norm"``: its module is replaced; ``"centered"``: it stays a LayerNorm and its input is centered;
            ``"layer_norm"``: it stays as it is.
        detail: why, in words.
        calls: how many times the example calls ran it with that outcome.
    """

    name: str
    location: str
    becomes: str
    detail: str
    calls: int = 1

    @property
    def folded(self) -> bool:
        """Whether its input has zero mean."""
        return self.becomes != "layer_norm"


@dataclass(frozen=True)
class KeptParameter:
    """A parameter that norms would need centered and that has to stay as it is.

    Attributes:
        name: its name in the state dict; where it has none, what it is called in the program.
        reason: why, in words.
    """

    name: str
    reason: str


#: What a module keeps as an attribute that says what it computes; None where calls change it.
Setting = bool | int | float | str | None


@dataclass(frozen=True)
class ModelForm:
    """What a model must have so that a plan fits it.

    Attributes:
        class_name: the model's class.
        tensors: the shape of everything in its state dict, by name.
        modules: the class of each module, by path.
        settings: flags, words, numbers and the names of functions that modules keep as attributes,
            ``{"decoder.layers.0": {"do_layer_norm_before": True}}``: they say what a module computes where its
            parameters and its class do not. None is for what calls change.
        hooks: the names of the functions that are hooked to the calls of modules, by path.
        tied: the names in the state dict that are one tensor.
    """

    class_name: str
    tensors: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, str]
    settings: Mapping[str, Mapping[str, Setting]]
    hooks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()


def class_name(value: Any) -> str:
    """A class by the name it can be imported by."""
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
