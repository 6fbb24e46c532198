"""Intervals and verdicts: what they say, and that they say nothing without grounds."""

import math

import numpy as np
import pytest

from mlx_turboquant_plugin.tools.statistics import (
    FEWEST_WINDOWS,
    LEAST_READING,
    Interval,
    Reading,
    Summary,
    interval,
    summarize,
    t_quantile,
    verdict,
)
from mlx_turboquant_plugin.tools.teacher_forcing import Divergence

# Of the positions read codes.
ALL = Reading(1.0, 0)


def window(rng, size=100, growth=0.0, noise=0.0, kl=1e-4, top1=1.0):
    exact = rng.exponential(3.0, size)
    nlls = exact + growth + noise * rng.standard_normal()
    others = np.arange(size) >= top1 * size
    return Divergence(np.full(size, kl), np.zeros(size), others.astype(float), exact, nlls)


def summary(change, kl=(1e-4, 1e-4, 1e-4), top1=(0.99, 0.99, 0.99), windows=8, least=0.0):
    low, estimate, high = change
    return Summary(
        windows,
        windows,
        Interval(kl[1], kl[0], kl[2]),
        0.0,
        Interval(top1[1], top1[0], top1[2]),
        Interval(estimate, low, high),
        20.0,
        20.0,
        least,
    )


@pytest.mark.parametrize(
    "freedom, expected", [(5, 2.5706), (9, 2.2622), (15, 2.1314), (60, 2.0003)]
)
def test_t_quantile(freedom, expected):
    assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=2e-3)


def test_the_same_run_twice_changes_nothing():
    rng = np.random.default_rng(1)
    found = summarize([window(rng, kl=0.0) for _ in range(6)])
    assert (found.change.low, found.change.estimate, found.change.high) == (0, 0, 0)
    assert verdict(found, ALL).word == "same"


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        windows = np.stack([rng.normal(0.01, 0.02, 8) * 100, np.full(8, 100.0)], axis=-1)
        found = interval(windows)
        held += found.low <= 0.01 <= found.high
    # 95% of 300 is 285; fewer than 270 or all 300 would be off by more than chance.
    assert 270 <= held <= 299


def test_noise_without_a_change_is_within_the_interval():
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(40):
        found = summarize([window(rng, noise=0.01) for _ in range(12)]).change
        held += found.low < 0 < found.high
    assert held >= 34


def test_sides_are_paired():
    # The text varies a hundred times more than the change: an unpaired interval would be as wide.
    rng = np.random.default_rng(4)
    windows = []
    for _ in range(8):
        exact = rng.exponential(3.0, 50) + 3 * rng.random()
        windows.append(Divergence(np.zeros(50), np.zeros(50), np.zeros(50), exact, exact + 0.01))
    found = summarize(windows)
    assert found.change.estimate == pytest.approx(math.expm1(0.01))
    assert found.change.high - found.change.low < 1e-9


def test_estimates_are_means_over_positions_not_over_windows():
    rng = np.random.default_rng(5)
    found = summarize([window(rng, 100, kl=1.0), window(rng, 300, kl=2.0)])
    assert found.kl.estimate == pytest.approx(1.75)


def test_too_few_windows_have_neither_interval_nor_verdict():
    rng = np.random.default_rng(6)
    found = summarize([window(rng) for _ in range(FEWEST_WINDOWS - 1)])
    assert found.change.low is None and found.kl.high is None
    refused = verdict(found, ALL)
    assert refused.word == "none"
    assert "1 more window" in refused.reason


def test_no_verdict_when_hardly_anything_reads_codes():
    refused = verdict(summary((0, 0, 0)), Reading.after(192, 274))
    assert refused.word == "none"
    assert refused.reason == "only 29.9% of the positions read codes: --length 640"


def test_all_that_a_verdict_lacks_is_said_at_once():
    refused = verdict(summary((0, 0, 0), windows=2), Reading.after(192, 274))
    assert refused.word == "none"
    assert "--windows 6; " in refused.reason and "--length 640" in refused.reason


@pytest.mark.parametrize("first", [0, 192, 544, 160])
def test_the_length_that_a_verdict_needs_is_the_least(first):
    needed = Reading.after(first, 300).length
    assert Reading.after(first, max(1, needed)).share >= LEAST_READING
    if needed:
        assert Reading.after(first, needed - 1).share < LEAST_READING


def test_windows_of_the_same_text_are_no_sample():
    rng = np.random.default_rng(8)
    same = window(rng, growth=0.02)
    refused = verdict(summarize([same] * 6 + [window(rng)]), ALL)
    assert refused.word == "none" and refused.reason.startswith("only 2 of 7 windows differ")
    different = [window(rng, growth=0.02) for _ in range(6)]
    assert verdict(summarize(different), ALL).word == "costs"


def test_no_number_of_windows_makes_a_gain_a_cost():
    found = verdict(summary((-0.02, -0.01, -0.005)), ALL)
    assert found.word == "none" and "more windows" not in found.reason
    assert found.reason == "perplexity falls by 0.50% to 2.00%: not the same, and no cost"
    assert verdict(summary((-0.02, -0.01, -0.005), kl=(2e-3, 3e-3, 4e-3)), ALL).word == "costs"


def test_what_gives_nan_is_broken():
    nan = float("nan")
    assert verdict(summary((nan,) * 3, kl=(nan,) * 3, top1=(0.0,) * 3), ALL).word == "broken"


def test_same_names_every_condition_of_the_rule():
    reason = verdict(summary((-0.002, 0, 0.002)), ALL).reason
    assert reason == "perplexity within 0.3%, mean KL within 1.5e-03 nats, top-1 from 98% up"


def test_what_grows_in_every_window_is_broken_however_few_there_are():
    rng = np.random.default_rng(7)
    few = [window(rng, growth=growth) for growth in (math.log(1.98), math.log(1.12))]
    found = summarize(few)
    assert found.change.low is None and found.least_change == pytest.approx(0.12)
    broken = verdict(found, ALL)
    assert broken.word == "broken" and "12% or more in every window" in broken.reason
    assert verdict(summarize([*few, window(rng, growth=0.01)]), ALL).word == "none"
    assert verdict(summary((0.0, 0.5, 1.0), least=0.09), ALL).word == "none"


@pytest.mark.parametrize(
    "found, word",
    [
        (summary((-0.002, 0, 0.002)), "same"),
        (summary((-0.002, 0.001, 0.004)), "none"),
        (summary((-0.01, 0, 0.002)), "none"),
        (summary((0.004, 0.006, 0.008)), "costs"),
        (summary((0.2, 0.5, 0.8)), "broken"),
        (summary((0, 0, 0), kl=(2e-3, 3e-3, 4e-3)), "costs"),
        (summary((0, 0, 0), kl=(1e-3, 1.4e-3, 2e-3)), "none"),
        (summary((0, 0, 0), top1=(0.95, 0.96, 0.97)), "costs"),
        (summary((0, 0, 0), top1=(0.97, 0.981, 0.99)), "none"),
    ],
)
def test_verdicts(found, word):
    assert verdict(found, ALL).word == word
