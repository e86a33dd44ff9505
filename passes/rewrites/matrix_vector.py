"""One row at a time: products written as sums that Inductor generates, with the norm in front of them inside.

At batch 1 each step of decoding multiplies one row with every weight. An extern product is then a launch between two
others, and each norm a kernel of a few hundred elements that everybody waits for. Written as a sum over the weight's
elements, a product takes in what is computed of its result, and the folded norm of its row (FlashNorm, arXiv
2407.09577, for one row)::

    s = rsqrt(mean(x²) + ε)
    y = s Σₖ W[n, k] γ[k] x[k] + Σₖ W[n, k] β[k] + b[n]          # three sums over one pass of W: one kernel

Before (a block of GPT-2 or OPT, launches behind one another)::

    norm │ qkv │ caches │ attention │ projection │ residual add and norm │ up │ gelu │ down │ (residual add)

After::

    norm and qkv │ caches │ attention │ projection and residual add │ norm, up and gelu │ down and residual add

Folding is what makes it possible: with a mean in the stream the variance would need another pass, or cancel digits.

**Legal** where the graph computes no gradients, a product has one row by the graph's own sizes and a plain matrix whose
rows lie in memory one after the other, and everything has one dtype. Sums are in float32, so float16 overflows nowhere
it did not. A weight that is kept as ``[in, out]`` is copied the other way round, if it is a parameter.

**Where it adds no kernel.** A product is one launch either way, unless Inductor cuts the sum in two because it has few
outputs (:data:`OUTPUTS_OF_AN_UNCUT_SUM`): then it is left. A norm goes inside only where products are all that reads
it, and not on a CPU: no launch is saved there, and three sums over a weight take longer than one.

**By itself** (``lnfold.matrix_vector="auto"``) only with weights that lie right, or are copied anyway because they are
centered. On a CPU in 32 and 16 bits, where it was measured to be faster (:func:`lncompile.lowering.is_faster_as_sum`);
on a GPU where Inductor does the same with products that have no bias: where it tunes its kernels by coordinate descent
(max-autotune), without which sums do not reach a GPU's bandwidth. ``"on"`` asks for neither, and turns that tuning on.
On a GPU launches are counted in generated code; time was not measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lncompile.lowering import (
    blocks_of_weight,
    emit,
    matrix_vector,
    normed_matrix_vector,
    realised,
    target_of,
    torch_private,
    transposed_copy,
)
from lncompile.passes.decisions import Blocked
from lncompile.passes.graph import provenance
from lncompile.passes.graph.canonical import Operation, canonicalise, tensor_of
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.graph.operands import WRITTEN, shape
from lncompile.passes.graph.parameter_expressions import find_autocast
from lncompile.passes.graph.product_operands import PRODUCTS
from lncompile.passes.graph.traits import Trait, has
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.placement.costs import CostModel
from lncompile.passes.rewrites.affine import CenteredFor
from lncompile.passes.rewrites.consumers import consumers_of, features_of, is_plain_layer_norm

# What Inductor cuts in two: a sum of more elements than this, for fewer outputs than fill a large GPU twice.
LONGEST_UNCUT_SUM = 8192
OUTPUTS_OF_AN_UNCUT_SUM = 512

_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
# Between a norm and a product: what leaves a row as it is and where it is, if the features stay whole and in order. A
# cast or copy would be a kernel of its own.
_KEEPS_THE_ROW = Trait.RESHAPES | Trait.CUTS | Trait.PASSES | Trait.DROPS


@dataclass(frozen=True)
class OneRowProduct:
    """A product of one row that is to be a sum.

    Attributes:
        node: the product.
        row: what it multiplies.
        copied: its weight, where that is kept the other way round and has to be copied.
    """

    node: fx.Node
    row: fx.Node
    copied: fx.Node | None


@dataclass(frozen=True)
class MatrixVectors:
    """What is done to a graph of one row.

    Attributes:
        products: that become sums.
        inside: the norms that go into them, by the product.
        realised: what is kept in memory so that it is not computed twice, by the node.
    """

    products: tuple[OneRowProduct, ...] = ()
    inside: Mapping[fx.Node, NormSite] = field(default_factory=dict)
    realised: tuple[fx.Node, ...] = ()

    @property
    def norms(self) -> set[fx.Node]:
        """The norms that go inside."""
        return {site.node for site in self.inside.values()}

    def without(self, others: Collection[fx.Node]) -> MatrixVectors:
        """The same without some of the products, none of which a norm goes into."""
        rest = tuple(product for product in self.products if product.node not in others)
        return dataclasses.replace(self, products=rest)


def plan_matrix_vectors(
    mode: str,
    may_copy: bool,
    graph: fx.Graph,
    folded: Sequence[NormSite],
    centered: CenteredFor,
    facts: GraphFacts,
    costs: CostModel,
    is_faster_as_sum: Callable[[Tensor], bool] = lambda product: False,
) -> tuple[MatrixVectors, dict[fx.Node, str]]:
    """Decide which products become sums, and which folded norms go into them.

    Args:
        mode: ``lnfold.matrix_vector``.
        may_copy: whether weights that are kept as ``[in, out]`` may be copied the other way round.
        graph: not changed.
        folded: the norms that fold.
        centered: which parameters are centered for that; by itself no others are copied.
        facts: the facts of the graph.
        costs: in training nothing is done.
        is_faster_as_sum: whether a product of one row is, by its result.

    Returns:
        What is to be done, and for every norm that goes inside, by its node, where, in words.
    """
    if mode == "off" or costs.training:
        return MatrixVectors(), {}
    autocast = find_autocast(graph, list(facts.examples.values()))
    products: dict[fx.Node, OneRowProduct] = {}
    for node in graph.nodes:
        tensor = tensor_of(node)
        if node in autocast or tensor is None or (mode == "auto" and not is_faster_as_sum(tensor)):
            continue
        copied = facts.parametric if mode == "on" else centered.get(node, ())
        product = _one_row_product(node, copied if may_copy else (), facts)
        if product is not None:
            products[node] = product
    inside: dict[fx.Node, NormSite] = {}
    words: dict[fx.Node, str] = {}
    for site in folded:
        readers = _products_that_read(site, products, facts) if _saves_a_launch(site) else ()
        if readers:
            inside.update(dict.fromkeys(readers, site))
            places = ", ".join(provenance.describe(reader) for reader in readers)
            words[site.node] = f"computed for one row in the kernels of {places}"
    rows = [inside[node].input if node in inside else product.row for node, product in products.items()]
    origins = dict.fromkeys(_origin(row) for row in rows)
    kept = tuple(origin for origin in origins if origin not in products and _is_whole_storage(origin, facts))
    return MatrixVectors(tuple(products.values()), inside, kept), words


def _one_row_product(node: fx.Node, copied: Collection[fx.Node], facts: GraphFacts) -> OneRowProduct | None:
    """The product that a node is, if it can be a sum; the weights in ``copied`` may be turned round."""
    operation, result = canonicalise(node), tensor_of(node)
    if operation is None or operation.name not in ("linear", "addmm", "matmul") or operation.in_place:
        return None
    operands = PRODUCTS[operation.name]
    row, weight = operation[operands.input], operation[operands.weight]
    bias = None if operands.bias is None else operation[operands.bias]
    tensors = [tensor_of(operand) if isinstance(operand, fx.Node) else None for operand in (row, weight)]
    if result is None or node.meta.get(WRITTEN) or any(not _is_plain(tensor) for tensor in (*tensors, result)):
        return None
    given, matrix = tensors
    assert given is not None  # plain
    assert matrix is not None
    if matrix.dim() != 2 or len({given.dtype, matrix.dtype, result.dtype}) > 1 or given.dtype not in _DTYPES:
        return None
    features, outputs = matrix.shape[operands.incoming], matrix.shape[operands.outgoing]
    if given.numel() != features or given.shape[-1] != features or result.numel() != outputs:
        return None
    if features > LONGEST_UNCUT_SUM and outputs < OUTPUTS_OF_AN_UNCUT_SUM:
        return None
    if bias is not None:
        added = tensor_of(bias) if isinstance(bias, fx.Node) else None
        if not _is_plain(added) or added.shape != (outputs,) or added.dtype != given.dtype:  # type: ignore[union-attr]
            return None
    if operation.name == "addmm" and (operation["alpha"], operation["beta"]) != (1, 1):
        return None
    if _as_rows(operation) is not None:
        return OneRowProduct(node, row, None)
    if operands.incoming == 0 and weight in copied and weight in facts.parametric:
        return OneRowProduct(node, row, weight)
    return None


def _is_plain(tensor: Tensor | None) -> bool:
    return (
        tensor is not None
        and not torch_private.is_opaque_tensor(tensor)
        and all(isinstance(size, int) for size in tensor.shape)
    )


def _as_rows(operation: Operation) -> fx.Node | None:
    """The weight of a product as ``[out, in]`` with rows that lie in memory whole, one after the other."""
    weight = operation[PRODUCTS[operation.name].weight]
    if operation.name != "linear":
        transposing = canonicalise(weight)
        dimensions = {"t": {0, 1}}
        if transposing is None or transposing.name not in ("t", "transpose"):
            return None
        if transposing.name == "transpose":
            dimensions["transpose"] = {transposing["dim0"] % 2, transposing["dim1"] % 2}
        if dimensions[transposing.name] != {0, 1}:
            return None
        weight = transposing["input"]
    tensor = tensor_of(weight)
    return weight if tensor is not None and tensor.dim() == 2 and tensor.is_contiguous() else None


def _saves_a_launch(site: NormSite) -> bool:
    """Whether a norm costs a launch where it stands alone: on a CPU a kernel is a loop behind another."""
    tensor = tensor_of(site.input)
    return tensor is not None and target_of(tensor.device).type != "cpu"


def _products_that_read(site: NormSite, products: Collection[fx.Node], facts: GraphFacts) -> tuple[fx.Node, ...]:
    """The products that read a norm's output; none if anything else does, or it is not a plain norm of one row."""
    given = tensor_of(site.input)
    if given is None or not _is_plain(given) or site.output_dtype != given.dtype:
        return ()
    if not is_plain_layer_norm(site) or len(site.normalized_shape) != 1:
        return ()
    if given.numel() != given.shape[-1] or facts.is_written_after(site.input, site.node):
        return ()
    try:
        consumers = list(consumers_of(site, _KEEPS_THE_ROW, {given.dtype}, asked_for_shape=False))
    except Blocked:
        return ()
    fits = all(
        consumer.operation.node in products
        and consumer.is_input
        and features_of(consumer.axes) == consumer.axes.rank - 1
        for consumer in consumers
    )
    return tuple(consumer.operation.node for consumer in consumers) if fits else ()


