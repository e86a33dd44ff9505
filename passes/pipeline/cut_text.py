"""The minimum cut in words: why a site was placed as it was.

For every site the text says what saves what, and then, from its input upwards, every tensor that would have to be
centered for it: what centering it explicitly costs, whether it can be computed centered in its place, who would notice,
and which of the cut's three booleans are true of it (``computed centered``, ``shifted``, ``available``; see
:mod:`lncompile.passes.placement.cut`). What an earlier site has shown already is not shown again::

    norm (model.py:12) folds: that saves 640 bytes a call
      add (model.py:11) along [·, 16]: computed centered, shifted, available
        centering it here would cost 1280 bytes a call
        needs linear, embedding
      ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence

from lncompile.passes.graph.provenance import describe, parameter_name
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.placement.costs import CostModel
from lncompile.passes.placement.cut import Placement, benefit
from lncompile.passes.placement.variables import Variable, VariableKey


def cut_in_words(
    sites: Sequence[NormSite],
    variables: Mapping[VariableKey, Variable],
    placement: Placement,
    costs: CostModel,
    assist: bool = True,
) -> str:
    """Say what placement decided, and on what.

    Args:
        sites: the sites.
        variables: the streams.
        placement: the decision.
        costs: what was weighed.
        assist: whether activations may be centered at run time.
    """
    shifted = shifted_by(placement, variables)
    folded = {site.node for site in placement.folded}
    lines = [
        f"{len(folded)} of {len(sites)} norms fold; the cut saves {placement.saved} bytes of memory traffic a call",
        f"{len(placement.streams)} tensors are computed centered, "
        f"{len(placement.centered - placement.streams)} are centered beside what they are",
        "What is said to be true of a tensor lies on the source's side of the cut; all else on the sink's.",
    ]
    shown: set[VariableKey] = set()
    for site in sites:
        place = f" ({site.location})" if site.location else ""
        what = "folds: that saves" if site.node in folded else "stays; folding it would save"
        lines += ["", f"{site.name}{place} {what} {benefit(site, costs)} bytes a call"]
        for key in _upwards((site.input, site.axes), variables, shown):
            if key in shown:
                lines.append(f"  {_name(key)}: see above")
            else:
                lines += _variable(variables[key], placement, key in shifted, assist)
                shown.add(key)
    return "\n".join(lines)


def shifted_by(placement: Placement, variables: Mapping[VariableKey, Variable]) -> set[VariableKey]:
    """Return what a placement shifts: what is computed centered, and what is computed linearly from it."""
    shifted = set(placement.streams)
    queue = deque(shifted)
    while queue:
        for successor in variables[queue.popleft()].successors:
            if successor in variables and successor not in shifted:
                shifted.add(successor)
                queue.append(successor)
    return shifted


def _upwards(
    start: VariableKey, variables: Mapping[VariableKey, Variable], known: Collection[VariableKey]
) -> list[VariableKey]:
    """What would have to be centered for one tensor, nearest first, as far as what is known already."""
    seen = {start: None}
    queue = deque([start])
    while queue:
        key = queue.popleft()
        variable = variables[key]
        if key in known or (variable.source_blocker is not None and not variable.is_recomputed):
            continue
        for need in variable.needs.items():
            if need in variables and need not in seen:
                seen[need] = None
                queue.append(need)
    return list(seen)


def _name(key: VariableKey) -> str:
    node, _ = key
    return parameter_name(node) if node.op == "placeholder" else f"{node.name} = {describe(node)}"


def _variable(variable: Variable, placement: Placement, is_shifted: bool, assist: bool) -> list[str]:
    """The lines of one tensor."""
    key = variable.key
    true = [
        word
        for word, is_true in (
            ("computed centered", key in placement.streams),
            ("shifted", is_shifted),
            ("available centered", key in placement.centered),
        )
        if is_true
    ]
    lines = [f"  {_name(key)} along {variable.axes}: {', '.join(true) or 'left as it is'}"]
    lines.append(f"    {_price(variable, assist)}")
    if variable.making_cost.hint:
        lines.append(f"    computing it centered costs {variable.making_cost} bytes a call")
    if variable.source_blocker is not None and not variable.is_parameter and not variable.is_zero_mean:
        lines.append(f"    cannot be computed centered: {variable.source_blocker.sentence}")
    elif variable.needs:
        lines.append(f"    needs {', '.join(_name(need) for need in variable.needs.items())}")
    lines += [
        f"    its shift would be noticed: {blocker.sentence}"
        + (f" ({describe(blocker.node)})" if blocker.node is not None else "")
        for blocker in dict.fromkeys(variable.reader_blockers)
    ]
    return lines


def _price(variable: Variable, assist: bool) -> str:
    """What centering a tensor explicitly costs, in words."""
    if variable.is_zero_mean:
        return "its mean is zero as it is"
    if variable.centering_cost is None:
        return "cannot be centered beside what it is"
    if variable.is_parameter:
        what = "a parameter: centered once, beside it"
    elif variable.is_recomputed:
        what = "a view of a parameter: done once more, of the centered one"
    elif not assist:
        return "is not centered at run time (lnfold.assist is 'off')"
    else:
        return f"centering it at run time costs {variable.centering_cost} bytes a call"
    # The mark by which the parameters that an expression is made of are preferred is no traffic.
    return f"{what}, for {variable.centering_cost} bytes a call" if variable.centering_cost.hint > 1 else what
