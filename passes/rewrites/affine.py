"""Absorbing the affine: γ and β of a folded norm go into the linear layers that read it.

Where every reader of ``y = γ ⊙ x̂ + β`` is a product with a weight that is a parameter expression::

    W y + b = W (γ ⊙ x̂ + β) + b = (W diag(γ)) x̂ + (b + Wβ)

so the norm can hand out ``x̂`` itself (FlashNorm, arXiv 2407.09577, does it for γ). Between the norm and the product may
stand what only moves elements: views, casts, dropout in evaluation, slices of other axes. A weight that is also
centered, because it makes the input of a later norm, becomes one expression of both, rounded once::

    W ← round(C W diag(γ))          b ← round(C b + C W β)

Before (GPT-2, in short)::

    y   = layer_norm(stream, (768,), γ, β, ε)
    qkv = addmm(b, y.view(-1, 768), W)

After::

    W_affine = mul(W, γ)                      # in float64; materialised once, see materialize.py
    b_affine = b + W β
    y   = layer_norm(stream, (768,), None, None, ε)
    qkv = addmm(b_affine, y.view(-1, 768), W_affine)

**Whether it pays.** γ and β are a multiplication and an addition inside of a kernel that waits for memory, and ``2d``
numbers that it reads beside at least ``2d`` for every row: nearly nothing. A copy of each absorbing weight is as large
as the weight. So by itself (``lnfold.absorb_affine="auto"``) the pass acts only where that copy is kept anyway, because
the weight is centered. ``"on"`` absorbs wherever it can be done within the error budget.

**Where it is left.** In training (γ, β and W would be multiplied at every step). In bfloat16 where the weight is not
rounded anyway, because it is centered: the norm's output is rounded with γ in it or without, so ``W diag(γ)`` would be
one rounding more (1.35 times the error of the model was seen; 1.25 is allowed). In float16, where ``W diag(γ)`` may
leave the range in which a weight keeps its digits. Where a weight is sharded, quantized or no parameter; where any
reader is something else, the caller included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.nn import functional

from lncompile.lowering import emit
from lncompile.passes.decisions import Blocked
from lncompile.passes.graph import provenance
from lncompile.passes.graph.canonical import canonicalise, tensor_of
from lncompile.passes.graph.expressions import after_definition
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.placement.costs import NOTHING, Balance, Bytes, CostModel, Device, one_pass
from lncompile.passes.placement.cut import Placement
from lncompile.passes.placement.variables import Variable, VariableKey
from lncompile.passes.rewrites.arithmetic import EXACT
from lncompile.passes.rewrites.consumers import Consumer, find_consumers

# Which parameters each product's result is centered by.
CenteredFor = Mapping[fx.Node, Collection[fx.Node]]


@dataclass(frozen=True)
class Absorption:
    """The decision to absorb one norm's affine.

    Attributes:
        site: the norm.
        consumers: all that read it.
        balance: what it saves and costs. A weight that is centered is copied anyway, and costs no memory.
    """

    site: NormSite
    consumers: tuple[Consumer, ...]
    balance: Balance

    def names(self) -> tuple[str, ...]:
        """Names of the weights that absorb it; none of a norm without an affine."""
        if self.site.weight is None and self.site.bias is None:
            return ()
        names = [name for consumer in self.consumers for name in provenance.parameter_names(consumer.weight)]
        return tuple(dict.fromkeys(names))

    def in_words(self) -> str:
        """What is done and why, for the report."""
        return f"γ and β absorbed by {', '.join(self.names())}: {self.balance.in_words(device_of(self.site))}"


def device_of(site: NormSite) -> Device | None:
    """The device that a norm runs on, if its bandwidth can be asked for."""
    tensor = tensor_of(site.input)
    return None if tensor is None else Device.of(tensor.device)


# --- finding ---


# --- deciding ---


def plan_absorptions(
    mode: str,
    folded: Sequence[NormSite],
    centered: CenteredFor,
    facts: GraphFacts,
    costs: CostModel,
    deferred: Collection[fx.Node] = (),
) -> tuple[tuple[Absorption, ...], dict[fx.Node, str]]:
    """Decide for every folded norm whether its affine is absorbed.

    Args:
        mode: ``lnfold.absorb_affine``.
        folded: the norms that fold.
        centered: which parameters are centered for that, see :func:`parameters_centered_for`.
        facts: the facts of the graph.
        costs: what is weighed; in training nothing is absorbed.
        deferred: norms whose absorption is decided already, because their scale is deferred.

    Returns:
        The absorptions, and for every folded norm, by its node, what became of its affine, in words.
    """
    absorptions: list[Absorption] = []
    words: dict[fx.Node, str] = {}
    for site in folded if mode != "off" else ():
        if site.node in deferred or (site.handwritten is None and site.weight is None and site.bias is None):
            continue
        if costs.training:
            words[site.node] = "γ and β stay: they are trained"
            continue
        try:
            consumers = find_consumers(site, facts)
        except Blocked as blocked:
            words[site.node] = f"γ and β stay: {blocked.sentence}"
            continue
        absorption = weigh_absorption(site, consumers, centered)
        rounded = _rounded_once_more(absorption, centered)
        if rounded is not None:
            words[site.node] = f"γ and β stay: {rounded} would be rounded to bfloat16 once more"
        elif mode == "on" or absorption.balance.wins:
            absorptions.append(absorption)
            words[site.node] = absorption.in_words()
        else:
            words[site.node] = f"γ and β stay: absorbing them {absorption.balance.in_words(device_of(site))}"
    return tuple(absorptions), words


def parameters_centered_for(placement: Placement, variables: Mapping[VariableKey, Variable]) -> CenteredFor:
    """Return the parameters that each product's result is centered by, by the product's node."""
    centered: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    for key in placement.streams:
        source = variables[key].composed_source
        if source is None:
            centered[key[0]].update(variables[key].operands)
        else:
            centered[source.product.node].update(source.parameters())
    return centered


def _rounded_once_more(absorption: Absorption, centered: CenteredFor) -> str | None:
    """Name of a weight in bfloat16 that is not rounded anyway, for its centering; None if there is none."""
    for consumer in absorption.consumers if absorption.site.weight is not None else ():
        tensor = tensor_of(consumer.weight)
        narrow = tensor is not None and tensor.dtype == torch.bfloat16
        if narrow and consumer.weight not in centered.get(consumer.operation.node, ()):
            return " · ".join(provenance.parameter_names(consumer.weight))
    return None


def weigh_absorption(site: NormSite, consumers: tuple[Consumer, ...], centered: CenteredFor) -> Absorption:
    """Return the absorption of a norm's affine by these consumers, priced but not decided."""
    saved, memory = NOTHING, NOTHING
    for parameter in (site.weight, site.bias):
        tensor = None if parameter is None else tensor_of(parameter)
        saved += NOTHING if tensor is None else one_pass(tensor)
    absorbing = [consumer.weight for consumer in consumers if site.weight is not None]
    for weight in dict.fromkeys(absorbing):
        tensor = tensor_of(weight)
        assert tensor is not None  # its shape was read when the consumer was found
        readers = [consumer for consumer in consumers if consumer.weight is weight]
        if not _is_copied_anyway(weight, readers, centered):
            memory += one_pass(tensor)
    for consumer in consumers if site.bias is not None else ():
        row = _row_of_outputs(consumer)
        if consumer.bias is None:
            saved -= row  # it is read where none was
        if consumer.bias is None or not _is_copied_anyway(consumer.bias, [consumer], centered):
            memory += row
    return Absorption(site, consumers, Balance(saved, memory))


