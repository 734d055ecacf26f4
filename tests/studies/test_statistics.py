"""Intervals hold what they should as often as they say, and differences are found where there are some."""

import math

import numpy as np
import pytest
import scipy.stats

from stf_jax.studies import statistics
from stf_jax.studies.statistics import deviation, difference, mean

STUDENT = {3: 4.302653, 5: 2.776445}  # its 97.5 % quantiles for S − 1 degrees of freedom, as printed tables have them


@pytest.fixture
def quick(monkeypatch):
    """Fewer resamples, where many intervals are taken."""
    monkeypatch.setattr(statistics, "_RESAMPLES", 500)


def drawn(rng, seeds, questions, of_seed, of_question, of_both):
    """Paired differences about nought [S, Q] whose effects have these deviations."""
    effects = (of_seed * rng.normal(size=(seeds, 1)), of_question * rng.normal(size=(1, questions)))
    return sum(effects, of_both * rng.normal(size=(seeds, questions)))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    "deviations", [(0.05, 0, 0.02), (0, 0.5, 0.1), (0.05, 0.3, 0.5)], ids=["seeds", "questions", "all"]
)
def test_a_difference_that_is_none_is_rarely_found(quick, seeds, deviations):
    rng, taken = np.random.default_rng(0), 400
    intervals = []
    for _ in range(taken):
        others = rng.random((seeds, 60))
        intervals.append(difference(others + drawn(rng, seeds, 60, *deviations), others))
    assert sum(one.noise for one in intervals) / taken > 0.925  # 0.95, but for chance among 400


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_difference_that_is_one_is_found(quick, seeds):
    rng, found = np.random.default_rng(0), []
    for _ in range(100):
        # Right or wrong, of 400 questions that are hard or easy for both; a tenth more is right.
        hard, luck = rng.random(400), rng.random((2, seeds, 400))
        others, scores = (luck[0] * 0.4 + hard * 0.6 < 0.5), (luck[1] * 0.4 + hard * 0.6 < 0.6)
        found.append(difference(scores, others.astype(float)))
    assert sum(one.low > 0 for one in found) > 95
    assert np.mean([one.value for one in found]) == pytest.approx(0.15, abs=0.02)


def test_questions_alone_tell_of_one_seed():
    rng = np.random.default_rng(0)
    paired = rng.normal(0.1, 0.5, (1, 300))
    one = difference(paired, np.zeros_like(paired))
    reach = 1.959964 * paired.std() / math.sqrt(300)
    assert (one.low, one.high) == pytest.approx((paired.mean() - reach, paired.mean() + reach), rel=0.05)


@pytest.mark.parametrize("seeds", [3, 5])
def test_of_one_figure_a_seed_the_interval_is_students(seeds):
    paired = np.random.default_rng(0).normal(0.1, 0.5, (seeds, 1))
    one = difference(paired, np.zeros_like(paired))
    assert one.value == pytest.approx(paired.mean())
    reach = STUDENT[seeds] * paired.std(ddof=1) / math.sqrt(seeds)
    assert (one.high - one.value, one.value - one.low) == pytest.approx((reach, reach), rel=0.03)


def test_pairs_are_kept():
    """What questions and seeds do to both is no difference."""
    rng = np.random.default_rng(0)
    others = rng.normal(size=(3, 1)) + rng.normal(size=(1, 100))
    one = difference(others + 0.01 + drawn(rng, 3, 100, 0, 0, 0.01), others)
    assert 0 < one.low < one.high < 0.02


def test_no_difference_is_exactly_none():
    scores = (np.random.default_rng(0).random((3, 50)) < 0.5).astype(float)
    for chosen in (scores, scores[:1], scores[:, :1]):
        same = difference(chosen, chosen)
        assert (same.value, same.low, same.high, same.error) == (0, 0, 0, 0)
        assert same.noise
        assert same.within(1e-9)


def test_one_figure_tells_nothing():
    one = difference(np.array([[0.7]]), np.array([[0.5]]))
    assert one.value == pytest.approx(0.2)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert one.noise


def test_the_same_figures_have_the_same_interval():
    scores, others = np.random.default_rng(0).random((2, 3, 50))
    assert difference(scores, others) == difference(scores.copy(), others.copy())


