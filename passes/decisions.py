"""The words of every decision: why a site was folded or left, as an enum for programs and a sentence for people."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx


class Reason(enum.Enum):
    """Why a LayerNorm site stays a LayerNorm."""

    #: The centering would have to pass an operation that does not commute with it (an activation, max-pooling, ...).
    NON_COMMUTING = "non_commuting"
    #: A scale or gate that varies along the normalised axes stands on the path.
    VARYING_SCALE = "varying_scale"
    #: The stream starts from a normalisation's output: γ and β put the mean back.
    NORM_OUTPUT = "norm_output"
    #: The stream starts from a tensor the caller passes in.
    USER_TENSOR = "user_tensor"
    #: The tensor is returned to the caller, who would see it centered.
    GRAPH_OUTPUT = "graph_output"
    #: Another consumer of the stream would see that its mean is gone.
    VISIBLE = "visible"
    #: The features are cut, joined, or normalised in other groups on the way: the means are not the same.
    DIFFERENT_AXES = "different_axes"
    #: Storage of the stream or of a weight is written to in place, and other names see it.
    MUTATION = "mutation"
    #: The weights cannot be rewritten (quantized, sharded, an inference tensor, ...).
    UNSUPPORTED_WEIGHT = "unsupported_weight"
    #: An operation that has no rule.
    UNKNOWN_OPERATION = "unknown_operation"
    #: Centering at run time is possible but costs as much as it saves, or more.
    NOT_WORTH_IT = "not_worth_it"
    #: The centered copies of its weights do not fit within ``lnfold.memory_budget``.
    MEMORY_BUDGET = "memory_budget"
    #: Gradients of the weights are wanted, and centering the weights at every step would cost more than it saves.
    TRAINING = "training"
    #: The weights change or move at nearly every call, and centering them anew would cost more than folding saves.
    MOVING_WEIGHTS = "moving_weights"
    #: A race of the ways to compile the graph was won by stock torch.compile (``lnfold.select="measure"``).
    MEASURED = "measured"
    #: The pass that folds it is switched off (``lnfold.disable_passes``).
    SWITCHED_OFF = "switched_off"
    #: A mean is subtracted, but that is not recognised as a LayerNorm: said of a difference, which is not a site.
    UNRECOGNISED = "unrecognised"
    #: Our own passes failed; the graph was compiled untouched.
    INTERNAL_ERROR = "internal_error"


#: How a fold of the whole model is written, which graphs that hold parts of it find done.
FOLD_FIRST = "model = lncompile.fold(model, *args)"

#: What to do so that a site folds, by the reason it does not: a sentence that says what to change.
REMEDIES: dict[Reason, str] = {
    Reason.NON_COMMUTING: "put a linear layer between that operation and the norm",
    Reason.VARYING_SCALE: "use a scale that is the same for all features, or put it right behind a linear layer or a "
    "convolution, whose weight then takes it in",
    Reason.NORM_OUTPUT: "put a linear layer between the two norms, or start the residual stream before the first one "
    "(pre-norm)",
    Reason.USER_TENSOR: "make the tensor inside the compiled graph: pass token ids instead of embeddings, compile the "
    "whole model instead of a part, or remove a graph break in front of it. Or fold the whole model before it is "
    f"compiled, in whatever parts: {FOLD_FIRST}",
    Reason.GRAPH_OUTPUT: "return less: leave that tensor out of what the model returns (output_hidden_states=False, or "
    "a function around the model that returns only what you use). Where only other parts of the model get it, fold the "
    f"whole model before it is compiled: {FOLD_FIRST}",
    Reason.VISIBLE: "let that reader read the norm's output, or a tensor of its own",
    Reason.DIFFERENT_AXES: "normalise over the axis that the layer before it produces",
    Reason.MUTATION: "write out of place (x = x + y)",
    Reason.UNSUPPORTED_WEIGHT: "use plain floating-point weights, made outside of inference_mode, in the dtype they "
    "are used in; fold first, then quantize or shard",
    Reason.UNKNOWN_OPERATION: "use an operation that has a rule, or add a rule for this one (see ARCHITECTURE.md)",
    Reason.NOT_WORTH_IT: "let more norms read the same tensor: for one alone, centering it costs as much as it saves",
    Reason.MEMORY_BUDGET: "set a larger lnfold.memory_budget (None: no limit on the copies of weights)",
    Reason.TRAINING: "to predict, call the model under torch.no_grad() or torch.inference_mode(); to train, take more "
    "tokens a step, or set lnfold.training='on' to fold whatever it costs",
    Reason.MOVING_WEIGHTS: "keep the weights where they are between calls (no offloading)",
    Reason.MEASURED: "to fold it whatever the race said, set lnfold.select='model'; to fold where less is gained, set "
    "a smaller lnfold.minimum_speedup",
    Reason.SWITCHED_OFF: "take the pass out of lnfold.disable_passes and LNCOMPILE_DISABLE_PASSES",
    Reason.UNRECOGNISED: "subtract the mean and use it for nothing else, then multiply or divide the difference by a "
    "function of itself (its standard deviation, its root mean square, its norm)",
    Reason.INTERNAL_ERROR: "report it with the log: this is a bug in lncompile",
}


@dataclass(frozen=True)
class Blocker:
    """What stands in the way at one place of the graph: the reason, and a sentence naming the operation."""

    reason: Reason
    sentence: str
    node: fx.Node | None = None


class Blocked(Exception):
    """Raised by a rule that cannot let the centering through; carries the reason and the sentence."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.sentence = sentence


