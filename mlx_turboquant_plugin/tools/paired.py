"""Right and wrong answers of two runs to the same questions: what the difference says.

Only questions that one of the two answers and the other does not tell them apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from .statistics import CONFIDENCE, Interval

# Who is right in no larger a share beyond what guessing gives can't do a task.
LEAST_BEYOND_CHANCE = 0.1


@dataclass(frozen=True)
class Paired:
    """A run's right answers beside the exact run's.

    Attributes:
        right, exact_right: of ``count``.
        difference: of the shares, this run's less the exact run's, with Tango's interval.
        p: of McNemar's exact test: how likely so uneven a split is if neither is better.
        telling: whether the exact run is right often enough for its cache to matter.
    """

    right: int
    exact_right: int
    count: int
    difference: Interval
    p: float
    telling: bool


def paired(right: Sequence[bool], exact: Sequence[bool], chance: float = 0.0) -> Paired:
    """Compare the answers to the same questions, in the same order.

    Args:
        chance: the share, 0 to 1, that a guess has right.
    """
    won = sum(a and not b for a, b in zip(right, exact))
    lost = sum(b and not a for a, b in zip(right, exact))
    count = len(exact)
    telling = sum(exact) > (chance + LEAST_BEYOND_CHANCE) * count
    change = difference(won, lost, count)
    return Paired(sum(right), sum(exact), count, change, mcnemar(won, lost), telling)


def mcnemar(won: int, lost: int) -> float:
    """The two-sided p value of McNemar's exact test."""
    total = won + lost
    tail = sum(math.comb(total, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**total)


def difference(won: int, lost: int, count: int) -> Interval:
    """The difference of two paired shares and Tango's score interval.

    Unlike others it is no point where the runs agree on every question (Tango, Statistics
    in Medicine 17, 1998).
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    estimate = (won - lost) / count

    def excess(delta: float) -> float:
        """How far the estimate lies beyond z standard errors from ``delta``, in counts."""
        b = -won - lost + (2 * count - won + lost) * delta
        c = -lost * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b * b - 8 * count * c)) - b) / (4 * count)
        variance = count * (2 * q + delta * (1 - delta))
        return abs(won - lost - count * delta) - z * math.sqrt(max(0.0, variance))

    return Interval(estimate, _root(excess, estimate, -1.0), _root(excess, estimate, 1.0))


def _root(excess, inside: float, outside: float) -> float:
    """Where ``excess`` turns positive between the two, by bisection."""
    if excess(outside) <= 0:
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        if excess(middle) <= 0:
            inside = middle
        else:
            outside = middle
    return inside
