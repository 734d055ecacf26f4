"""Statistics: intervals have their nominal coverage, and true differences are found."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from stf_jax.studies.statistics import clustered_mean, deviation, difference, mean

STUDENT = {3: 4.302653, 5: 2.776445}  # its 97.5% quantiles for S − 1 degrees of freedom, from printed tables


def draw_differences(rng, seeds, questions, seed_std, question_std, residual_std):
    """Draws paired differences with mean zero [S, Q] from effects with these standard deviations."""
    effects = (seed_std * rng.normal(size=(seeds, 1)), question_std * rng.normal(size=(1, questions)))
    return sum(effects, residual_std * rng.normal(size=(seeds, questions)))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    "deviations", [(0.05, 0, 0.02), (0, 0.5, 0.1), (0.05, 0.3, 0.5)], ids=["seeds", "questions", "all"]
)
def test_a_zero_difference_is_rarely_significant(seeds, deviations):
    rng, count = np.random.default_rng(0), 400
    intervals = []
    for _ in range(count):
        others = rng.random((seeds, 60))
        intervals.append(difference(others + draw_differences(rng, seeds, 60, *deviations), others))
    assert sum(result.within_noise for result in intervals) / count > 0.925  # 0.95, minus chance among 400


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_true_difference_is_found(seeds):
    rng, results = np.random.default_rng(0), []
    for _ in range(100):
        # Correct or wrong answers to 400 questions that are hard or easy for both; one side has a lower threshold.
        hard, luck = rng.random(400), rng.random((2, seeds, 400))
        others, scores = (luck[0] * 0.4 + hard * 0.6 < 0.5), (luck[1] * 0.4 + hard * 0.6 < 0.6)
        results.append(difference(scores, others.astype(float)))
    assert sum(result.low > 0 for result in results) > 95
    assert np.mean([result.value for result in results]) == pytest.approx(0.15, abs=0.02)


def test_with_one_seed_the_interval_reflects_questions_only():
    rng = np.random.default_rng(0)
    paired = rng.normal(0.1, 0.5, (1, 300))
    result = difference(paired, np.zeros_like(paired))
    half_width = 1.959964 * paired.std() / math.sqrt(300)
    bounds = paired.mean() - half_width, paired.mean() + half_width
    assert (result.low, result.high) == pytest.approx(bounds, rel=0.05)


@pytest.mark.parametrize("seeds", [3, 5])
def test_with_one_value_per_seed_the_interval_is_students(seeds):
    paired = np.random.default_rng(0).normal(0.1, 0.5, (seeds, 1))
    result = difference(paired, np.zeros_like(paired))
    assert result.value == pytest.approx(paired.mean())
    half_width = STUDENT[seeds] * paired.std(ddof=1) / math.sqrt(seeds)
    assert (result.high - result.value, result.value - result.low) == pytest.approx((half_width, half_width))


def test_differences_are_paired():
    """Effects of questions and seeds on both sides cancel out."""
    rng = np.random.default_rng(0)
    others = rng.normal(size=(3, 1)) + rng.normal(size=(1, 100))
    result = difference(others + 0.01 + draw_differences(rng, 3, 100, 0, 0, 0.01), others)
    assert 0 < result.low < result.high < 0.02


def test_equal_scores_have_a_difference_of_exactly_zero():
    scores = (np.random.default_rng(0).random((3, 50)) < 0.5).astype(float)
    for part in (scores, scores[:1], scores[:, :1]):
        same = difference(part, part)
        assert (same.value, same.low, same.high, same.error) == (0, 0, 0, 0)
        assert same.within_noise
        assert same.within_margin(1e-9)


def test_a_single_value_has_no_interval():
    result = difference(np.array([[0.7]]), np.array([[0.5]]))
    assert result.value == pytest.approx(0.2)
    assert math.isnan(result.low)
    assert math.isnan(result.high)
    assert result.within_noise


def test_intervals_are_reproducible():
    scores, others = np.random.default_rng(0).random((2, 3, 50))
    assert difference(scores, others) == difference(scores.copy(), others.copy())


def test_means_and_deviations_match_printed_tables():
    values = np.array([0.5, 0.6, 0.7])  # with standard deviation 0.1
    result = mean(values)
    half_width = 4.302653 * 0.1 / math.sqrt(3)
    assert (result.value, result.low, result.high) == pytest.approx((0.6, 0.6 - half_width, 0.6 + half_width))
    spread = deviation(values)
    bounds = (0.1 * math.sqrt(2 / quantile) for quantile in (7.377759, 0.0506356))
    assert (spread.value, spread.low, spread.high) == pytest.approx((0.1, *bounds))


def test_one_seed_has_no_intervals():
    result, spread = mean(np.array([0.5])), deviation(np.array([0.5]))
    assert result.value == 0.5
    assert math.isnan(result.low)
    assert math.isnan(result.high)
    assert all(math.isnan(value) for value in (spread.value, spread.low, spread.high))


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_of_means_and_deviations_have_their_coverage(seeds):
    samples = np.random.default_rng(0).normal(0.5, 0.1, (2000, seeds))
    for estimate, truth in ((mean, 0.5), (deviation, 0.1)):
        covered = [one.low <= truth <= one.high for one in map(estimate, samples)]
        assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


# ---- Equality and power ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_difference_as_large_as_the_margin_is_rarely_within_it(seeds):
    rng, count = np.random.default_rng(0), 400
    within = []
    for _ in range(count):
        others = rng.random((seeds, 60))
        scores = others + 0.1 + draw_differences(rng, seeds, 60, 0.05, 0.2, 0.1)
        within.append(difference(scores, others).within_margin(0.1))
    assert sum(within) / count < 0.075  # 0.05, plus chance among 400


def test_a_difference_far_below_the_margin_is_within_it():
    rng = np.random.default_rng(0)
    others = rng.random((5, 400))
    result = difference(others + 0.01 + draw_differences(rng, 5, 400, 0.01, 0.1, 0.1), others)
    assert result.within_margin(0.1)
    assert not result.within_margin(0.005)


def test_with_one_value_per_seed_the_margin_test_is_students():
    """Against scipy's one-sided t-tests."""
    paired = np.random.default_rng(0).normal(0.02, 0.05, (5, 1))
    result = difference(paired, np.zeros_like(paired))
    for margin in (0.03, 0.05, 0.06, 0.065, 0.07, 0.08, 0.1, 0.2):
        above = scipy.stats.ttest_1samp(paired[:, 0], -margin, alternative="greater").pvalue
        below = scipy.stats.ttest_1samp(paired[:, 0], margin, alternative="less").pvalue
        assert result.within_margin(margin) == (max(above, below) < 0.05), margin


