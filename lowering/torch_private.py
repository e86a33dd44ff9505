"""Every private torch name that the backend uses, each with what it is for: here those of graphs and tensors.

The others stand beside it: what Dynamo is doing in :mod:`.torch_private_dynamo`, its graph breaks in
:mod:`.torch_private_breaks`, the hand-over to Inductor in :mod:`.torch_private_inductor`, Inductor's choices in
:mod:`.torch_private_choices`, Inductor's C++ compiler in :mod:`.torch_private_compiler`, where compiled code is kept in
:mod:`.torch_private_caches`, and what only tools use, which look at what Inductor generates, in
:mod:`.torch_private_codegen`. Nothing outside these modules may import or spell a name of torch that starts with an
underscore (a test checks it), so that a new torch release is ported by reading them. They import nothing of ours but
each other, and Triton and the larger parts of torch only inside the functions that need them. Run on torch 2.11, 2.13
and 2.15.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor, fx
from torch.utils import _pytree

# --- Dynamo's graph -------------------------------------------------------------------------------------------------

# What Dynamo writes where nn.Linear and friends call ATen's own bindings instead of torch.nn.functional.
NN_BINDINGS: Any = torch._C._nn

# ATen operators whose names start with an underscore: spellings of reshape, to, softmax and log_softmax.
ATEN_UNSAFE_VIEW: Any = torch.ops.aten._unsafe_view.default
ATEN_TO_COPY: Any = torch.ops.aten._to_copy.default
# What torch.export writes beside a cast: that the dtype is what it was.
ATEN_ASSERT_METADATA: Any = torch.ops.aten._assert_tensor_metadata.default
ATEN_SOFTMAX: Any = torch.ops.aten._softmax.default
ATEN_LOG_SOFTMAX: Any = torch.ops.aten._log_softmax.default

# What torch.nn.utils.parametrizations.weight_norm computes a weight with: v · g / ‖v‖.
WEIGHT_NORM: Any = torch._weight_norm

# What Dynamo writes where the model itself turns gradients on or off.
SET_GRAD_ENABLED: Any = torch._C._set_grad_enabled

# What Dynamo writes where the model itself turns autocast on or off.
ENTER_AUTOCAST: Any = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST: Any = torch.amp.autocast_mode._exit_autocast

# The one opaque operator that nn.TransformerEncoderLayer becomes in eval mode under no_grad ("fast path").
TRANSFORMER_ENCODER_LAYER_FORWARD: Any = torch._transformer_encoder_layer_fwd
TRANSFORMER_ENCODER_LAYER: Any = torch.ops.aten._transformer_encoder_layer_fwd.default


def call_in_closure(function: Any) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    """The method that a function of Dynamo's own calls on its argument, where its other arguments are closed over.

    On torch 2.11 Dynamo writes ``to_local``, ``redistribute`` and ``from_local`` of a sharded tensor so, because a mesh
    and placements could be no arguments of a node there.

    Returns:
        The method's name and the arguments it gets behind the tensor; None for any other function.
    """
    name = _CALLS_IN_CLOSURES.get(getattr(function, "__name__", ""))
    if name is None or not function.__module__.startswith("torch._dynamo.variables."):
        return None
    closed = inspect.getclosurevars(function).nonlocals
    return name, tuple(closed["args_as_value"]), dict(closed["kwargs_as_value"])


_CALLS_IN_CLOSURES = {
    "prim_to_local": "to_local",
    "prim_redistribute": "redistribute",
    "prim from_local": "from_local",
}


def functional_collective(name: str) -> Any:
    """Return the operator that a functional collective becomes in a graph; None where torch has no distributed."""
    if not torch.distributed.is_available():
        return None
    return getattr(torch.ops._c10d_functional, name).default


def symbolic_expression(size: torch.SymInt) -> Any:
    """Return the sympy expression of a dynamic size, without guarding on its value."""
    return size.node.expr


def size_hint(size: Any, fallback: int) -> int:
    """Return the value a dynamic size had when the graph was traced (no guard), or ``fallback`` where unknown."""
    if isinstance(size, int):
        return size
    # The size of a ragged dimension has a hint that is not a number; what data decides (`nonzero`, `item`) has none.
    hint = size.node.hint if size.node.has_hint() else None
    return hint if isinstance(hint, int) else fallback


def conditions_on_sizes(size: torch.SymInt) -> list[Any]:
    """Return what was assumed of dynamic sizes while a graph was traced, as sympy conditions."""
    environment = size.node.shape_env
    # Sizes of 0 and 1 are never taken to be dynamic, but what data decides may be either.
    smallest = [symbol >= values.lower for symbol, values in environment.var_to_range.items()]
    return [*smallest, *(guard.expr for guard in environment.guards)]


def storage_identity(value: Tensor) -> int | None:
    """Return a number that two tensors share exactly when they share storage; None where there is no storage."""
    try:
        # A DTensor's own storage holds nothing.
        return int(getattr(value, "_local_tensor", value).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        # Tensor subclasses without a storage of their own, sparse and mkldnn tensors.
        return None


def is_static_input(placeholder: fx.Node) -> bool:
    """Whether Dynamo marked a placeholder as a parameter or buffer of a module (the same object at each call)."""
    return "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", {})


def mark_static_input(placeholder: fx.Node) -> None:
    """Mark a new placeholder as one whose tensor is a weight, so that CUDA graphs neither copy nor guard it."""
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    placeholder._dynamo_source = None  # AOTAutograd reads it of every placeholder


def copy_placeholder_source(old: fx.Node, new: fx.Node) -> None:
    """Carry over what Graph.graph_copy drops: the source Dynamo keeps on a placeholder."""
    new._dynamo_source = getattr(old, "_dynamo_source", None)


def forget_example(placeholder: fx.Node) -> None:
    """Drop the real value that Dynamo keeps with a placeholder of its own while it traces.

    Dynamo forgets it after compiling. In a copy it would stay: large constants, and weak references for which torch
    refuses to move a tensor subclass (``swap_tensors``).
    """
    placeholder.meta.pop("grapharg", None)


def copy_graph_module_attributes(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Carry over what AOTAutograd reads from the graph module Dynamo made."""
    new.meta = dict(old.meta)
    for name in ("_param_name_to_source", "_backend_id", "_compiled_fn_id"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def source_name(placeholder: fx.Node) -> str | None:
    """Return the Python expression of a placeholder (``L['self']._modules['h']...``), or None."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return str(name() if callable(name) else name)


class _NameInModel(NamedTuple):
    """Stands for the source of a placeholder that Dynamo did not make. (Dynamo's own is a function of no arguments.)"""

    name: str


def give_name_in_model(placeholder: fx.Node, name: str) -> None:
    """Say of a placeholder of torch.export's which parameter of the model it is, by its dotted name."""
    placeholder._dynamo_source = _NameInModel(f"L['self'].{name}")


def take_source_of_attribute(placeholder: fx.Node, graph_module: fx.GraphModule, name: str) -> None:
    """Give a placeholder the source that Dynamo noted for an attribute of its graph module (None where it did not)."""
    placeholder._dynamo_source = getattr(graph_module, "_param_name_to_source", {}).get(name)


def give_source_to_attribute(graph_module: fx.GraphModule, name: str, placeholder: fx.Node) -> None:
    """The other way round; an attribute whose value Dynamo knows nothing of gets a source without a place.

    AOTAutograd wants a source of its own for every parameter and buffer of a graph module.
    """
    from torch._dynamo.source import ConstantSource

    source = getattr(placeholder, "_dynamo_source", None) or ConstantSource(name)
    sources: Any = {**getattr(graph_module, "_param_name_to_source", {}), name: source}
    graph_module._param_name_to_source = sources


def is_gathered_for_the_call(placeholder: fx.Node) -> bool:
    """Whether a placeholder is a parameter of a module under FSDP, which fills it anew before each call.

    FSDP keeps the tensor and takes its memory away; the gathered values come back without a new version.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    kind = getattr(source, "guard_source", None)
    kind = kind() if callable(kind) else kind
    return bool(kind is not None and kind.is_fsdp_module())


def is_opaque_tensor(value: Any) -> bool:
    """Whether a tensor's class computes in a way of its own what is asked of it (quantized weights, DTensor, ...).

    That is what a ``__torch_dispatch__`` of its own does. Any other subclass of Tensor is a plain tensor once Dynamo
    has traced through its ``__torch_function__``: a parameter that knows how to load itself, say. A lazy parameter
    without a shape yet counts as opaque.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(value, FakeTensor):
        return False
    return type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__ or torch.nn.parameter.is_lazy(value)


def as_plain_tensors() -> Any:
    """Context in which tensors are computed with as plain ones, whatever ``__torch_function__`` their classes have.

    What is in a graph of Dynamo's was traced through it, and is not to be applied once more.
    """
    return torch._C.DisableTorchFunctionSubclass()


# --- What an operator may write to ------------------------------------------------------------------------------------

# An ATen or custom operator with one schema, a packet of them, and operators that take graphs (checkpoint, cond, ...).
OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
HigherOrderOperator = torch._ops.HigherOrderOperator


def schema_of(overload: Any) -> Any:
    """Return the schema of an operator overload, which says which arguments it writes to."""
    return overload._schema


def overload_for(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the overload of an operator that a call with these (fake) arguments runs; None where none takes them."""
    try:
        name = torch._C._jit_resolve_packet(packet._qualified_op_name, *args, **kwargs)
    except RuntimeError:
        return None  # what a call would raise as well
    return getattr(packet, name)


# --- Tensors --------------------------------------------------------------------------------------------------------


def local_tensor(value: Any) -> Tensor:
    """Return the tensor that this process holds of a DTensor, itself and not a view of it."""
    local: Tensor = value._local_tensor
    return local


def tensors_on(storage: torch.UntypedStorage) -> int:
    """Return how many tensors lie on a storage, views and NumPy's included, wherever in the process they are held."""
    # The Python object itself counts as well, for as long as somebody holds it: the caller does.
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


# The address of what a tensor's Python object holds (its TensorImpl).
implementation_address: Callable[[Tensor], int] = operator.attrgetter("_cdata")

# Counts the in-place writes to a tensor that autograd can see (not those through `.data`).
version_of: Callable[[Tensor], int] = operator.attrgetter("_version")


def fake_mode() -> Any:
    """A mode under which tensors have no memory, and are taken for ones of the device that they say they are on.

    Tensors that are not fake, such as constants made from a list, are taken for fake ones.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def values_missed_by(error: BaseException) -> str:
    """Name of the operation that asked a tensor without values for one of them; ``""`` for any other error."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    missed = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
    return str(getattr(error, "func", "")) if missed else ""


def fake_mode_of(values: Sequence[Any]) -> Any:
    """Return the mode of the fake tensors among some values, to be entered as a context; None without any."""
    from torch._subclasses.fake_tensor import FakeTensor

    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def static_fake_tensors(values: Sequence[Tensor]) -> list[Tensor]:
    """Tell the tracer that these weights have fixed shapes, whatever ``dynamic=True`` says of the other inputs.

    The tracer makes a fake tensor of a real one once and remembers it weakly: while the caller holds the result,
    AOTAutograd gets these, without symbols in their shapes, when it converts the same values.
    """
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return []
    return [context.fake_mode.from_tensor(value, static_shapes=True) for value in values]


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to every leaf of nested containers, model outputs included."""
    return _pytree.tree_map(function, tree)


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return the leaves of nested containers, and their form."""
    return _pytree.tree_flatten(tree)


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of nested containers."""
    return _pytree.tree_leaves(tree)


def tree_unflatten(leaves: Sequence[Any], form: Any) -> Any:
    """Put leaves into nested containers of a form."""
    return _pytree.tree_unflatten(leaves, form)


def leaves_with_path(tree: Any) -> list[tuple[str, Any]]:
    """Return every leaf of nested containers with where it stands, as an expression: ``".logits"``, ``"[0]"``."""
    return [(_pytree.keystr(path), leaf) for path, leaf in _pytree.tree_flatten_with_path(tree)[0]]
