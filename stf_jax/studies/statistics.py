"""What a few seeds and some thousand questions can tell, and what they cannot.

Axis letters: S seeds, Q questions.
"""

import dataclasses
import math

import numpy as np
import scipy.stats

LEVEL = 0.95  # of every interval
POWER = 0.8  # with which a difference of the detectable size is found
_RESAMPLES = 10_000
_AT_ONCE = 500  # resamples held in memory


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its interval; the ends are nan where nothing can be said."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference(Estimate):
    """A difference of means, with its standard error.

    Attributes:
      error: the standard error; nan where nothing can be said.
      of_seeds: the part of it that seeds make.
      seeds: S.
    """

    error: float
    of_seeds: float
    seeds: int

    @property
    def noise(self) -> bool:
        """Whether the difference may be zero: its interval holds 0."""
        return not (self.low > 0 or self.high < 0)

    def within(self, margin: float) -> bool:
        """Whether two one-sided tests, at 5 % each, find the difference smaller than ``margin`` in either direction.

        That is when the 90 % interval lies inside ±``margin`` (Schuirmann, J. Pharmacokinet. Biopharm. 15:657, 1987).
        """
        if math.isnan(self.error):
            return False
        reach = self.error * float(scipy.stats.t.ppf(LEVEL, _freedom(self.error, self.of_seeds, self.seeds)))
        return abs(self.value) + reach < margin

    def detectable(self, seeds: int | None = None) -> float:
        """The true difference that a study like this one finds with probability :data:`POWER`, of so many seeds.

        More seeds reduce the part of the error that seeds make, and leave what the questions make. It is nan where
        nothing is known of how seeds differ.
        """
        seeds = seeds or self.seeds
        if math.isnan(self.error) or self.seeds < 2 or seeds < 2:
            return math.nan
        of_seeds = self.of_seeds * math.sqrt(self.seeds / seeds)
        error = math.sqrt(max(self.error**2 - self.of_seeds**2, 0) + of_seeds**2)
        freedom = _freedom(error, of_seeds, seeds)
        return error * float(sum(scipy.stats.t.ppf([(1 + LEVEL) / 2, POWER], freedom)))


def mean(values: np.ndarray) -> Estimate:
    """The mean over seeds, float [S], with Student's interval: where another seed's mean is expected.

    It is of the variance between seeds; the questions are the same for all, and taken as they are.
    """
    count, value = len(values), float(np.mean(values))
    if count < 2:
        return Estimate(value, math.nan, math.nan)
    reach = scipy.stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count)
    return Estimate(value, value - reach, value + reach)


def deviation(values: np.ndarray) -> Estimate:
    """The standard deviation between seeds, float [S], with the interval of a normal sample's (chi squared)."""
    count = len(values)
    if count < 2:
        return Estimate(math.nan, math.nan, math.nan)
    value = float(np.std(values, ddof=1))
    low, high = scipy.stats.chi2.ppf([(1 + LEVEL) / 2, (1 - LEVEL) / 2], count - 1)
    return Estimate(value, value * math.sqrt((count - 1) / low), value * math.sqrt((count - 1) / high))


def difference(scores: np.ndarray, others: np.ndarray) -> Difference:
    """Mean of ``scores − others``, float [S, Q], paired by seed and by question, with a bootstrap interval.

    Seeds and questions are resampled independently, for either might have been others (Owen's pigeonhole bootstrap,
    arXiv 0712.1111, whose intervals err on the wide side). Of S seeds S − 1 are drawn, without which the variance of so
    few would be underestimated (Rao and Wu, JASA 83:401, 1988); of one seed, the questions alone.

    The interval is Student's about the bootstrap's standard error, since a percentile interval of a mean of few seeds
    misses too often (of three, one time in four). Its degrees of freedom are Satterthwaite's: S − 1 where seeds make
    all the variance, and more as questions, of which there are many, make some.
    """
    paired = np.asarray(scores, np.float64) - others
    seeds, questions = paired.shape
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(_RESAMPLES // _AT_ONCE):
        taken = rng.multinomial(max(1, seeds - 1), np.full(seeds, 1 / seeds), _AT_ONCE)
        asked = rng.multinomial(questions, np.full(questions, 1 / questions), _AT_ONCE)
        drawn.append(((taken @ paired) * asked).sum(1) / (max(1, seeds - 1) * questions))
    value = float(paired.mean())
    if seeds == questions == 1:
        return Difference(value, math.nan, math.nan, math.nan, math.nan, seeds)
    error = float(np.std(np.concatenate(drawn)))
    of_seeds = float(np.std(paired.mean(1), ddof=1)) / math.sqrt(seeds) if seeds > 1 else 0.0
    reach = float(scipy.stats.t.ppf((1 + LEVEL) / 2, _freedom(error, of_seeds, seeds))) * error
    return Difference(value, value - reach, value + reach, error, of_seeds, seeds)


def _freedom(error, of_seeds, seeds):
    """Satterthwaite's degrees of freedom of a standard error, part of which is that of so many seeds."""
    if seeds < 2 or not of_seeds:
        return math.inf
    return (seeds - 1) * max(1.0, (error / of_seeds) ** 4)
