"""What a few seeds and some hundred questions tell, and what they do not.

Axis letters: S seeds, Q questions.
"""

import dataclasses
import math

import numpy as np
import scipy.stats

LEVEL = 0.95  # of every interval
_RESAMPLES = 10_000
_AT_ONCE = 500  # resamples held in memory


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with its interval; the ends are nan where nothing can be said."""

    value: float
    low: float
    high: float

    @property
    def noise(self) -> bool:
        """Of a difference: whether it may be nought, as far as one can tell."""
        return not (self.low > 0 or self.high < 0)


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


def difference(scores: np.ndarray, others: np.ndarray) -> Estimate:
    """Mean of ``scores − others``, float [S, Q], paired by seed and by question, with a bootstrap interval.

    Seeds and questions are drawn anew, each on its own, for either might have been others (Owen's pigeonhole
    bootstrap, arXiv 0712.1111, which errs to wide intervals). Of S seeds S − 1 are drawn, without which the variance of
    so few would be told too small (Rao and Wu, JASA 83:401, 1988); of one seed, the questions alone.

    The interval is Student's about the bootstrap's standard error, for a mean of few seeds lies outside all of theirs
    too often (of three, one time in four). Its degrees of freedom are Satterthwaite's: S − 1 where seeds make all the
    variance, and more as questions, of which there are many, make some.
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
        return Estimate(value, math.nan, math.nan)
    error, freedom = float(np.std(np.concatenate(drawn))), math.inf
    if seeds > 1 and (of_seeds := np.std(paired.mean(1), ddof=1) / math.sqrt(seeds)):
        freedom = (seeds - 1) * max(1.0, (error / of_seeds) ** 4)
    reach = float(scipy.stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Estimate(value, value - reach, value + reach)
