"""What is said and done where weights change: a log line for writes that torch does not count, and an end to folding
where centering anew costs more than folding saves.
"""

from __future__ import annotations

import logging

log = logging.getLogger("lncompile")


class Renewals:
    """How often the values for one graph had to be computed, against how often they could be used again.

    To center weights takes longer than a short call does: 2.7 times as long in the case that was measured, a decoder on
    a CPU whose weights move at each call. So a fold whose weights change or move at nearly every call is slower than
    none. Every computation counts 8 points, and every call that finds its values takes one off. The first computation
    for each set of parameters has to be made in any case. So there are too many points where they amount to more than 8
    computations and two for each set that there was at once.
    """

    _POINTS, _ENOUGH = 8, 8

    def __init__(self) -> None:
        self._points = 0
        self._sets = 1

    def spared(self) -> None:
        """Count a call that found its values."""
        if self._points:
            self._points -= 1

    def are_too_many(self, sets: int) -> bool:
        """Count a call that does not find its values, and say whether it was one too many.

        Args:
            sets: for how many sets of parameters values are kept.
        """
        self._sets = max(self._sets, sets)
        self._points += self._POINTS
        return self._points > self._POINTS * (self._ENOUGH + 2 * self._sets)


_told = False


def say_written_unseen(name: str, count: int, *, late: bool) -> None:
    """Log that weights were written to in a way that torch does not count: a warning the first time, later debugging.

    Args:
        name: of one of the weights.
        count: how many weights show it.
        late: whether an answer may have been given with the old values.
    """
    global _told
    which = f"weight '{name}' was" if count == 1 else f"{count} weights, among them '{name}', were"
    log.log(
        logging.DEBUG if _told else logging.WARNING,
        "%s written to in a way that torch does not count (.data, NumPy, a collective, another process, a CUDA graph). "
        "lnfold noticed it by a few elements and centers the weights anew.%s Call lncompile.refresh() after such a "
        "write, or write to the parameter itself under torch.no_grad(): a write that changes few elements may go "
        "unnoticed otherwise.",
        which,
        " The last answer may have been computed with the old values." if late else "",
    )
    _told = True


def tell_again() -> None:
    """Let the next write that torch does not count be a warning again."""
    global _told
    _told = False


def say_given_up(name: str, count: int) -> None:
    """Log that a graph is not folded any more because its weights do not stay what they are.

    Args:
        name: of one of its weights.
        count: how many weights it centers.
    """
    log.warning(
        "the weights of a graph (%d, among them '%s') changed or moved at nearly every call, and centering them anew "
        "costs more than folding saves. From here on the graph runs as stock torch.compile compiles it; "
        "lncompile.refresh() lets it fold again.",
        count,
        name,
    )
