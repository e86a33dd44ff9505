"""Words for operations through which the centering cannot pass, so that a report names the cause and not a symbol."""

from __future__ import annotations

from torch import fx

from lncompile.passes.decisions import Reason
from lncompile.passes.graph.traits import is_pointwise

_NORMS = frozenset(
    "layer_norm native_layer_norm group_norm native_group_norm batch_norm instance_norm rms_norm normalize "
    "local_response_norm".split()
)
_NON_LINEAR = {
    "glu": "an activation",
    **dict.fromkeys("softmax log_softmax logsumexp".split(), "a softmax"),
    **dict.fromkeys("max_pool1d max_pool2d max_pool3d adaptive_max_pool2d max amax min amin".split(), "a maximum"),
}


def explain_producer(node: fx.Node) -> tuple[Reason, str]:
    """Say why a tensor made by this node, which has no rule, cannot be produced centered."""
    if node.op in ("placeholder", "get_attr"):
        return Reason.USER_TENSOR, "the stream starts from a tensor that is not a parameter"
    name = _name(node)
    if name in _NORMS:
        return Reason.NORM_OUTPUT, "the stream starts from another norm's output, whose γ and β give it a mean again"
    words = _non_linear(node)
    if words:
        return Reason.NON_COMMUTING, f"the stream comes out of {words}, through which centering cannot be moved"
    if name == "scaled_dot_product_attention":
        return Reason.UNKNOWN_OPERATION, "the stream comes out of attention itself"
    return Reason.UNKNOWN_OPERATION, f"the stream comes out of '{name}', for which there is no rule"


def explain_consumer(node: fx.Node) -> tuple[Reason, str]:
    """Say why this node, which reads a stream, would notice that its mean is gone."""
    name = _name(node)
    kind = "a normalisation over other axes" if name in _NORMS else _non_linear(node) or f"'{name}'"
    kind = "an RMSNorm" if name == "rms_norm" else kind
    return Reason.VISIBLE, f"the stream is also read by {kind}, which would see that its mean is gone"


def _non_linear(node: fx.Node) -> str:
    """What kind of function a node computes that is not linear; "" for anything else."""
    return "an activation" if is_pointwise(node) else _NON_LINEAR.get(_name(node), "")


def _name(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return str(target).rstrip("_")
