"""Statistics: how sure a number is. It knows neither texts nor clocks: rows of numbers in, an
interval or a p out.

Intervals are drawn by numpy alone, since benchmarks run where scipy is not, and of a single row
too, which scipy's bootstrap refuses.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int32, Num

from zipper.environment import extra

RESAMPLES = 2_000


def bootstrap(
    statistic: Callable[..., Float[np.ndarray, " resamples"]],
    *columns: Num[np.ndarray, " rows"],
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval by the percentile bootstrap (Efron 1979) over rows, drawn for all columns
    together.

    statistic: one number a resample, of the columns as (resamples, rows).
    """
    drawn = _draws(len(columns[0]), seed)
    low, high = np.quantile(statistic(*(column[drawn] for column in columns)), (0.025, 0.975))
    return float(low), float(high)


def share(
    above: Num[np.ndarray, "*resamples rows"], below: Num[np.ndarray, "*resamples rows"]
) -> Float[np.ndarray, "*resamples"]:
    """The sum of one column by that of another; 0 where both are 0, as in a draw of silence."""
    return np.asarray(above.sum(axis=-1) / np.maximum(below.sum(axis=-1), 1))


def wilcoxon(differences: Float[np.ndarray, " rows"]) -> float:
    """p of the two-sided Wilcoxon signed-rank test (the paper's, sec. 4.1); 1 where all are ties.
    Raises MissingExtra without scipy."""
    rounded = np.round(differences, 12)  # 2/3 - 1/3 and 1/3 are a tie
    return float(extra("scipy.stats").wilcoxon(rounded).pvalue) if rounded.any() else 1.0


@lru_cache(maxsize=2)
def _draws(rows: int, seed: int) -> Int32[np.ndarray, "resamples rows"]:
    """Which rows are drawn when as many are drawn with replacement, each resample in order."""
    chance = np.random.default_rng(seed)
    times = chance.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    every = np.tile(np.arange(rows, dtype=np.int32), RESAMPLES)
    return np.repeat(every, times.ravel()).reshape(RESAMPLES, rows)
