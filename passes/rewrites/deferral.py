"""Deferring the scale: a folded norm whose readers are linear layers is never written, only its rows' scales are.

With γ and β absorbed (``affine``) a folded norm is one number a row, and that commutes with a product from the right
(FlashNorm, arXiv 2407.09577)::

    RMSNorm(x) W = (x / sqrt(mean(x²) + ε)) W = s ⊙ (x W),      s = 1 / sqrt(mean(x²) + ε)

Before (the second half of GPT-2's block, in short)::

    y  = layer_norm(stream, (768,), None, None, ε)         # γ and β are in W and b
    up = gelu(addmm(b, y, W))

After::

    s  = rsqrt(mean(stream²) + ε)                          # [tokens, 1], in the kernel that adds the residual
    up = gelu(s ⊙ mm(stream, W) + b)                       # in the kernel of the gelu

The stream is in memory anyway, for the residual connection; the normalised tensor is not written any more. What it
costs is a place to multiply: where something pointwise follows the product there is one, and where Inductor generates
the product itself (max-autotune with its templates alone); where an extern product feeds another one or attention a
kernel would be added. Folding is what makes this safe: with a mean left in the stream the product would carry it, and
subtracting it again cancels digits.

**Legal** where all that reads the norm are linear layers with rows in the norm's order, γ and β can be absorbed, and
no dtype is float16, which may overflow before it is scaled: ``x W`` is as large as the stream, not as a normalised row.
In bfloat16 the rounding of ``W diag(γ)`` takes the place of that of the norm's output.

**By itself** (``"auto"``) only where it wins by the cost model (:class:`Balance`): every reader's result goes into
pointwise operations alone, one of which is not a mere addition (Inductor may take that into the product), or is read
whole where Inductor generates the product; the stream has other readers; and the write that is saved is larger than the
copies of weights that are kept. On a CPU only in bfloat16 (:func:`gains_on`). ``"on"`` asks neither for other readers
nor for the weights nor for the device: it defers wherever no kernel is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lncompile.lowering import emit, row_scale, scale_rows, scale_stored_apart, slices_of_row, target_of
from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph import provenance
from lncompile.passes.graph.canonical import canonicalise, tensor_of
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.graph.operands import WRITTEN, shape
from lncompile.passes.graph.sizes import same_size
from lncompile.passes.graph.traits import Trait, has, is_pointwise
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.placement.costs import NOTHING, Balance, Bytes, CostModel, one_pass
from lncompile.passes.rewrites.affine import Absorption, CenteredFor, device_of, weigh_absorption
from lncompile.passes.rewrites.arithmetic import training_dtype
from lncompile.passes.rewrites.consumers import Consumer, find_consumers

# Between norm and product: what leaves rows where they are.
_KEEPS_ROWS = Trait.RESHAPES | Trait.CASTS | Trait.PASSES | Trait.DROPS
# Between product and pointwise operations: what Inductor reads through.
_CUTS = Trait.CUTS | Trait.SPLITS
_VIEWS = _KEEPS_ROWS | _CUTS | Trait.PERMUTES


@dataclass(frozen=True)
class Deferral:
    """The decision to defer one norm's scale.

    Attributes:
        site: the norm.
        absorption: of its affine by the products that read it.
        balance: what both save and cost together.
    """

    site: NormSite
    absorption: Absorption
    balance: Balance


def plan_deferrals(
    mode: str,
    absorb_affine: str,
    folded: Sequence[NormSite],
    centered: CenteredFor,
    facts: GraphFacts,
    costs: CostModel,
    generates_products: Callable[[torch.device], bool] = lambda device: False,
) -> tuple[tuple[Deferral, ...], dict[fx.Node, str]]:
    """Decide for every folded norm whether its scale is deferred.

    Args:
        mode: ``lnfold.defer``.
        absorb_affine: ``lnfold.absorb_affine``; where it is ``"off"`` a norm with an affine keeps its scale as well.
        folded: the norms that fold.
        centered: which parameters are centered for that.
        facts: the facts of the graph.
        costs: what is weighed; in training nothing is deferred.
        generates_products: whether the kernels of products on a device carry what stands behind them.

    Returns:
        The deferrals, and for every folded norm, by its node, why or why not, in words.
    """
    deferrals: list[Deferral] = []
    words: dict[fx.Node, str] = {}
    for site in folded if mode != "off" else ():
        tensor = tensor_of(site.input)
        assert tensor is not None  # what find_sites requires of a site
        if mode == "auto" and not gains_on(target_of(tensor.device), tensor.dtype):
            continue
        try:
            consumers = _deferrable(site, absorb_affine, facts, costs)
        except Blocked as blocked:
            words[site.node] = f"scaled in place: {blocked.sentence}"
            continue
        absorption = weigh_absorption(site, consumers, centered)
        carries = generates_products(target_of(tensor.device))
        products = [consumer.operation.node for consumer in consumers]
        adding = [node for node in products if not (_has_a_kernel_behind(node) or (carries and not _is_cut(node)))]
        balance = absorption.balance + Balance(_traffic(site, consumers), NOTHING, -len(adding))
        said = balance.in_words(device_of(site))
        if adding:
            said += f" (behind {', '.join(provenance.describe(node) for node in adding)})"
        if balance.wins or (mode == "on" and not adding):
            deferrals.append(Deferral(site, absorption, balance))
            words[site.node] = f"scaled behind the products: {said}"
        else:
            words[site.node] = f"scaled in place: behind the products it {said}"
    return tuple(deferrals), words


def gains_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether less memory traffic is less time on a device.

    On a CPU it is in bfloat16 (1.006 to 1.026 times as fast at 768 to 2048 features,
    ``benchmarks/results/deferral-cpu.json``). In float32 no difference was measured: there a product takes its bias
    along, unless it is scaled first.
    """
    return device.type != "cpu" or dtype == torch.bfloat16