@dataclass(frozen=True)
class ReturnedTensor:
    """A tensor that a graph returns, and that would have to be left out of its results for a site to fold.

    Attributes:
        position: among the results of the graph.
        made_by: the operation that makes it, in words.
        path: where it stands in what the model returns, as an expression: ``".last_hidden_state"``; ``""`` where that
            is not known (:func:`lncompile.explain` knows it).
        graph_break: ``"file.py:line"`` of the graph break at which the graph ends, where it does not end with the
            model: the tensor may then be one that the code behind the break needs.
        is_inside: whether it is known that other code of the model gets it, and not who calls the model.
    """

    position: int
    made_by: str
    path: str = ""
    graph_break: str = ""
    is_inside: bool = False

    @property
    def in_words(self) -> str:
        """What to call it: its place in the model's result, or what makes it."""
        return f"result{self.path}" if self.path else self.made_by


@dataclass(frozen=True)
class Verdict:
    """One LayerNorm call of a graph and what became of it.

    Attributes:
        name: module path, ``"transformer.h.0.ln_1"``; the graph's own name for a call outside any LayerNorm module.
        location: ``"file.py:line"`` of the call in the model's source, or ``""``.
        folded: whether its centering was moved out of it.
        lowering: ``"rms_norm"``, ``"rms_norm_deferred"`` (its scale follows the products that read it) or
            ``"layer_norm"``.
        reason: None for a folded site, else why not.
        detail: the reason in words, naming the blocking operation and where it stands; for a folded site how.
        centered_by: names of the parameters that absorb the centering, nearest first.
        centered_after: for a centering at run time, where it happens: module paths, nearest first.
        affine_absorbed_by: names of the weights that absorb its γ and β; empty where the norm applies them itself.
        affine: what became of γ and β of a folded site, and why, in words; "" where nothing was asked.
        deferral: why its scale is deferred, or not, likewise.
        returned: where the reason is ``graph_output``, the tensors to leave out of the results so that it folds.
        folded_before: whether it came folded (``lncompile.nn.RMSNorm``), by a fold of the whole model.
    """

    name: str
    location: str
    folded: bool
    lowering: str
    reason: Reason | None
    detail: str
    centered_by: tuple[str, ...]
    centered_after: tuple[str, ...] = ()
    affine_absorbed_by: tuple[str, ...] = ()
    affine: str = ""
    deferral: str = ""
    returned: tuple[ReturnedTensor, ...] = ()
    folded_before: bool = False

    @property
    def remedy(self) -> str | None:
        """What to do so that the site folds, in words; None for one that folds."""
        if self.reason is None:
            return None
        return leave_out(self.returned) if self.returned else REMEDIES[self.reason]


