"""Rates and scores with their intervals: one run (Wilson), several seeds, two systems on the same prompts.

Shape suffixes: S seeds, P prompts. All of it is closed form, so the same data give the same numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

from reprdpo.errors import UserError
from reprdpo.statistics import FloatArray, p_words, student_cdf, student_quantile, wilson

_UPPER = 0.975  # every interval is of 95 %, two-sided


@dataclass(frozen=True)
class Rate:
    """``k`` of ``n``, and the Wilson interval of ``rate``; with n = 0 the rate is NaN and the interval [0, 1]."""

    k: int
    n: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, k: int, n: int) -> "Rate":
        """The rate of ``k`` events in ``n`` trials."""
        if not 0 <= k <= n:
            raise ValueError(f"k and n: got {k} of {n}; expected 0 <= k <= n")
        if n == 0:
            return cls(0, 0, math.nan, 0.0, 1.0)
        low, high = wilson(k / n, n, NormalDist().inv_cdf(_UPPER))
        return cls(k, n, k / n, low, high)


@dataclass(frozen=True)
class Estimate:
    """A rate or score over several seeds: ``mean`` with an interval for other prompts and other seeds alike.

    ``n`` prompts were judged in every one of ``seeds`` runs; ``unparsed`` further ones were not, and are left out.
    """

    mean: float
    low: float
    high: float
    n: int
    seeds: int
    unparsed: int


@dataclass(frozen=True)
class Comparison:
    """Rate of one system minus that of another on the same ``n`` prompts; ``p`` is two-sided.

    ``verdict`` on "the first is below the second": "held" or "reversed" where the interval leaves 0 out, else
    "undecided".
    """

    difference: float
    low: float
    high: float
    p: float
    n: int
    seeds: tuple[int, int]
    unparsed: int
    unit: Literal["points", "score"] = "points"

    @property
    def verdict(self) -> str:
        if self.high < 0:
            return "held"
        return "reversed" if self.low > 0 else "undecided"

    @property
    def held(self) -> bool:
        return self.verdict == "held"

    def describe(self) -> str:
        """One line, in percentage points or as scores are."""
        found = (self.difference, self.low, self.high)
        if self.unit == "points":
            middle, low, high = (f"{100 * value:+.1f}" for value in found)
        else:
            middle, low, high = (f"{value:+.3f}" for value in found)
        seeds = f"{self.seeds[0]} and {self.seeds[1]} seeds"
        unit = " points" if self.unit == "points" else ""
        interval = f"{middle}{unit}, 95 % interval [{low}, {high}]"
        return f"{self.verdict}: {interval}, {p_words(self.p)}, {self.n} prompts, {seeds}"


def mean_over_seeds(outcomes: Sequence[Sequence[float | None]]) -> Estimate:
    """The mean rate over seeds with an interval that reflects both prompts and seeds.

    Prompts and seeds are crossed random effects. With the mean squares of a two-way table without replication,
    ``Var(mean) = (MS_prompt + max(0, MS_seed - MS_error)) / (S P)`` and Satterthwaite's degrees of freedom; the
    interval is Wilson's with the effective sample size ``m (1 - m) / Var`` and Student's quantile (Franco et al. 2019
    for surveys), so it stays within [0, 1] and has width at a rate of 0. A bootstrap of few seeds would be too narrow.

    Several responses to a prompt are one cluster: give the share of them that is the event as the prompt's outcome, and
    the interval reflects that they are not independent.

    Args:
        outcomes: one row a seed, one outcome a prompt in the same order: true (the event), false, a share in [0, 1] of
            the prompt's responses, or None (unparsed).

    Raises:
        UserError: no seeds, rows of unequal length, or no prompt judged in every run.
    """
    outcomes_SP, unparsed = _complete(_table(outcomes))
    seeds, prompts = outcomes_SP.shape
    mean = float(outcomes_SP.mean())
    prompt, variance = _mean_variance(outcomes_SP)
    total = prompt.value + variance.value
    if total == 0:
        low, high = wilson(mean, prompts, NormalDist().inv_cdf(_UPPER))
    else:
        quantile = student_quantile(_UPPER, _satterthwaite([prompt, variance]))
        low, high = wilson(mean, mean * (1 - mean) / total, quantile)
    return Estimate(mean, low, high, prompts, seeds, unparsed)


def score_over_seeds(scores: Sequence[Sequence[float | None]]) -> Estimate:
    """As :func:`mean_over_seeds` for numbers without bounds (a reward model's): Student's symmetric interval.

    Args:
        scores: one row a seed, one score a prompt in the same order; None where there is none.

    Raises:
        UserError: as :func:`mean_over_seeds`.
    """
    scores_SP, unparsed = _complete(_table(scores))
    seeds, prompts = scores_SP.shape
    mean, parts = float(scores_SP.mean()), _mean_variance(scores_SP)
    width = _width(parts) if prompts > 1 else math.inf
    return Estimate(mean, mean - width, mean + width, prompts, seeds, unparsed)


def compare(first: Sequence[Sequence[float | None]], second: Sequence[Sequence[float | None]]) -> Comparison:
    """``first``'s rate minus ``second``'s, paired by prompt, each with seeds of its own.

    The variance is that of the prompts' differences (which the pairing makes small) plus each system's seed variance;
    interval and p are Student's with Satterthwaite's degrees of freedom.

    Args:
        first: as in :func:`mean_over_seeds`.
        second: the same prompts; the number of seeds may differ.

    Raises:
        UserError: as :func:`mean_over_seeds`, or another number of prompts in one than in the other.
    """
    # One discordant prompt is added to the sum of squares: two systems that never differed are not known to be equal.
    found = _compare(first, second, extra_square=1)
    return replace(found, low=max(-1.0, found.low), high=min(1.0, found.high))


def compare_scores(first: Sequence[Sequence[float | None]], second: Sequence[Sequence[float | None]]) -> Comparison:
    """As :func:`compare` for numbers without bounds, such as a reward model's scores."""
    return replace(_compare(first, second, extra_square=0), unit="score")


def _compare(
    first: Sequence[Sequence[float | None]],
    second: Sequence[Sequence[float | None]],
    *,
    extra_square: int,
) -> Comparison:
    first_SP, second_SP = _table(first), _table(second)
    if first_SP.shape[1] != second_SP.shape[1]:
        raise UserError(
            f"comparison: one system answered {first_SP.shape[1]} prompts, the other {second_SP.shape[1]}; "
            "evaluate both on the same prompt set"
        )
    both_SP, unparsed = _complete(np.concatenate([first_SP, second_SP]))
    first_SP, second_SP = both_SP[: len(first_SP)], both_SP[len(first_SP) :]
    prompts = both_SP.shape[1]
    difference_P = first_SP.mean(0) - second_SP.mean(0)
    difference = float(difference_P.mean())
    squares = float(((difference_P - difference) ** 2).sum()) + extra_square
    prompt = _Variance(squares / (prompts * max(1, prompts - 1)), max(1, prompts - 1))
    parts = [prompt, _seed_variance(first_SP), _seed_variance(second_SP)]
    error = math.sqrt(sum(part.value for part in parts))
    width = _width(parts) if extra_square or prompts > 1 else math.inf
    p = 2 * (1 - student_cdf(abs(difference) / error, _satterthwaite(parts))) if error else float(difference == 0)
    seeds = (len(first_SP), len(second_SP))
    return Comparison(difference, difference - width, difference + width, min(1.0, p), prompts, seeds, unparsed)


class _Variance(NamedTuple):
    """A part of a mean's variance, and the degrees of freedom it was estimated with."""

    value: float
    freedom: int


def _table(outcomes: Sequence[Sequence[float | None]]) -> FloatArray:
    lengths = {len(row) for row in outcomes}
    if len(lengths) != 1 or lengths == {0}:
        found = ", ".join(map(str, sorted(lengths))) or "no"
        raise UserError(f"outcomes: runs of {found} prompts; expected one or more runs over the same prompts")
    return np.array([[np.nan if value is None else float(value) for value in row] for row in outcomes])


def _complete(outcomes_SP: FloatArray) -> tuple[FloatArray, int]:
    judged_P = ~np.isnan(outcomes_SP).any(0)
    if not judged_P.any():
        raise UserError("outcomes: no prompt was judged in every run; look at the judge's unparsed answers")
    return outcomes_SP[:, judged_P], int((~judged_P).sum())


def _mean_variance(outcomes_SP: FloatArray) -> tuple[_Variance, _Variance]:
    """What prompts and what seeds add to the variance of the mean."""
    prompts = outcomes_SP.shape[1]
    prompt = float(outcomes_SP.mean(0).var(ddof=1)) / prompts if prompts > 1 else 0.0
    return _Variance(prompt, max(1, prompts - 1)), _seed_variance(outcomes_SP)


def _seed_variance(outcomes_SP: FloatArray) -> _Variance:
    """What seeds alone add to the variance of the mean: ``max(0, MS_seed - MS_error) / (S P)``; 0 from one seed."""
    seeds, prompts = outcomes_SP.shape
    if seeds < 2 or prompts < 2:
        return _Variance(0.0, 1)
    mean_S1, mean_1P = outcomes_SP.mean(1, keepdims=True), outcomes_SP.mean(0, keepdims=True)
    error_SP = outcomes_SP - mean_S1 - mean_1P + outcomes_SP.mean()
    seed_square = prompts * float(mean_S1.var(ddof=1))
    error_square = float((error_SP**2).sum()) / ((seeds - 1) * (prompts - 1))
    return _Variance(max(0.0, seed_square - error_square) / (seeds * prompts), seeds - 1)


def _satterthwaite(parts: Sequence[_Variance]) -> float:
    total = sum(part.value for part in parts)
    return total**2 / sum(part.value**2 / part.freedom for part in parts)


def _width(parts: Sequence[_Variance]) -> float:
    """Half of Student's interval around a mean."""
    total = sum(part.value for part in parts)
    return student_quantile(_UPPER, _satterthwaite(parts)) * math.sqrt(total) if total else 0.0
