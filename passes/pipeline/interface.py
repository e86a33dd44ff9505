"""What a pass is: a function with a name that makes one thing more of what was made before it.

A pass that *decides* reads a graph and what earlier passes made, and returns a decision. A pass that *rewrites* changes
the graph as decided, and returns what it put there. Both get a context, in which every :class:`Made` attribute is made
by exactly one pass: reading it before that pass ran is an error, so the order of the passes is no matter of comments.

Before (an order that a comment has to explain)::

    facts = GraphFacts(graph, ...)          # first: it marks what is written to, which the next line reads
    chains = find_handwritten_norms(graph)

After::

    @decides(Known.chains)
    def chains(known: Known) -> Chains:
        return find_handwritten_norms(known.graph, known.writes)      # an error, were `writes` not there
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

from torch import fx

from lncompile.passes.switches import NEEDED

T = TypeVar("T")


class NotMadeYet(AttributeError):
    """Something was read that no pass has made yet: the passes run in the wrong order."""


class Made(Generic[T]):
    """An attribute of a context that one pass makes, once.

    Example:
        >>> class Known:
        ...     sites: Made[list[str]] = Made()
        >>> known = Known()
        >>> Known.sites.make(known, ["norm"])
        >>> known.sites
        ['norm']
    """

    name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, context: None, owner: type) -> Made[T]: ...
    @overload
    def __get__(self, context: object, owner: type) -> T: ...
    def __get__(self, context: object | None, owner: type) -> Made[T] | T:
        if context is None:
            return self
        # Python asks here only while the context has no attribute of the name.
        raise NotMadeYet(f"'{self.name}' is read before a pass has made it")

    def make(self, context: object, value: T) -> None:
        """Set it.

        Raises:
            AttributeError: if it is set already.
        """
        if self.name in vars(context):
            raise AttributeError(f"'{self.name}' is made twice")
        vars(context)[self.name] = value


class Context(Protocol):
    """What passes share: the graph they work on, and what each has made."""

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph."""
        ...


C = TypeVar("C", bound=Context)


class Kind(enum.StrEnum):
    """What a pass does."""

    #: It returns a decision and leaves the graph as it is.
    DECIDES = "decides"
    #: It changes the graph.
    REWRITES = "rewrites"


@dataclass(frozen=True)
class Pass(Generic[C]):
    """One step of the pipeline.

    Attributes:
        name: of the function; what it is called in reports, in logs, and where it is switched off.
        kind: whether it decides or rewrites.
        makes: the attribute of the context that holds what it returns.
        run: what it does.
        instead: what stands in the place of what it makes where it is switched off; None where it cannot be.
        text: says what it decided, for people who want to see it; None where there is nothing to say.
        after: the names of passes that have to have changed the graph before.
    """

    name: str
    kind: Kind
    makes: Made[Any]
    run: Callable[[C], Any]
    instead: Callable[[C], Any] | None = None
    text: Callable[[C], str] | None = None
    after: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.run) or "").split("\n")[0]


def decides(
    makes: Made[T],
    instead: Callable[[C], T] | None = None,
    text: Callable[[C], str] | None = None,
) -> Callable[[Callable[[C], T]], Pass[C]]:
    """Make a pass that decides of a function; the function's name is the pass's.

    Args:
        makes: the attribute that holds the decision.
        instead: the decision where the pass is switched off.
        text: says what was decided.

    Example:
        >>> @decides(Known.obstacles, instead=lambda known: {})
        ... def obstacles(known: Known) -> dict[fx.Node, Named]:
        ...     return name_obstacles(known.sites, ...)
    """
    return _maker(Kind.DECIDES, makes, instead, text)


def rewrites(
    makes: Made[T], instead: Callable[[C], T] | None = None, after: Sequence[Pass[C]] = ()
) -> Callable[[Callable[[C], T]], Pass[C]]:
    """Make a pass that rewrites of a function, likewise.

    Args:
        makes: the attribute that holds what it put into the graph.
        instead: what stands there where it is switched off.
        after: passes that have to have changed the graph before.
    """
    return _maker(Kind.REWRITES, makes, instead, None, after)


def _maker(
    kind: Kind,
    makes: Made[Any],
    instead: Callable[[C], Any] | None,
    text: Callable[[C], str] | None = None,
    after: Sequence[Pass[C]] = (),
) -> Callable[[Callable[[C], Any]], Pass[C]]:
    def make(function: Callable[[C], Any]) -> Pass[C]:
        name = function.__name__
        # A pass without which graphs would be wrong says why; all others say what stands in their place.
        assert (name in NEEDED) == (instead is None), f"pass '{name}': needed, or what instead?"
        return Pass(name, kind, makes, function, instead, text, tuple(one.name for one in after))

    return make