def test_means_and_deviations_are_as_tables_have_them():
    values = np.array([0.5, 0.6, 0.7])  # whose deviation is 0.1
    one = mean(values)
    reach = 4.302653 * 0.1 / math.sqrt(3)
    assert (one.value, one.low, one.high) == pytest.approx((0.6, 0.6 - reach, 0.6 + reach))
    spread = deviation(values)
    ends = (0.1 * math.sqrt(2 / quantile) for quantile in (7.377759, 0.0506356))
    assert (spread.value, spread.low, spread.high) == pytest.approx((0.1, *ends))


def test_of_one_seed_nothing_is_said_of_others():
    one, spread = mean(np.array([0.5])), deviation(np.array([0.5]))
    assert one.value == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert all(math.isnan(end) for end in (spread.value, spread.low, spread.high))


@pytest.mark.parametrize("seeds", [3, 5])
def test_means_and_deviations_lie_within(seeds):
    samples = np.random.default_rng(0).normal(0.5, 0.1, (2000, seeds))
    for call, truth in ((mean, 0.5), (deviation, 0.1)):
        within = [one.low <= truth <= one.high for one in map(call, samples)]
        assert np.mean(within) == pytest.approx(0.95, abs=0.015)


# ---- Equal, and what could be found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_difference_as_large_as_the_margin_is_rarely_called_small(quick, seeds):
    rng, taken = np.random.default_rng(0), 400
    called = []
    for _ in range(taken):
        others = rng.random((seeds, 60))
        called.append(difference(others + 0.1 + drawn(rng, seeds, 60, 0.05, 0.2, 0.1), others).within(0.1))
    assert sum(called) / taken < 0.075  # 0.05, but for chance among 400


def test_a_difference_far_below_the_margin_is_called_small():
    rng = np.random.default_rng(0)
    others = rng.random((5, 400))
    one = difference(others + 0.01 + drawn(rng, 5, 400, 0.01, 0.1, 0.1), others)
    assert one.within(0.1)
    assert not one.within(0.005)


def test_of_one_figure_a_seed_the_margin_is_students():
    """By scipy's own one-sided t-tests."""
    paired = np.random.default_rng(0).normal(0.02, 0.05, (5, 1))
    one = difference(paired, np.zeros_like(paired))
    for margin in (0.03, 0.05, 0.06, 0.065, 0.07, 0.08, 0.1, 0.2):
        above = scipy.stats.ttest_1samp(paired[:, 0], -margin, alternative="greater").pvalue
        below = scipy.stats.ttest_1samp(paired[:, 0], margin, alternative="less").pvalue
        if not 0.04 < max(above, below) < 0.06:  # the bootstrap's error is a few percent off
            assert one.within(margin) == (max(above, below) < 0.05), margin


@pytest.mark.parametrize("seeds", [4, 8])
def test_a_detectable_difference_is_found_four_times_in_five(quick, seeds):
    """A difference as large as a study says it can detect, with the true spread in place of its estimate."""
    rng, errors, found = np.random.default_rng(0), [], []
    noise = (0.05, 0.2, 0.1)
    for _ in range(200):
        errors.append(difference(drawn(rng, seeds, 60, *noise), np.zeros((seeds, 60))).detectable())
    size = float(np.median(errors))
    for _ in range(400):
        found.append(difference(size + drawn(rng, seeds, 60, *noise), np.zeros((seeds, 60))).low > 0)
    assert np.mean(found) == pytest.approx(0.8, abs=0.08)


def test_more_seeds_detect_smaller_differences_down_to_what_questions_leave():
    rng = np.random.default_rng(0)
    one = difference(drawn(rng, 5, 200, 0.05, 0.2, 0.1), np.zeros((5, 200)))
    sizes = [one.detectable(seeds) for seeds in (2, 3, 5, 8, 12, 10_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] == one.detectable()
    floor = math.sqrt(one.error**2 - one.of_seeds**2) * (1.959964 + 0.841621)
    assert sizes[-1] == pytest.approx(floor, rel=0.01)
    assert math.isnan(difference(np.ones((1, 9)), np.zeros((1, 9))).detectable())