def leave_out(returned: Sequence[ReturnedTensor]) -> str:
    """Say which tensors to leave out of the results of a graph, and how."""
    ordered = sorted(returned, key=lambda tensor: tensor.position)
    names = list(dict.fromkeys(tensor.in_words for tensor in ordered))
    which = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    breaks = list(dict.fromkeys(tensor.graph_break for tensor in returned if tensor.graph_break))
    if breaks:
        return (
            f"remove the graph break at {breaks[0]}: the code behind it gets {which}. Or fold the whole model before "
            f"it is compiled: {FOLD_FIRST}"
        )
    if any(tensor.is_inside for tensor in returned):
        return (
            f"let Dynamo capture the model in one graph, without the breaks in it: one graph hands {which} to another. "
            f"Or fold the whole model before it is compiled: {FOLD_FIRST}"
        )
    return (
        f"return less: leave {which} out of what the model returns (output_hidden_states=False, or a function around "
        "the model that returns only what you use). Where only other parts of the model get it, fold the whole model "
        f"before it is compiled: {FOLD_FIRST}"
    )


@dataclass(frozen=True)
class UnrecognisedDifference:
    """A difference from the mean of the features that is not recognised as a LayerNorm. It stays as it is.

    Attributes:
        name: module path and the graph's own name of the difference, as of a :class:`Verdict`.
        location: ``"file.py:line"`` of the subtraction in the model's source, or ``""``.
        reason: why it is not recognised.
        detail: the reason in words, naming the operation in the way.
    """

    name: str
    location: str
    reason: Reason
    detail: str

    @property
    def remedy(self) -> str:
        """What to do so that it is recognised, in words."""
        return REMEDIES[self.reason]


@dataclass(frozen=True)
class GraphBreak:
    """A place where Dynamo ends a graph and begins another: no norm folds across it.

    Attributes:
        location: ``"file.py:line"`` in the model's source, or ``""``.
        reason: why, in one line of Dynamo's.
    """

    location: str
    reason: str


@dataclass(frozen=True)
class WeightRewrite:
    """One parameter expression that is centered.

    Attributes:
        name: the parameter's, or those of the parameters it is computed from.
        bytes: what it takes of memory beside the model (in the graph: of memory of the step).
        storage: where the centered weight is. ``"copy"``: beside the model; ``"centered"``: in the parameter, which
            came centered; ``"graph"``: nowhere, it is computed at every step of a training.
        variant: tells several copies of one parameter apart, centered along other axes or in another dtype.
    """

    name: str
    bytes: int
    storage: str
    variant: str = ""


@dataclass(frozen=True)
class MemoryBudget:
    """A limit on the copies of a graph: ``lnfold.memory_budget``.

    Attributes:
        limit: bytes that the centered copies may take beside the model.
        wanted: bytes that they would take without it.
        binds: whether that is too much, so that something else was decided.
    """

    limit: int
    wanted: int
    binds: bool


@dataclass(frozen=True)
class RuntimeCentering:
    """One centering that happens at each call, where it stands and why it pays."""

    after: str
    location: str
    detail: str


@dataclass(frozen=True)
class PassTime:
    """How long a pass took.

    Attributes:
        name: the pass's.
        seconds: of all its runs on a graph.
    """

    name: str
    seconds: float


class PartKind(enum.StrEnum):
    """What a part of a stream is."""

    #: A norm that reads it.
    NORM = "norm"
    #: The output of a layer whose weights can be centered, or a parameter itself.
    WEIGHTS = "weights"
    #: A tensor that is centered at each call, or cannot be centered.
    ACTIVATION = "activation"
    #: A tensor whose mean is zero as it is.
    ZERO_MEAN = "zero_mean"


@dataclass(frozen=True)
class StreamPart:
    """A norm that reads a stream, or something that is added into it.

    Attributes:
        kind: which of these.
        name: the norm's, or a module path, or the parameter's.
        location: ``"file.py:line"``, or ``""``.
        centered: of a norm whether it folds, of anything else whether it enters centered.
        detail: why it cannot be centered, or how it is, in words; ``""`` where the kind says it all.
        parameters: those that absorb the centering, or would.
        site: of a norm its place in the report; of a norm's output that enters the stream, that norm's.
    """

    kind: PartKind
    name: str
    location: str
    centered: bool
    detail: str
    parameters: tuple[str, ...]
    site: int | None = None


@dataclass(frozen=True)
class Stream:
    """A tensor that several layers add to and norms read, as it passes through a model: its parts, in order."""

    parts: tuple[StreamPart, ...]