def _row_of_outputs(consumer: Consumer) -> Bytes:
    """The bytes of a bias of the consumer's."""
    weight = tensor_of(consumer.weight)
    assert weight is not None  # its shape was read when the consumer was found
    return one_pass(weight.new_empty([weight.shape[consumer.operands.outgoing]]))


def _is_copied_anyway(parameter: fx.Node, readers: Sequence[Consumer], centered: CenteredFor) -> bool:
    """Whether a parameter is centered for its readers, which alone read the copy."""
    nodes = {reader.operation.node for reader in readers}
    return set(parameter.users) == nodes and all(parameter in centered.get(node, ()) for node in nodes)


# --- carrying it out ---


def scale_weight(weight: Tensor, scale: Tensor, dimension: int, dtype: torch.dtype) -> Tensor:
    """Take a scale of the features that come in into a weight: ``W ← W diag(γ)``, in float64, rounded once.

    Args:
        weight: ``[out, in]`` with ``dimension`` 1, ``[in, out]`` with 0, or a convolution's ``[out, in, ...]`` with 1;
            float64 if it is still to be rounded (a centered weight).
        scale: γ ``[in]``, of any floating dtype.
        dimension: which dimension of the weight is ``in``.
        dtype: dtype of the result.

    Returns:
        A new tensor of the weight's shape.

    Example:
        >>> W, γ, x = torch.randn(4, 3), torch.randn(3), torch.randn(3)
        >>> torch.allclose(scale_weight(W, γ, 1, W.dtype) @ x, W @ (γ * x), atol=1e-6)
        True
    """
    along = torch.movedim(weight.to(EXACT), dimension, -1)
    return torch.movedim(torch.mul(along, scale.to(EXACT)), -1, dimension).to(dtype)


