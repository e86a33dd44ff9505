"""What is said and done where weights change: a log line for writes that torch does not count, and an end to folding
where centering anew costs more than folding saves.
"""

from __future__ import annotations

import logging

from torch import Tensor

from lncompile.lowering import torch_private
from lncompile.runtime.weight_samples import local

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
    # For how many calls a weight has to stay until folding is tried again; then for twice as many, and so on.
    _PATIENCE = 64

    def __init__(self) -> None:
        self._points = 0
        self._sets = 1
        self._patience = self._PATIENCE
        self._calm = 0
        self._seen: object = None

    @property
    def are_forgotten(self) -> bool:
        """Whether calls that find their values have made up for all computations: no more have to be counted."""
        return not self._points

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

    def excuse(self, sets: int) -> None:
        """Take back what will be counted because values were forgotten though their parameters did not change."""
        self._points = max(0, self._points - self._POINTS * sets)

    def have_ended(self, weight: Tensor) -> bool:
        """Count a call for which nothing was computed any more, and say whether to try again.

        Args:
            weight: the first one that the call has. It is looked at in one call of eight: that it is another one then,
                or elsewhere, or was written to, starts the count anew.
        """
        self._calm += 1
        if self._calm % 8:
            return False
        with torch_private.as_plain_tensors():
            version = 0 if weight.is_inference() else torch_private.version_of(weight)
            seen = id(weight), local(weight).data_ptr(), version
        if seen != self._seen:
            self._calm, self._seen = 0, seen
        if self._calm < self._patience:
            return False
        self._calm, self._seen, self._patience = 0, None, 2 * self._patience
        # A few more and it is given up again.
        self._points = self._POINTS * (self._ENOUGH + 2 * self._sets - 2)
        return True


_told = False


def say_written_unseen(name: str, count: int, *, late: bool, by_user: bool = True) -> None:
    """Log that weights were written to in a way that torch does not count: a warning the first time, later debugging.

    Args:
        name: of one of the weights.
        count: how many weights show it.
        late: whether an answer may have been given with the old values.
        by_user: whether one of them is a parameter: then it is worth a warning.
    """
    global _told
    which = f"weight '{name}' was" if count == 1 else f"{count} weights, among them '{name}', were"
    log.log(
        logging.DEBUG if _told or not by_user else logging.WARNING,
        "%s written to in a way that torch does not count (.data, NumPy, a collective, another process, a CUDA graph). "
        "lnfold noticed it by a few elements and centers the weights anew.%s Call lncompile.refresh() after such a "
        "write, or write to the parameter itself under torch.no_grad(): a write that changes few elements may go "
        "unnoticed otherwise.",
        which,
        " The last answer may have been computed with the old values." if late else "",
    )
    _told = _told or by_user


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
        "costs more than folding saves. From here on the graph runs as stock torch.compile compiles it, until its "
        "weights have stayed for a while; lncompile.refresh() lets it fold at once.",
        count,
        name,
    )
