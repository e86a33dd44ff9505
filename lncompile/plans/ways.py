"""In which ways a program wants parameters centered: along which axes, and after which scales of its channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from lncompile.analysis import Analysis
from lncompile.passes.graph.axes import Axes
from lncompile.passes.rules.composed_sources import ChannelScaling, ComposedSource
from lncompile.plans.holdings import Slot


@dataclass(frozen=True)
class Way:
    """How a parameter is changed.

    Attributes:
        axes: along what it is centered; several where parts of it are centered apart.
        scales: parameters that its channels are multiplied with before (LayerScale).
        dimension: the dimension of the channels.
        becomes_one: whether it is such a scale itself, and is one afterwards.
    """

    axes: tuple[Axes, ...] = ()
    scales: tuple[Slot, ...] = ()
    dimension: int = 0
    becomes_one: bool = False

    @property
    def is_of_rows(self) -> bool:
        """Whether each row of a table is centered by itself, as a whole, and nothing else is done."""
        return not self.scales and len(self.axes) == 1 and self.axes[0].whole and _over_the_last(self.axes[0])


def _over_the_last(axes: Axes) -> bool:
    return axes.normalised_dimensions == (axes.rank - 1,)


#: What is done to each parameter of an expression, by the positions of all its parameters.
Scalings = Mapping[frozenset[int], Mapping[Slot, Way]]


def find_scalings(analysis: Analysis, slots: Sequence[Slot | None]) -> Scalings:
    """Find the layers whose channels a parameter scales (LayerScale), where the scale can go into the layer.

        s ⊙ (Wh + b)  →  1 ⊙ (C diag(s) W h + C (s ⊙ b))

    Args:
        analysis: of the program, before it is carried out.
        slots: what each placeholder is in the model.
    """
    placeholders = [node for node in analysis.graph_module.graph.nodes if node.op == "placeholder"]
    position = {node: index for index, node in enumerate(placeholders)}
    found: dict[frozenset[int], dict[Slot, Way]] = {}
    for key in () if analysis.placement is None else analysis.placement.streams:
        source = analysis.variables[key].composed_source
        if source is None or source.groups != 1:
            continue
        scales = _scales(source, position)
        if scales is None:
            continue
        scale_slots = tuple(slot for scale in scales if (slot := slots[position[scale]]) is not None)
        if len(scale_slots) != len(scales):
            continue
        parts = [(source.product[source.weight[0]], source.weight_axes, source.dimension)]
        if source.bias is not None and source.product[source.bias[0]] is not None:
            parts.append((source.product[source.bias[0]], source.bias_axes, 0))
        for parameter, axes, dimension in parts:
            slot = slots[position[parameter]] if parameter in position else None
            if slot is None or slot.lookup:
                continue
            ways = {slot: Way((axes,), scale_slots, dimension)}
            ways.update(dict.fromkeys(scale_slots, Way(becomes_one=True)))
            found[frozenset(position[node] for node in (parameter, *scales))] = ways
    return found


def _scales(source: ComposedSource, position: Mapping[fx.Node, int]) -> list[fx.Node] | None:
    """The scales of a source, if all its stages multiply with parameters themselves."""
    scales = []
    for stage in source.stages:
        if not isinstance(stage, ChannelScaling) or stage.divides or stage.scale not in position:
            return None
        scales.append(stage.scale)
    return scales if len(set(scales)) == len(scales) else None