@pytest.mark.parametrize("seeds", [4, 8])
def test_a_detectable_difference_is_found_four_times_in_five(seeds):
    """Draws a difference of the size that a study reports as detectable."""
    rng, sizes, significant = np.random.default_rng(0), [], []
    noise = (0.05, 0.2, 0.1)
    for _ in range(200):
        sizes.append(difference(draw_differences(rng, seeds, 60, *noise), np.zeros((seeds, 60))).detectable())
    size = float(np.median(sizes))
    for _ in range(400):
        significant.append(difference(size + draw_differences(rng, seeds, 60, *noise), np.zeros((seeds, 60))).low > 0)
    assert np.mean(significant) == pytest.approx(0.8, abs=0.08)


def test_more_seeds_detect_smaller_differences_down_to_the_questions_limit():
    rng = np.random.default_rng(0)
    result = difference(draw_differences(rng, 5, 200, 0.05, 0.2, 0.1), np.zeros((5, 200)))
    sizes = [result.detectable(seeds) for seeds in (2, 3, 5, 8, 12, 10_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] == result.detectable()
    floor = math.sqrt(result.error**2 - result.seed_error**2) * (1.959964 + 0.841621)
    assert sizes[-1] == pytest.approx(floor, rel=0.01)
    assert math.isnan(difference(np.ones((1, 9)), np.zeros((1, 9))).detectable())


# ---- Questions that share images -------------------------------------------------------------------------------------


def test_with_one_seed_and_question_per_image_it_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    scores, others = 100.0 * (rng.random((2, 1, 300)) < 0.6)
    result = clustered_mean([scores - others], [np.arange(300)])
    expected = scipy.stats.ttest_rel(scores[0], others[0])
    bounds = expected.confidence_interval()
    assert (result.low, result.high) == pytest.approx((bounds.low, bounds.high))
    assert result.p_value == pytest.approx(expected.pvalue)
    assert result.value / result.error == pytest.approx(expected.statistic)


def test_questions_about_one_image_count_as_one_if_they_are_answered_alike():
    """Four copies of each question say no more than one."""
    rng = np.random.default_rng(1)
    scores = rng.random((1, 40))
    once = clustered_mean([scores], [np.arange(40)])
    copies = clustered_mean([np.repeat(scores, 4, 1)], [np.repeat(np.arange(40), 4)])
    assert dataclasses.astuple(copies) == pytest.approx(dataclasses.astuple(once))
    naive = clustered_mean([np.repeat(scores, 4, 1)], [np.arange(160)])
    assert once.error / naive.error == pytest.approx(2, rel=0.02)


def test_clusters_by_hand():
    """Images with three, one and two questions: deviations from the mean 1/2 add up to 1/2, 1/2 and -1."""
    result = clustered_mean([np.array([[1.0, 1, 0, 1, 0, 0]])], [np.array([7, 7, 7, 2, 5, 5])])
    assert result.value == 0.5
    # The sums, as changes of the mean of three images: 3/6 of them; their variance over C - 1 draws.
    assert result.error == pytest.approx(math.sqrt((0.25**2 + 0.25**2 + 0.5**2) / 3 / 2))
    assert result.degrees == 2


@pytest.mark.parametrize("seeds", [1, 4])
def test_the_closed_form_equals_a_bootstrap(seeds):
    rng = np.random.default_rng(2)
    sizes, draws = [1, 3, 2, 5, 4, 1, 2, 2, 3, 1, 6, 2] * 4, 20_000
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    values = rng.random((seeds, len(clusters))) + rng.normal(size=len(sizes))[clusters] + rng.normal(size=(seeds, 1))
    other = rng.random((seeds, 50)) + rng.normal(size=(seeds, 1))
    means = []
    for _ in range(draws):
        chosen = rng.integers(0, seeds, max(1, seeds - 1))
        parts = []
        for array, numbers, count in ((values, clusters, len(sizes)), (other, np.arange(50), 50)):
            weights = np.bincount(rng.integers(0, count, count - 1), minlength=count)[numbers]
            parts.append((array[chosen].mean(0) * weights).sum() / weights.sum())
        means.append(np.mean(parts))
    result = clustered_mean([values, other], [clusters, np.arange(50)])
    assert result.value == pytest.approx((values.mean() + other.mean()) / 2)
    # The bootstrap is off by 0.5%, and the mean of images of unequal sizes is not quite linear in the draws.
    assert result.error == pytest.approx(np.std(means), rel=0.04)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_of_clustered_questions_have_their_coverage(seeds):
    rng, hits = np.random.default_rng(3), 0
    for _ in range(400):
        clusters = rng.integers(0, 30, 90)
        effects = rng.normal(size=30)[clusters] + 0.3 * rng.normal(size=(seeds, 1)) * (seeds > 1)
        result = clustered_mean([effects + rng.normal(size=(seeds, 90))], [clusters])
        hits += result.within_noise
    assert hits / 400 > 0.92


def test_one_question_has_no_interval():
    result = clustered_mean([np.ones((1, 1))], [np.zeros(1)])
    assert result.value == 1
    assert all(map(math.isnan, (result.low, result.high, result.error, result.p_value)))
    equal = clustered_mean([np.zeros((1, 9))], [np.arange(9)])
    assert (equal.low, equal.high, equal.p_value, equal.within_margin(0.1)) == (0, 0, 1, True)
