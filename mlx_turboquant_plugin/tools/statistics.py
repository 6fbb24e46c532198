"""What a few windows of text say about all text: bootstrap intervals, and a verdict.

Windows, not tokens, are what is drawn again: errors of neighbouring tokens are alike.
Both runs read the same windows, so each draw takes both sides of a window (paired).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .teacher_forcing import Divergence, join

CONFIDENCE = 0.95
DRAWS = 20_000
# With n windows the chance that all of them lie on one side of the truth is 2^(1 - n):
# below 5% from here on.
FEWEST_WINDOWS = 6
# The share of positions that must read codes, or the text is too short to matter.
LEAST_READING = 0.7

# Within these a run is called the same as the exact one, and beyond BROKEN useless.
SAME_KL = 1.5e-3
SAME_TOP1 = 0.98
SAME_CHANGE = 0.003
BROKEN_CHANGE = 0.10

# What :func:`verdict` goes by, in words.
RULE = (
    f"same: perplexity within {SAME_CHANGE:.1%}, mean KL within {SAME_KL:g} nats and top-1 "
    f"agreement from {SAME_TOP1:.0%} up, each with its whole 95% interval. costs: one of them "
    f"surely worse. broken: perplexity grows by more than {BROKEN_CHANGE:.0%}, with its whole "
    "interval or in every window, or logits are NaN. no verdict: the sample is too small to tell, "
    f"as it is with fewer than {FEWEST_WINDOWS} different windows, or where fewer than "
    f"{LEAST_READING:.0%} of the positions read codes; or perplexity is surely better by more than "
    f"{SAME_CHANGE:.1%}, which is no cost."
)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% confidence interval; None with too few windows for one."""

    estimate: float
    low: float | None
    high: float | None

    @property
    def ends(self) -> tuple[float, float]:
        """The interval; a ValueError where there is none."""
        if self.low is None or self.high is None:
            raise ValueError("too few windows for an interval")
        return self.low, self.high


@dataclass(frozen=True)
class Summary:
    """One run against the exact run, over all windows.

    Attributes:
        windows: how many.
        distinct: how many of these are not the text of another.
        kl: mean KL(exact || run) of a position, nats.
        kl_p99: its 99th percentile over positions.
        top1: share of positions at which both runs rank the same token first.
        change: of the perplexity, relative: 0.01 is one per cent.
        exact_perplexity, perplexity: per token.
        least_change: the change of the window whose perplexity grew least.
    """

    windows: int
    distinct: int
    kl: Interval
    kl_p99: float
    top1: Interval
    change: Interval
    exact_perplexity: float
    perplexity: float
    least_change: float


@dataclass(frozen=True)
class Verdict:
    """``word`` is same, costs, broken or none; ``reason`` says why, or what is missing."""

    word: str
    reason: str


def summarize(windows: Sequence[Divergence]) -> Summary:
    """Estimates over the positions of all windows, with intervals over draws of windows."""
    whole = join(windows)

    def column(read: Callable[[Divergence], np.ndarray]) -> np.ndarray:
        return np.array([(read(w).sum(), read(w).size) for w in windows], dtype=np.float64)

    kls, agrees = column(lambda w: w.kls), column(lambda w: w.agrees)
    growth = column(lambda w: w.nlls - w.exact_nlls)
    return Summary(
        len(windows),
        # The exact run says the same of the same text.
        len({w.exact_nlls.tobytes() for w in windows}),
        interval(kls),
        float(np.percentile(whole.kls, 99)),
        interval(agrees),
        interval(growth, math.expm1),
        whole.exact_perplexity,
        whole.perplexity,
        min(w.perplexity / w.exact_perplexity for w in windows) - 1,
    )