def _origin(node: fx.Node) -> fx.Node:
    """What a node is a view of, as far as views of all of a tensor go."""
    operation = canonicalise(node)
    while operation is not None and has(operation, _KEEPS_THE_ROW) and _size(operation["input"]) == _size(node):
        node = operation["input"]
        operation = canonicalise(node)
    return node


def _size(node: Any) -> int | None:
    tensor = tensor_of(node) if isinstance(node, fx.Node) else None
    return tensor.numel() if tensor is not None and _is_plain(tensor) else None


def _is_whole_storage(node: fx.Node, facts: GraphFacts) -> bool:
    """Whether a node's result is new memory, all of which it fills in the order of its elements."""
    tensor = tensor_of(node)
    if node.op not in ("call_function", "call_method") or not _is_plain(tensor) or node.meta.get(WRITTEN):
        return False
    assert tensor is not None  # plain
    own = facts.storages.get(node)
    if own is None or any(facts.storages.get(source) == own for source in node.all_input_nodes):
        return False
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return whole and tensor.is_contiguous() and tensor.storage_offset() == 0


# --- carrying it out ---


def copy_transposed(graph: fx.Graph, plan: MatrixVectors) -> list[fx.Node]:
    """Let products read weights that are kept as ``[in, out]`` from copies of their own.

    Args:
        graph: changed in place.
        plan: what to do.

    Returns:
        The copies, parameter expressions that can leave the graph.
    """
    copies: dict[fx.Node, fx.Node] = {}
    present = set(graph.nodes)  # a mean that was a product with ones is gone where its norm folded
    for product in plan.products:
        if product.copied is None or product.node not in present:
            continue
        operation = canonicalise(product.node)
        assert operation is not None  # rewrites only exchange operands
        key = (PRODUCTS[operation.name].weight, None)
        weight = operation[key[0]]
        if weight not in copies:
            with graph.inserting_before(product.node):
                copies[weight] = emit(graph, f"{weight.name}_transposed", transposed_copy, weight)
        with graph.inserting_before(product.node):
            turned = emit(graph, f"{weight.name}_turned", torch.t, copies[weight])
        operation.replace({key: turned})
    return list(copies.values())


