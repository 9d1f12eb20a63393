import math

import numpy as np
import pytest
from scipy import stats

from reprdpo.errors import UserError
from reprdpo.evaluation.intervals import Rate, compare, compare_scores, mean_over_seeds, score_over_seeds
from reprdpo.statistics import student_cdf, student_quantile


def bools(outcomes):
    return [[bool(value) for value in row] for row in outcomes]


def drawn(rng, seeds, prompts, *, centre=-1.0, spread=1.0, seed_spread=0.0, prompt_effect=None):
    effect = rng.normal(size=prompts) * spread if prompt_effect is None else prompt_effect
    logit = centre + effect + rng.normal(size=(seeds, 1)) * seed_spread
    return bools(rng.random((seeds, prompts)) < 1 / (1 + np.exp(-logit)))


class TestRate:
    @pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 17), (81, 263), (1, 1), (500, 1000)])
    def test_is_scipys_wilson(self, k, n):
        expected = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        rate = Rate.of(k, n)
        assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert rate.rate == k / n

    def test_nothing_judged(self):
        rate = Rate.of(0, 0)
        assert math.isnan(rate.rate)
        assert (rate.low, rate.high) == (0, 1)

    def test_impossible_counts(self):
        with pytest.raises(ValueError, match="3 of 2"):
            Rate.of(3, 2)


@pytest.mark.parametrize("freedom", [1, 2, 2.7, 10, 399, 5000.5])
def test_student(freedom):
    for t in (0.0, 0.3, 1.96, 4.3, 12.7):
        assert student_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-10)
    for probability in (0.6, 0.975, 0.995):
        assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-8)


class TestMeanOverSeeds:
    def test_one_seed_is_nearly_wilson(self):
        outcomes = [[True] * 60 + [False] * 240]
        found, expected = mean_over_seeds(outcomes), Rate.of(60, 300)
        assert (found.mean, found.n, found.seeds, found.unparsed) == (0.2, 300, 1, 0)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-3)

    def test_equal_seeds_add_no_certainty(self):
        row = bools([np.random.default_rng(0).random(200) < 0.3])[0]
        one, three = mean_over_seeds([row]), mean_over_seeds([row] * 3)
        assert (three.low, three.high) == pytest.approx((one.low, one.high), abs=1e-9)

    def test_seeds_that_differ_widen(self):
        def constant(rate):
            return [number < rate * 100 for number in range(100)]

        steady = mean_over_seeds([constant(0.3), constant(0.3), constant(0.3)])
        moving = mean_over_seeds([constant(0.1), constant(0.3), constant(0.5)])
        assert moving.mean == pytest.approx(steady.mean)
        assert moving.high - moving.low > 2 * (steady.high - steady.low)

    @pytest.mark.parametrize("value", [True, False])
    def test_a_rate_of_nothing_has_width(self, value):
        found = mean_over_seeds([[value] * 50] * 3)
        expected = Rate.of(50 * value, 50)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))

    def test_unparsed_prompts_are_left_out(self):
        found = mean_over_seeds([[True, None, False, True], [True, True, False, None]])
        assert (found.mean, found.n, found.unparsed) == (0.5, 2, 2)

    @pytest.mark.parametrize(
        ("seeds", "seed_spread", "least"), [(1, 0.0, 0.92), (3, 0.0, 0.92), (5, 0.4, 0.88), (3, 0.6, 0.84)]
    )
    def test_coverage(self, seeds, seed_spread, least):
        """95 % intervals hold the true rate about as often as they say, over new prompts and new seeds."""
        rng = np.random.default_rng(1)
        logit = -1 + np.random.default_rng(2).normal(size=400_000) * math.hypot(1, seed_spread)
        truth = (1 / (1 + np.exp(-logit))).mean()
        found = [mean_over_seeds(drawn(rng, seeds, 80, seed_spread=seed_spread)) for _ in range(150)]
        assert least <= np.mean([estimate.low <= truth <= estimate.high for estimate in found])

    @pytest.mark.parametrize("bad", [[], [[]], [[True], [True, False]], [[None, None]]])
    def test_bad_tables(self, bad):
        with pytest.raises(UserError, match="outcomes"):
            mean_over_seeds(bad)