def shift_bias(bias: Tensor | None, weight: Tensor, shift: Tensor, dimension: int, dtype: torch.dtype) -> Tensor:
    """Take a shift of the features that come in into the bias: ``b ← b + Wβ``, in float64, rounded once.

    Args:
        bias: ``[out]``, or None for zeros; float64 if it is still to be rounded.
        weight: as for :func:`scale_weight`. Over the kernel of a convolution is summed.
        shift: β ``[in]``, of any floating dtype.
        dimension: which dimension of the weight is ``in``.
        dtype: dtype of the result.

    Returns:
        ``[out]``.

    Example:
        >>> W, β = torch.randn(4, 3), torch.randn(3)
        >>> torch.allclose(shift_bias(None, W, β, 1, W.dtype), W @ β, atol=1e-6)
        True
    """
    product = torch.matmul(torch.movedim(weight.to(EXACT), dimension, -1), shift.to(EXACT))
    row = torch.sum(torch.flatten(torch.unsqueeze(product, -1), 1), 1)
    return (row if bias is None else torch.add(bias.to(EXACT), row)).to(dtype)


@dataclass(frozen=True)
class Absorbed:
    """What an absorption put into the graph.

    Attributes:
        parameters: nodes of parameters that absorbed something, to be materialised.
        products: the product that took the place of another one, by that.
    """

    parameters: list[fx.Node] = field(default_factory=list)
    products: dict[fx.Node, fx.Node] = field(default_factory=dict)


def absorb(graph: fx.Graph, absorptions: Sequence[Absorption], rounded: Sequence[fx.Node]) -> Absorbed:
    """Carry absorptions out.

    Args:
        graph: changed in place.
        absorptions: what to do.
        rounded: nodes of centered parameters, computed in float64 and rounded at their end. What is absorbed into one
            of them starts from what it was before it was rounded. One that is not read any more is erased.
    """
    done = Absorbed()
    if not absorptions:
        return done
    exact = {node: node.args[0] for node in rounded if node.target == "to" and isinstance(node.args[0], fx.Node)}
    made: dict[tuple[fx.Node | None, ...], fx.Node] = {}
    order = {node: index for index, node in enumerate(graph.nodes)}
    for absorption in absorptions:
        site = absorption.site
        for consumer in absorption.consumers:
            _absorb_into(graph, consumer, site.weight, site.bias, exact, made, done.products, order)
        site.current().replace({("weight", None): None, ("bias", None): None})
    for node in exact:
        if not node.users and node not in made.values():
            graph.erase_node(node)
    done.parameters.extend(made.values())
    return done


def _absorb_into(
    graph: fx.Graph,
    consumer: Consumer,
    scale: fx.Node | None,
    shift: fx.Node | None,
    exact: Mapping[fx.Node, fx.Node],
    made: dict[tuple[fx.Node | None, ...], fx.Node],
    products: dict[fx.Node, fx.Node],
    order: Mapping[fx.Node, int],
) -> None:
    node, operands = consumer.operation.node, consumer.operands
    operation = canonicalise(node)
    assert operation is not None  # centering only exchanged its parameters
    # Read now: they may be centered since the consumer was found.
    weight, bias = operation[operands.weight], None if operands.bias is None else operation[operands.bias]
    scaled, shifted = weight, bias
    tensor = tensor_of(weight)
    assert tensor is not None  # its shape was read when the consumer was found
    wide, wide_bias = exact.get(weight, weight), None if bias is None else exact.get(bias, bias)
    if scale is not None:
        scaled = made.get((weight, scale))
        if scaled is None:
            with graph.inserting_before(_behind_all(order, wide, scale)):
                name = f"{weight.name}_affine"
                scaled = emit(graph, name, scale_weight, wide, scale, operands.incoming, tensor.dtype, value=tensor)
            made[weight, scale] = scaled
    if shift is not None:
        shifted = made.get((weight, bias, shift))
        if shifted is None:
            like = tensor_of(bias) if bias is not None else tensor.new_empty([tensor.shape[operands.outgoing]])
            assert like is not None  # a bias is one tensor
            arguments = (wide_bias, wide, shift, operands.incoming, like.dtype)
            with graph.inserting_before(_behind_all(order, wide_bias, wide, shift)):
                shifted = emit(graph, f"{(bias or weight).name}_affine_bias", shift_bias, *arguments, value=like)
            made[weight, bias, shift] = shifted
    with graph.inserting_before(node):
        if operands.bias is not None:
            operation.replace({(operands.weight, None): scaled, (operands.bias, None): shifted})
        elif shifted is None:
            operation.replace({(operands.weight, None): scaled})
        else:
            product = emit(graph, node.name, _product_with_bias, operation[operands.input], scaled, shifted)
            product.meta.update({k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")})
            node.replace_all_uses_with(product)
            graph.erase_node(node)
            products[node] = product


def _behind_all(order: Mapping[fx.Node, int], *sources: fx.Node | None) -> fx.Node:
    """Where what is computed of some nodes can stand. Not in front of one product: one before it may read the same."""
    return after_definition(max((source for source in sources if source is not None), key=order.__getitem__))


def _product_with_bias(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``input @ weight + bias`` as the one call that it is in cuBLAS; the transpose is a view."""
    return functional.linear(input, torch.t(weight), bias)
