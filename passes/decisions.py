"""The words of every decision: why a site was folded or left, as an enum for programs and a sentence for people."""

from __future__ import annotations

import enum
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
    #: A mean is subtracted, but that is not recognised as a LayerNorm: said of a difference, which is not a site.
    UNRECOGNISED = "unrecognised"
    #: Our own passes failed; the graph was compiled untouched.
    INTERNAL_ERROR = "internal_error"


#: What would let a site fold, by the reason it does not.
REMEDIES: dict[Reason, str] = {
    Reason.NON_COMMUTING: "a linear layer between that operation and the norm",
    Reason.VARYING_SCALE: "a scale that is the same for all features, or one right behind a linear layer or a "
    "convolution, which is then taken into its weight",
    Reason.NORM_OUTPUT: "a linear layer between the two norms, or a residual stream that starts before the first "
    "(pre-norm)",
    Reason.USER_TENSOR: "making the tensor inside the compiled graph: token ids in place of embeddings, the whole "
    "model in place of a part",
    Reason.GRAPH_OUTPUT: "not returning it (output_hidden_states=False), or no graph break behind it",
    Reason.VISIBLE: "letting that reader read the norm's output, or a tensor of its own",
    Reason.DIFFERENT_AXES: "normalising the features as the layers in front put them out",
    Reason.MUTATION: "an out-of-place write (x = x + y)",
    Reason.UNSUPPORTED_WEIGHT: "plain floating-point weights, made outside of inference_mode, in the dtype they are "
    "used in; fold first, then quantize or shard",
    Reason.UNKNOWN_OPERATION: "a rule for that operation (see ARCHITECTURE.md), or an operation that has one",
    Reason.NOT_WORTH_IT: "more norms behind the same tensor: for those there are, centering it costs what it saves",
    Reason.MEMORY_BUDGET: "a larger lnfold.memory_budget (None: as many copies of weights as there are)",
    Reason.TRAINING: "more tokens a step, lnfold.training='on' whatever it costs, or, to predict, a call under "
    "torch.no_grad() or torch.inference_mode()",
    Reason.MOVING_WEIGHTS: "weights that stay where they are between calls (no offloading)",
    Reason.UNRECOGNISED: "a mean that is subtracted and not used otherwise, and a difference that is multiplied or "
    "divided by a function of itself (its deviation, its root mean square, its norm)",
    Reason.INTERNAL_ERROR: "a fix of ours: please report it with the log",
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
class Site:
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

    @property
    def remedy(self) -> str | None:
        """What would let the site fold, in words; None for one that folds."""
        return None if self.reason is None else REMEDIES[self.reason]


@dataclass(frozen=True)
class UnrecognisedDifference:
    """A difference from the mean of the features that is not recognised as a LayerNorm. It stays as it is.

    Attributes:
        name: module path and the graph's own name of the difference, as of a :class:`Site`.
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
        """What would let it be recognised, in words."""
        return REMEDIES[self.reason]


@dataclass(frozen=True)
class WeightRewrite:
    """One parameter expression that is centered.

    Attributes:
        name: the parameter's, or those of the parameters it is computed from.
        bytes: what it takes of memory beside the model (in the graph: of memory of the step).
        storage: where the centered weight is. ``"copy"``: beside the model; ``"inplace"``: in the parameter, and beside
            the model only the means that undoing it takes; ``"centered"``: in the parameter, which came centered;
            ``"graph"``: nowhere, it is computed at every step of a training.
        detail: why it is a copy, where weights were to be centered in place.
        variant: tells several copies of one parameter apart, centered along other axes or in another dtype.
    """

    name: str
    bytes: int
    storage: str
    detail: str = ""
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