def _deferrable(site: NormSite, absorb_affine: str, facts: GraphFacts, costs: CostModel) -> tuple[Consumer, ...]:
    """The products behind which a norm may be scaled. Raises Blocked."""
    if costs.training:
        raise Blocked(Reason.TRAINING, "γ and β are trained")
    consumers = find_consumers(site, facts)
    if absorb_affine == "off" and (site.weight is not None or site.bias is not None):
        raise Blocked(Reason.VARYING_SCALE, "lnfold.absorb_affine is 'off', and γ and β have to be absorbed for it")
    tensor = tensor_of(site.input)
    # float16 is not a dtype of theirs: find_consumers lets none of it through behind the norm.
    if tensor is None or tensor.dtype != site.output_dtype or tensor.dtype == torch.float16:
        raise Blocked(Reason.UNKNOWN_OPERATION, "its output has another dtype than its input, or is float16")
    # The products are to read the stream itself, later than the norm does.
    if facts.is_written_after(site.input, site.node):
        raise Blocked(Reason.MUTATION, "the stream is written to behind the norm")
    for consumer in consumers:
        node = consumer.operation.node
        if consumer.operation.name == "convolution" or node.meta.get(WRITTEN):
            raise Blocked(Reason.UNKNOWN_OPERATION, f"no row scale goes behind {provenance.describe(node)}")
        if not all(_keeps_rows(step, tensor.dtype) for step in consumer.path[1:]) or _rows(site, node) is None:
            raise Blocked(Reason.DIFFERENT_AXES, f"the rows are moved in front of {provenance.describe(node)}")
        if consumer.bias is not None and len(shape(consumer.bias)) != 1:
            raise Blocked(Reason.UNSUPPORTED_WEIGHT, f"what {provenance.describe(node)} adds is not a plain bias")
        if consumer.operation.name == "addmm" and (consumer.operation["alpha"], consumer.operation["beta"]) != (1, 1):
            raise Blocked(Reason.VARYING_SCALE, f"{provenance.describe(node)} scales its bias and its product apart")
    return consumers


def _keeps_rows(step: fx.Node, dtype: torch.dtype) -> bool:
    operation, tensor = canonicalise(step), tensor_of(step)
    return has(operation, _KEEPS_ROWS) and tensor is not None and tensor.dtype == dtype


def _rows(site: NormSite, product: fx.Node) -> bool | None:
    """Whether the rows of a product are those of the norm flattened; None if they are neither that nor the same."""
    rows, result = shape(site.input)[:-1], shape(product)[:-1]
    if len(rows) == len(result) and all(same_size(one, other) for one, other in zip(rows, result, strict=True)):
        return False
    return True if len(result) == 1 else None


