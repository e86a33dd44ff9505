"""What Dynamo calls for a graph whose weights are supplied at each call, and how another process gets it.

Saved are Inductor's code, the expressions that center weights, and the report; of the weights nothing. The process that
loads it centers the weights of its own model at the first call, and notices changes of them as any other does.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lncompile
from lncompile.compiled_graphs import CompiledGraph, are_same, arguments_of
from lncompile.lowering import torch_private_precompile as precompile
from lncompile.lowering.host_words import CompiledComparison, compiled_comparison, keep_comparison
from lncompile.lowering.norms import register_aten_layer_norm
from lncompile.options import Options, parse_ours, with_selection_of
from lncompile.passes.graph.expressions import Expression
from lncompile.reporting.report import FoldReport
from lncompile.runtime.materialize import Materializer
from lncompile.runtime.unfolded import Unfolded


class FoldedGraph(precompile.SerializableCallable):
    """A graph compiled by Inductor together with what supplies its centered weights.

    Args:
        compiled: takes the graph's inputs and, behind them, the centered weights.
        record: of the graph, with its materializer and its report.
        options: ours, for processes that load it.
        unfolded: what is called where weights change at nearly every call; None for a materializer that goes on then.
    """

    def __init__(
        self, compiled: Callable[..., Any], record: CompiledGraph, options: Options, unfolded: Unfolded | None = None
    ) -> None:
        assert record.materializer is not None
        self.record = record
        self._compiled = compiled
        self._values_for = record.materializer
        self._unfolded = unfolded
        self._options = options

    def __call__(self, *arguments: Any) -> Any:
        """Call it like the graph that Dynamo captured."""
        settled = self._values_for.settled
        if settled is not None:
            look, same = settled
            if not look.difference(arguments):
                return self._compiled(*arguments, *same)
        values = self._values_for(arguments)
        if values is None:
            assert self._unfolded is not None  # or the materializer cannot be given up
            return self._unfolded(*arguments)
        return self._compiled(*arguments, *values)

    def saved(self) -> Saved:
        """What is saved of it beside Inductor's code."""
        return Saved(
            lncompile.__version__,
            self._options,
            dict(self.record.arguments),
            self._values_for.expressions,
            self._values_for.names,
            self.record.decided,
            compiled_comparison() if self._options.check != "off" else None,
        )

    @classmethod
    def serialize_compile_artifacts(cls, fn: FoldedGraph) -> bytes:
        """Return the bytes of a graph that was compiled ahead of time (``torch.compile(...).aot_compile``).

        Raises:
            RuntimeError: if Inductor's code cannot be saved.
        """
        return pickle.dumps((fn.saved(), precompile.serialized(fn._compiled)))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> FoldedGraph:
        """Return the graph that :meth:`serialize_compile_artifacts` made bytes of.

        Raises:
            RuntimeError: if another release of lncompile has saved it.
        """
        saved: Saved
        saved, compiled = pickle.loads(data)
        saved.check_release()
        return saved.restored(precompile.deserialized(compiled))


@dataclass(frozen=True)
class Saved:
    """What is saved of a folded graph beside Inductor's code.

    Attributes:
        release: the release of lncompile that made it.
        options: ours, as they were read.
        arguments: ``mode`` and ``options`` of the ``torch.compile``.
        expressions: those that compute the centered weights.
        names: of the graph's inputs, for messages.
        report: what was decided.
        comparison: the function that looks at weights in the host's memory, compiled; None without one.
    """

    release: str
    options: Options
    arguments: Mapping[str, Any]
    expressions: tuple[Expression, ...]
    names: tuple[str, ...]
    report: FoldReport
    comparison: CompiledComparison | None = None

    def check_release(self) -> None:
        """Refuse what another release has saved: its extra inputs may stand for something else.

        Raises:
            RuntimeError: if it did not come from this release.
        """
        if self.release != lncompile.__version__:
            raise RuntimeError(
                f"this was compiled by lncompile {self.release}, and this is {lncompile.__version__}: compile it anew"
            )

    def check_arguments(self, asked: Mapping[str, Any] | None) -> None:
        """Refuse what was compiled for something else than is asked for now.

        Args:
            asked: ``mode`` and ``options`` of the ``torch.compile`` that loads it; None for another backend.

        Raises:
            RuntimeError: if they are not the ones it was compiled with.
        """
        if asked is None:
            raise RuntimeError("this was compiled with backend 'lnfold', and another backend is asked for")
        # The environment has a say in our options as well.
        ours = parse_ours(with_selection_of(asked.get("mode"), asked.get("options")))
        if not are_same(asked, self.arguments) or ours != self.options:
            raise RuntimeError("this was compiled with lnfold under another mode or other options")

    def restored(self, compiled: Callable[..., Any]) -> FoldedGraph:
        """Put it together with Inductor's code."""
        if self.options.nonfoldable == "eager":
            register_aten_layer_norm()
        if self.comparison is not None:
            keep_comparison(self.comparison)
        # The graph as it came is not saved: where weights change at every call they are centered each time.
        materializer = Materializer(self.expressions, self.names, self.options.check, can_be_given_up=False)
        return FoldedGraph(compiled, CompiledGraph(self.report, None, self.arguments, {}, materializer), self.options)


class SavedGraph(precompile.BackendCacheArtifact[FoldedGraph]):
    """What Dynamo saves for a folded graph under ``caching_precompile``: AOTAutograd's artifact and what is ours.

    It is checked while it is read. Dynamo compiles anew where it cannot read something, but an error of what it has
    read stops it (torch 2.13).
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _read_saved_graph, (self.key, *self.content)

    def after_deserialization(self) -> FoldedGraph:
        """Return what Dynamo calls in the process that loads it."""
        inner, saved = self.content
        return saved.restored(inner.after_deserialization())  # type: ignore[no-any-return]


def _read_saved_graph(key: str, inner: Any, saved: Saved) -> SavedGraph:
    """Read what was saved, unless it was made by another release of lncompile, or for another backend or options.

    Raises:
        RuntimeError: if it was.
    """
    saved.check_release()
    backend = precompile.backend_of_load()
    if backend is not None:
        saved.check_arguments(arguments_of(backend))
    return SavedGraph(key, (inner, saved))


def record_for_other_processes(graph: FoldedGraph, names: precompile.Names) -> None:
    """Have Dynamo save a folded graph under ``caching_precompile``, if Inductor's code for it can be saved.

    Args:
        graph: just compiled.
        names: as :func:`~lncompile.lowering.torch_private_precompile.rename_recorded` returned them.
    """
    inner = precompile.recorded(names.inner)
    if inner is not None:
        precompile.record(SavedGraph(names.graph, (inner, graph.saved())))
