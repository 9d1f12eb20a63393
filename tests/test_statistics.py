"""Means of clustered values: as the textbooks have them without clusters, wider with them."""

import math

import numpy as np
import pytest
from scipy import stats

from reprdpo.errors import UserError
from reprdpo.statistics import clustered_mean, clustered_share


def test_alone_a_mean_is_students() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 25)
    found = clustered_mean(values, range(25))
    low, high = stats.t.interval(0.95, 24, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-8)
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6)
    assert (found.n, found.groups) == (25, 25)


def test_alone_a_share_is_nearly_wilsons() -> None:
    found = clustered_share([1.0] * 150 + [0.0] * 50, range(200))
    wilson = stats.binomtest(150, 200).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=2e-3)


def test_a_share_of_few_has_students_quantile_in_wilsons_interval() -> None:
    values = np.random.default_rng(0).beta(2, 3, 6)
    found, mean = clustered_share(values, range(6)), values.mean()
    n, square = mean * (1 - mean) / stats.sem(values) ** 2, stats.t.ppf(0.975, 5) ** 2
    centre = (mean + square / (2 * n)) / (1 + square / n)
    width = math.sqrt(square * mean * (1 - mean) / n + square**2 / (4 * n**2)) / (1 + square / n)
    assert (found.low, found.high) == pytest.approx((centre - width, centre + width))


def test_copies_of_an_observation_add_nothing() -> None:
    values = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    once, thrice = clustered_share(values, range(7)), clustered_share(values * 3, list(range(7)) * 3)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    assert (thrice.n, thrice.groups) == (21, 7)
    assert clustered_share(values * 3, range(21)).low > once.low
    once, thrice = clustered_mean(values, range(7)), clustered_mean(values * 3, list(range(7)) * 3)
    assert (thrice.low, thrice.high, thrice.p) == pytest.approx((once.low, once.high, once.p))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random, held = np.random.default_rng(1), 0
    for _ in range(400):
        rate = random.beta(8, 2, 30)
        groups = np.repeat(range(30), 4)
        found = clustered_share((random.random(120) < rate[groups]).astype(float), groups)
        held += found.low <= 0.8 <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_no_spread_still_leaves_doubt() -> None:
    sure = clustered_share([1.0] * 40, np.repeat(range(20), 2).tolist())
    assert (sure.value, sure.high) == (1.0, 1.0)
    assert sure.low == pytest.approx(stats.binomtest(20, 20).proportion_ci(method="wilson").low)
    alone = clustered_mean([0.5, 0.7], [0, 0])
    assert (alone.low, alone.high, alone.p) == (-math.inf, math.inf, 1.0)
    assert clustered_mean([0.0, 0.0], [0, 1]).p == 1


def test_no_values_are_refused() -> None:
    with pytest.raises(UserError, match="no values"):
        clustered_mean([], [])