class TestCompare:
    def test_one_seed_is_the_paired_t_test(self):
        rng = np.random.default_rng(3)
        first, second = rng.random(5000) < 0.30, rng.random(5000) < 0.33
        found = compare(bools([first]), bools([second]))
        expected = stats.ttest_rel(first.astype(float), second.astype(float))
        interval = expected.confidence_interval(0.95)
        assert found.difference == pytest.approx(first.mean() - second.mean())
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-4)
        assert found.p == pytest.approx(expected.pvalue, rel=0.02)

    def test_verdicts(self):
        low, high = [[False] * 90 + [True] * 10] * 3, [[True] * 40 + [False] * 60] * 2
        below = compare(low, high)
        assert (below.verdict, below.held, below.seeds) == ("held", True, (3, 2))
        assert below.high < 0
        assert below.p < 1e-3
        above = compare(high, low)
        assert above.verdict == "reversed"
        assert (above.difference, above.low, above.high) == pytest.approx((-below.difference, -below.high, -below.low))
        assert "held: -30.0 points" in below.describe()

    def test_equal_systems_are_undecided(self):
        found = compare([[True, False] * 20], [[True, False] * 20])
        assert (found.verdict, found.difference, found.p) == ("undecided", 0, 1)
        assert found.low < 0 < found.high

    def test_pairing_helps(self):
        rng = np.random.default_rng(4)
        effect = rng.normal(size=200) * 4
        second = drawn(rng, 3, 200, prompt_effect=effect)
        first = drawn(rng, 3, 200, centre=-2.5, prompt_effect=effect)
        shuffled = [list(row) for row in np.array(first)[:, rng.permutation(200)]]
        paired, unpaired = compare(first, second), compare(shuffled, second)
        assert paired.high - paired.low < 0.8 * (unpaired.high - unpaired.low)

    def test_a_moving_seed_decides_nothing(self):
        base = [[number % 10 < 4 for number in range(200)]]
        steady = [[number % 10 < 3 for number in range(200)]] * 3
        moving = [[number % 10 < rate for number in range(200)] for rate in (0, 3, 6)]
        assert compare(steady, base).verdict == "held"
        assert compare(moving, base).verdict == "undecided"

    @pytest.mark.parametrize("seed_spread", [0.0, 0.4])
    def test_false_alarms(self, seed_spread):
        """Systems of equal rate are called different in about one case of twenty."""
        rng = np.random.default_rng(5)
        alarms = []
        for _ in range(150):
            effect = rng.normal(size=80)
            pair = [drawn(rng, 3, 80, prompt_effect=effect, seed_spread=seed_spread) for _ in range(2)]
            alarms.append(compare(*pair).verdict != "undecided")
        assert np.mean(alarms) <= 0.09

    def test_other_prompts_are_refused(self):
        with pytest.raises(UserError, match="answered 2 prompts, the other 3"):
            compare([[True, False]], [[True, False, True]])


class TestShares:
    def test_one_seed_is_students_interval_made_wilsons(self):
        shares = np.random.default_rng(3).beta(1, 3, size=60)
        found = mean_over_seeds([shares.tolist()])
        mean, variance = shares.mean(), shares.var(ddof=1) / 60
        many, square = mean * (1 - mean) / variance, stats.t.ppf(0.975, 59) ** 2
        centre = (mean + square / (2 * many)) / (1 + square / many)
        assert found.mean == pytest.approx(mean)
        assert (found.low + found.high) / 2 == pytest.approx(centre)

    def test_bools_and_their_numbers_are_the_same(self):
        row = bools([np.random.default_rng(0).random(50) < 0.4])[0]
        assert mean_over_seeds([row]) == mean_over_seeds([[float(value) for value in row]])


class TestScores:
    def test_one_seed_is_students_interval(self):
        scores = np.random.default_rng(0).normal(5, 3, size=40)
        found = score_over_seeds([scores.tolist()])
        expected = stats.ttest_1samp(scores, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert (found.n, found.unparsed) == (40, 0)

    def test_several_seeds_are_the_two_way_table_of_the_textbook(self):
        """Var(mean) = (MS_prompt + MS_seed - MS_error) / (S P), the mean squares from plain sums of squares."""
        seeds, prompts = 4, 15
        rng = np.random.default_rng(1)
        table = rng.normal(size=(seeds, prompts)) + rng.normal(size=prompts) + 0.5 * np.arange(seeds)[:, None]
        whole = table.sum() ** 2 / table.size
        by_prompt = (table.sum(0) ** 2).sum() / seeds - whole
        by_seed = (table.sum(1) ** 2).sum() / prompts - whole
        error = ((table**2).sum() - whole - by_prompt - by_seed) / ((seeds - 1) * (prompts - 1))
        parts = by_prompt / (prompts - 1) / table.size, (by_seed / (seeds - 1) - error) / table.size
        assert parts[1] > 0
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / (prompts - 1) + parts[1] ** 2 / (seeds - 1))
        low, high = stats.t.interval(0.95, freedom, table.mean(), math.sqrt(sum(parts)))
        found = score_over_seeds(table.tolist())
        assert (found.low, found.high) == pytest.approx((low, high))

    def test_comparison_is_the_paired_t_test(self):
        rng = np.random.default_rng(0)
        one, other = rng.normal(size=30) * 9, rng.normal(size=30) * 9
        found, expected = compare_scores([one.tolist()], [other.tolist()]), stats.ttest_rel(one, other)
        interval = expected.confidence_interval(0.95)
        assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue))

    def test_shift_and_scale_go_through(self):
        rng = np.random.default_rng(2)
        scores = rng.normal(size=(3, 25))
        found, moved = score_over_seeds(scores.tolist()), score_over_seeds((100 * scores - 7).tolist())
        assert (moved.mean, moved.low, moved.high) == pytest.approx(
            [100 * v - 7 for v in (found.mean, found.low, found.high)]
        )

    def test_scores_that_are_not_there_are_left_out(self):
        found = score_over_seeds([[1.0, None, 3.0], [2.0, 2.0, 4.0]])
        assert (found.mean, found.n, found.unparsed) == (2.5, 2, 1)

    def test_one_prompt_says_nothing_of_others(self):
        assert score_over_seeds([[2.0]]).high == math.inf
        assert compare_scores([[2.0]], [[1.0]]).verdict == "undecided"

    def test_equal_scores(self):
        found = compare_scores([[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]])
        assert (found.difference, found.p, found.verdict) == (0, 1, "undecided")

    def test_described_as_scores(self):
        assert compare_scores([[2.0, 2.5]], [[1.0, 1.0]]).describe().startswith("undecided: +1.250, 95 % interval")
