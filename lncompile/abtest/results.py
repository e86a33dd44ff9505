"""What a test says: an outcome, the speed-up with its interval, and the same in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lncompile.abtest.statistics import Interval


class Outcome(Enum):
    """What is known of the candidate's latency."""

    FASTER = "faster"
    SLOWER = "slower"
    EQUIVALENT = "equivalent"  # no difference that would matter
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Conclusion:
    """The answer of a test at one moment. ``print`` says it in words.

    Attributes:
        outcome: what is known of the latency.
        baseline: name of the arm compared with.
        candidate: name of the arm in question.
        speedup: the baseline's latency over the candidate's, geometric mean over requests with outliers drawn in: above
            1 the candidate is faster. The interval holds at every look.
        requests: how many requests are in it.
        elsewhere: how many are not, though assigned at random and after warm-up: those of shapes beyond the number of
            buckets, and of batches that are not full yet.
        buckets: how many kinds of inputs are in it.
        alpha: how often the interval may ever be wrong, as a share of tests.
        p_value: anytime-valid p-value against equal latencies.
        minimum_effect: the relative difference below which it does not matter, or cannot be told from what the place of
            equal programs in memory makes, whichever is larger.
        outputs_agree: whether all answers compared in shadow mode agree; None if none were.
        comparisons: how many were compared.
        out_of_service: arms that answer no more, with the reason.
        failed: names of those of them that raised.
        remarks: what else a reader should know, a sentence each.
    """

    outcome: Outcome
    baseline: str
    candidate: str
    speedup: Interval
    requests: int
    elsewhere: int
    buckets: int
    alpha: float
    p_value: float
    minimum_effect: float
    outputs_agree: bool | None
    comparisons: int
    out_of_service: Mapping[str, str]
    failed: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def regression(self) -> bool:
        """Whether to stay with the baseline.

        So it is where the candidate failed, returns different outputs, or is slower by more than ``minimum_effect``.
        """
        return self.outcome is Outcome.SLOWER or self.outputs_agree is False or self.candidate in self.failed

    @property
    def improvement(self) -> bool:
        """Whether to switch.

        So it is where the candidate is faster by more than ``minimum_effect``, never failed, and no output compared
        differs.
        """
        return self.outcome is Outcome.FASTER and not self.regression

    @property
    def winner(self) -> str | None:
        """The arm to send all requests to, as far as it is known: the better one, or the one that did not fail."""
        if self.regression:
            return None if self.baseline in self.out_of_service else self.baseline
        return self.candidate if self.improvement or self.baseline in self.failed else None

    def __str__(self) -> str:
        return " ".join([self._latency(), *self._outputs(), *self._service(), *self.remarks])

    def _latency(self) -> str:
        confidence = f"{100 * (1 - self.alpha):g}% confidence at every look"
        measured = (
            f"{self.candidate} is {self.speedup} times as fast as {self.baseline} ({self.requests:,} requests, "
            f"{self.buckets} input shape{'' if self.buckets == 1 else 's'}, {confidence})"
        )
        match self.outcome:
            case Outcome.FASTER:
                return f"Faster: {measured}."
            case Outcome.SLOWER:
                return f"Slower: {measured}."
            case Outcome.EQUIVALENT:
                return f"No difference above {100 * self.minimum_effect:.3g}%: {measured}."
            case Outcome.UNDECIDED:
                if self.speedup.low is None:
                    return f"Undecided: {self.requests:,} requests of {self.baseline} and {self.candidate} are too few."
                return f"Undecided: {measured}."

    def _outputs(self) -> list[str]:
        if self.outputs_agree is None:
            return []
        return [f"Outputs {'agree' if self.outputs_agree else 'DIFFER'} ({self.comparisons:,} compared)."]

    def _service(self) -> list[str]:
        return [f"{name} is out of service: {reason}." for name, reason in self.out_of_service.items()]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts, lists, strings and numbers, ready for JSON."""
        return {
            **dataclasses.asdict(self),
            "outcome": self.outcome.value,
            "out_of_service": dict(self.out_of_service),
            "failed": list(self.failed),
            "remarks": list(self.remarks),
            "regression": self.regression,
            "winner": self.winner,
            "improvement": self.improvement,
            "words": str(self),
        }


def outcome_of(speedup: Interval, minimum_effect: float) -> Outcome:
    """What an interval of the speed-up says.

    A winner needs both: an interval that does not contain 1, and an estimate that differs from 1 by more than
    ``minimum_effect``. The second is needed for equal programs: with enough requests any difference shows, however
    small, and in one process there always is one, for instance by where code lies in memory.
    """
    if speedup.estimate is None or speedup.low is None or speedup.high is None:
        return Outcome.UNDECIDED
    if 1 / (1 + minimum_effect) <= speedup.low and speedup.high <= 1 + minimum_effect:
        return Outcome.EQUIVALENT
    if speedup.low > 1 and speedup.estimate > 1 + minimum_effect:
        return Outcome.FASTER
    if speedup.high < 1 and speedup.estimate * (1 + minimum_effect) < 1:
        return Outcome.SLOWER
    return Outcome.UNDECIDED