def write_as_sums(graph: fx.Graph, plan: MatrixVectors) -> None:
    """Put the sums in the place of the products, and norms into them, after parameter expressions left the graph.

    Args:
        graph: changed in place.
        plan: what to do.
    """
    present = set(graph.nodes)
    for node in plan.realised:
        if node in present:
            _realise(graph, node)
    for product in plan.products:
        node = product.node
        if node not in present:
            continue  # a mean, taken as a product with ones, that was taken out with its norm
        operation, tensor = canonicalise(node), tensor_of(node)
        assert operation is not None  # rewrites only exchange operands
        assert tensor is not None  # its sizes were read
        operands = PRODUCTS[operation.name]
        weight, row = _as_rows(operation), operation[operands.input]
        assert weight is not None  # it was, or was copied so
        bias = None if operands.bias is None else operation[operands.bias]
        sizes = tuple(tensor.shape)
        site = plan.inside.get(node)
        with graph.inserting_before(node):
            if site is None:
                blocks = blocks_of_weight(known) if (known := tensor_of(weight)) is not None else 1
                value = emit(
                    graph, node.name, matrix_vector, row, weight, bias, shape(weight), sizes, tensor.dtype, blocks
                )
            else:
                norm = site.current()
                arguments = (norm["input"], weight, bias, norm["weight"], norm["bias"], site.eps, tuple(shape(weight)))
                value = emit(graph, node.name, normed_matrix_vector, *arguments, sizes, tensor.dtype)
        node.replace_all_uses_with(value)
        graph.erase_node(node)
        _realise(graph, value)
    for norm_node in plan.norms:
        _erase_unread(graph, norm_node)


def _realise(graph: fx.Graph, node: fx.Node) -> None:
    tensor = tensor_of(node)
    assert tensor is not None  # it is a tensor that fills its storage
    readers = list(node.users)
    with graph.inserting_after(node):
        kept = emit(graph, node.name, realised, node, tuple(tensor.shape), tuple(tensor.stride()))
    for reader in readers:
        reader.replace_input_with(node, kept)


def _erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Take a norm out, and the views of it that are not read any more."""
    for user in list(node.users):
        _erase_unread(graph, user)
    graph.erase_node(node)
