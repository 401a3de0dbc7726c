"""Statistics against counting: few rows have few resamples, and few signs have few patterns."""

import itertools

import numpy as np
import pytest

from zipper.statistics import bootstrap, share, wilcoxon


def test_the_interval_is_that_of_all_resamples() -> None:
    """Three rows have 27 equally likely resamples: count them, both columns drawn together."""
    above, below = np.array([4, 0, 9]), np.array([10, 2, 20])
    drawn = itertools.product(range(3), repeat=3)
    shares = sorted(above[[*rows]].sum() / below[[*rows]].sum() for rows in drawn)
    assert bootstrap(share, above, below) == (shares[0], shares[-1])  # 1 / 27 is over 2.5 %


def test_the_interval_of_a_mean_is_as_wide_as_the_normal_one() -> None:
    rows = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap(lambda drawn: drawn.mean(axis=-1), rows)
    half = 1.96 * rows.std() / 20
    assert (low, high) == pytest.approx((rows.mean() - half, rows.mean() + half), abs=half / 8)


def test_the_same_seed_draws_the_same_and_one_row_has_no_width() -> None:
    rows = np.random.default_rng(2).integers(0, 9, 50)
    ones = np.ones_like(rows)
    assert bootstrap(share, rows, ones, seed=1) == bootstrap(share, rows, ones, seed=1)
    assert bootstrap(share, rows, ones, seed=1) != bootstrap(share, rows, ones, seed=2)
    assert bootstrap(share, np.array([3]), np.array([4])) == (3 / 4, 3 / 4)


def test_a_draw_of_silence_alone_has_no_errors() -> None:
    assert bootstrap(share, np.array([1, 0]), np.array([2, 0])) == (0.0, 1 / 2)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3, 4, 5], 2 / 32),  # all five agree: the two extreme ones of 2 ** 5 sign patterns
        ([-1, 2, 3, 4, 5], 4 / 32),  # only rank 1 disagrees: sums 0 and 1 at either end
        ([0, 0], 1.0),
        ([1 / 3, 2 / 3 - 1 / 3], 1 / 2),  # a tie, up to rounding
    ],
)
def test_wilcoxon_counts_sign_patterns(differences: list[float], p: float) -> None:
    assert wilcoxon(np.array(differences, float)) == pytest.approx(p)