def _has_a_kernel_behind(product: fx.Node) -> bool:
    """Whether all that reads a product's result is pointwise, and makes a kernel that can scale it as well.

    Additions in between, of a bias by hand, are a part of the product or of that kernel.
    """
    makes_a_kernel = False
    pending = [product]
    while pending:
        for user in pending.pop().users:
            operation = canonicalise(user)
            if operation is not None and operation.name == "metadata":
                continue
            # Inductor may turn a sum into the bias of the product.
            if has(operation, _VIEWS | Trait.ADDS):
                pending.append(user)
            elif has(operation, Trait.SCALES) or is_pointwise(user):
                makes_a_kernel = True
            else:
                return False
    return makes_a_kernel


def _is_cut(product: fx.Node) -> bool:
    """Whether parts of a product's result are read one by one (queries, keys and values of a joint projection).

    What a product stored may be read in parts; of what is computed from it Inductor stores each part. With a sum in
    between, of a bias by hand, it does so anyway.
    """
    pending = [product]
    while pending:
        for user in pending.pop().users:
            operation = canonicalise(user)
            if has(operation, _CUTS):
                return True
            if has(operation, _VIEWS):
                pending.append(user)
    return False


def _traffic(site: NormSite, consumers: Sequence[Consumer]) -> Bytes:
    """What is not written: the normalised tensor, if the stream is in memory anyway. The rows' scales are instead."""
    tensor = tensor_of(site.input)
    assert tensor is not None  # its dtype was read when the site was found to be deferrable
    scale = one_pass(tensor.select(-1, 0)) * max(1, 4 // tensor.element_size())
    written = one_pass(tensor) if len(site.input.users) > 1 or site.input.op == "placeholder" else NOTHING
    return written - scale * (1 + len(consumers))


# --- carrying it out ---


def defer(graph: fx.Graph, deferrals: Sequence[Deferral], products: Mapping[fx.Node, fx.Node]) -> None:
    """Carry deferrals out, after their affine was absorbed.

    Args:
        graph: changed in place.
        deferrals: what to do.
        products: products that took the place of others while the affine was absorbed, by these.
    """
    for deferral in deferrals:
        site = deferral.site
        operation = site.current()
        stream, node = operation["input"], site.node
        tensor = tensor_of(site.input)
        assert tensor is not None  # see _traffic
        with graph.inserting_before(node):
            stored_scale = scale_stored_apart(tensor)
            arguments = (stream, site.eps, tensor.dtype, slices_of_row(tensor), stored_scale)
            scale = emit(graph, f"{node.name}_scale", row_scale, *arguments)
            # What a norm puts out is contiguous, and a view of it may count on that.
            rows = emit(graph, f"{node.name}_rows", _contiguous, stream)
        node.replace_all_uses_with(rows)
        graph.erase_node(node)
        for consumer in deferral.absorption.consumers:
            product = products.get(consumer.operation.node, consumer.operation.node)
            _scale_behind(graph, product, scale, bool(_rows(site, product)), training_dtype(tensor.dtype))


def _contiguous(value: Tensor) -> Tensor:
    return value.contiguous()


def _scale_behind(graph: fx.Graph, product: fx.Node, scale: fx.Node, flattened: bool, scale_dtype: torch.dtype) -> None:
    operation, tensor = canonicalise(product), tensor_of(product)
    assert operation is not None  # it was one when the consumer was found, or was put there
    assert tensor is not None  # likewise
    bias = None
    readers = list(product.users)
    with graph.inserting_before(product.next):
        unscaled = product
        if operation.name == "linear":
            bias = operation["bias"]
            operation.replace({("bias", None): None})
        elif operation.name == "addmm":
            bias = operation["input"]
            unscaled = graph.call_function(torch.mm, (operation["mat1"], operation["mat2"]))
            unscaled.meta.update(product.meta)
        arguments = (unscaled, scale, bias, flattened, tensor.dtype, scale_dtype)
        scaled = emit(graph, f"{product.name}_scaled", scale_rows, *arguments)
    for reader in readers:
        reader.replace_input_with(product, scaled)
    if unscaled is not product:
        graph.erase_node(product)
