"""Statistics for comparing models over a few seeds and many questions.

Axis letters: S seeds, Q questions.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

CONFIDENCE = 0.95  # of every interval
POWER = 0.8  # the probability of finding a difference of the detectable size


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its interval; the bounds are NaN if there are too few values for one."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class ClusteredMean(Estimate):
    """A mean of scores or of differences over questions, which may come in clusters, with its standard error.

    Attributes:
      error: the standard error; NaN if there are too few values for one.
      seed_error: the part of the standard error due to seeds.
      seeds: S.
      degrees: the degrees of freedom of its Student's distribution.
    """

    error: float
    seed_error: float
    seeds: int
    degrees: float

    @property
    def p_value(self) -> float:
        """The probability of a mean at least this far from zero if the true one is zero; NaN without an error."""
        if not self.error:
            return 0.0 if self.value else 1.0
        return float(2 * scipy.stats.t.sf(abs(self.value) / self.error, self.degrees))

    @property
    def within_noise(self) -> bool:
        """Whether the interval contains zero."""
        return not (self.low > 0 or self.high < 0)

    def within_margin(self, margin: float) -> bool:
        """Returns whether two one-sided tests, at 5% each, find the difference smaller than ``margin`` in magnitude.

        Equivalently, the 90% interval lies inside ±``margin`` (Schuirmann, J. Pharmacokinet. Biopharm. 15:657, 1987).
        """
        if math.isnan(self.error):
            return False
        half_width = self.error * float(scipy.stats.t.ppf(CONFIDENCE, self.degrees))
        return abs(self.value) + half_width < margin

    def detectable(self, seeds: int | None = None) -> float:
        """Returns the true difference that a study like this one, with ``seeds`` seeds, finds with :data:`POWER`.

        More seeds reduce the part of the error due to seeds, but not the part due to questions. The result is NaN if
        there is only one seed.
        """
        seeds = seeds or self.seeds
        if math.isnan(self.error) or self.seeds < 2 or seeds < 2:
            return math.nan
        seed_error = self.seed_error * math.sqrt(self.seeds / seeds)
        error = math.sqrt(max(self.error**2 - self.seed_error**2, 0) + seed_error**2)
        degrees = _degrees_of_freedom(error, seed_error, seeds)
        return error * float(sum(scipy.stats.t.ppf([(1 + CONFIDENCE) / 2, POWER], degrees)))


def mean(values: np.ndarray) -> Estimate:
    """Computes the mean over seeds, float [S], with Student's t interval.

    The interval reflects the variance between seeds only; the questions, which are the same for all, count as fixed.
    """
    count, value = len(values), float(np.mean(values))
    if count < 2:
        return Estimate(value, math.nan, math.nan)
    half_width = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    return Estimate(value, value - half_width, value + half_width)


def deviation(values: np.ndarray) -> Estimate:
    """Computes the standard deviation between seeds, float [S], with the chi-squared interval of a normal sample."""
    count = len(values)
    if count < 2:
        return Estimate(math.nan, math.nan, math.nan)
    value = float(np.std(values, ddof=1))
    low, high = scipy.stats.chi2.ppf([(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2], count - 1)
    return Estimate(value, value * math.sqrt((count - 1) / low), value * math.sqrt((count - 1) / high))


def difference(scores: np.ndarray, others: np.ndarray) -> ClusteredMean:
    """Computes the mean of ``scores − others``, float [S, Q], each question alone in its cluster."""
    return clustered_mean([np.asarray(scores, np.float64) - others], [np.arange(scores.shape[1])])


def clustered_mean(values: Sequence[np.ndarray], clusters: Sequence[np.ndarray]) -> ClusteredMean:
    """Computes the mean over benchmarks of their mean scores or differences, with a bootstrap's interval.

    The bootstrap resamples seeds and questions independently, because both are samples (Owen's pigeonhole bootstrap,
    arXiv 0712.1111, whose intervals tend to be too wide). Answers about one image are not independent, so images are
    resampled, each with all its questions. Seeds are drawn once for all benchmarks; with one seed, only images are. Of
    S seeds and C images it would draw S − 1 and C − 1; drawing S would underestimate the variance for few seeds (Rao
    and Wu, JASA 83:401, 1988). The standard error of such a bootstrap has a closed form, which this computes: nothing
    is drawn, because benchmarks may have 100,000 questions. With one seed and one question per image, this is the
    paired t-test.

    The interval is Student's, with that standard error: a percentile interval for the mean of few seeds misses too
    often (one time in four with three seeds). The degrees of freedom are Satterthwaite's: S − 1 if all variance is due
    to seeds, and more if some is due to the many questions.

    Args:
      values: float [S, Q] for each benchmark.
      clusters: for each benchmark a number per question, int [Q], equal for questions about one image.
    """
    seeds, value = len(values[0]), float(np.mean([one.mean() for one in values]))
    effects, variance, fewest = np.zeros(seeds), 0.0, math.inf
    for one, numbers in zip(values, clusters, strict=True):
        _, indices, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
        totals = np.zeros((len(sizes), seeds))
        np.add.at(totals, indices, (one - one.mean()).T)
        sums = totals.T * len(sizes) / one.shape[1]  # the mean's change if a cluster is drawn once more, times C
        by_seed, by_cluster = sums.mean(1), sums.mean(0)
        rest = sums - by_seed[:, None] - by_cluster
        effects += by_seed / len(values)
        others = np.mean(by_cluster**2) + np.mean(rest**2) / max(1, seeds - 1)
        variance += float(others) / max(1, len(sizes) - 1) / len(values) ** 2
        fewest = min(fewest, len(sizes))
    if seeds == 1 and fewest < 2:
        return ClusteredMean(value, math.nan, math.nan, math.nan, math.nan, seeds, math.nan)
    seed_error = math.sqrt(float(np.mean(effects**2)) / (seeds - 1)) if seeds > 1 else 0.0
    error = math.sqrt(variance + seed_error**2)
    degrees = _degrees_of_freedom(error, seed_error, seeds) if seeds > 1 else fewest - 1
    half_width = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, degrees)) * error
    return ClusteredMean(value, value - half_width, value + half_width, error, seed_error, seeds, degrees)


def _degrees_of_freedom(error: float, seed_error: float, seeds: int) -> float:
    """Returns Satterthwaite's degrees of freedom of a standard error, whose part ``seed_error`` is due to seeds."""
    if seeds < 2 or not seed_error:
        return math.inf
    return (seeds - 1) * max(1.0, (error / seed_error) ** 4)