def interval(
    windows: np.ndarray, transform: Callable[[float], float] = lambda mean: mean
) -> Interval:
    """The mean over positions and its expanded percentile bootstrap interval.

    The plain percentile interval of n windows is too narrow by about sqrt((n - 1) / n)
    and the step from the normal to the t distribution; the expanded one takes further
    percentiles instead (Hesterberg, The American Statistician 69, 2015, section 3.2).

    Args:
        windows: sum and count of each window, (W, 2).
        transform: an increasing function to apply to means.
    """
    count = len(windows)
    total, positions = windows.sum(axis=0)
    estimate = transform(total / positions)
    if count < FEWEST_WINDOWS:
        return Interval(estimate, None, None)
    drawn = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    totals = windows[drawn].sum(axis=1)
    width = math.sqrt(count / (count - 1)) * t_quantile((1 + CONFIDENCE) / 2, count - 1)
    tail = 100 * NormalDist().cdf(-width)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [tail, 100 - tail])
    return Interval(estimate, transform(float(low)), transform(float(high)))


def t_quantile(probability: float, freedom: int) -> float:
    """Student's t, by its expansion around the normal (Abramowitz and Stegun 26.7.5).

    Within 0.2% from five degrees of freedom on at 97.5%.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


@dataclass(frozen=True)
class Reading:
    """The positions that read codes.

    Attributes:
        share: of all, 0 to 1.
        length: the least tokens of a window of which LEAST_READING read codes.
    """

    share: float
    length: int

    @classmethod
    def after(cls, first: int, length: int) -> "Reading":
        """Of windows of ``length`` tokens whose positions from ``first`` on read codes."""
        # Less than rounding of the share could add.
        least = math.ceil(first / (1 - LEAST_READING) - 1e-6)
        return cls(max(0, length - first) / length, least)


def verdict(summary: Summary, reading: Reading) -> Verdict:
    """What the sample supports, and no more."""
    if not math.isfinite(summary.kl.estimate):
        return Verdict("broken", "logits are NaN or infinite")
    if summary.least_change > BROKEN_CHANGE:
        # No choice of text makes so much of nothing: this needs no interval.
        return Verdict(
            "broken", f"perplexity grows by {summary.least_change:.0%} or more in every window"
        )
    missing = [*_too_few(summary), *_too_short(reading)]
    if missing:
        return Verdict("none", "; ".join(missing))
    change, kl, top1 = summary.change.ends, summary.kl.ends, summary.top1.ends
    if change[0] > BROKEN_CHANGE:
        return Verdict("broken", f"perplexity grows by {change[0]:.0%} at least")
    if change[0] > SAME_CHANGE:
        return Verdict("costs", f"perplexity grows by {change[0]:.2%} to {change[1]:.2%}")
    if kl[0] > SAME_KL:
        return Verdict("costs", f"mean KL is {kl[0]:.1e} nats at least")
    if top1[1] < SAME_TOP1:
        return Verdict("costs", f"another token is likeliest at {1 - top1[1]:.1%} at least")
    if change[1] < -SAME_CHANGE:
        # More windows would only say so more surely.
        return Verdict(
            "none",
            f"perplexity falls by {-change[1]:.2%} to {-change[0]:.2%}: not the same, and no cost",
        )
    wide = [
        f"{name} {ends[0]:{form}} to {ends[1]:{form}}"
        for name, ends, form, inside in (
            ("perplexity", change, "+z.2%", change[0] >= -SAME_CHANGE and change[1] <= SAME_CHANGE),
            ("mean KL", kl, ".1e", kl[1] <= SAME_KL),
            ("top-1", top1, ".1%", top1[0] >= SAME_TOP1),
        )
        if not inside
    ]
    if wide:
        return Verdict("none", f"more windows are needed to tell: {', '.join(wide)}")
    return Verdict(
        "same",
        f"perplexity within {SAME_CHANGE:.1%}, mean KL within {SAME_KL:.1e} nats, top-1 from "
        f"{SAME_TOP1:.0%} up",
    )


def _too_few(summary: Summary) -> Iterator[str]:
    missing = FEWEST_WINDOWS - summary.windows
    if missing > 0:
        yield f"{missing} more windows are needed: --windows {FEWEST_WINDOWS}"
    elif summary.distinct < FEWEST_WINDOWS:
        yield (
            f"only {summary.distinct} of {summary.windows} windows differ: choose a text that does "
            "not repeat"
        )


def _too_short(reading: Reading) -> Iterator[str]:
    if reading.share < LEAST_READING:
        yield f"only {reading.share:.1%} of the positions read codes: --length {reading.length}"
