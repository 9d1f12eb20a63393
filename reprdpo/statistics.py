"""Intervals that know which observations belong together: Wilson's, Student's, and means of clustered values."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from reprdpo.errors import UserError

FloatArray = NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True)
class ClusteredMean:
    """A mean of ``n`` values in ``groups`` clusters, with the interval that clusters drawn anew would give.

    ``p`` is two-sided, for the mean being 0; None where the values are shares.
    """

    value: float
    low: float
    high: float
    n: int
    groups: int
    p: float | None = None


def clustered_share(values: Sequence[float] | FloatArray, groups: Iterable[object]) -> ClusteredMean:
    """The mean of values whose mean lies in [0, 1], such as hits or an AUC's placements, with a 95 % interval.

    The variance is of the clusters' totals (Obuchowski 1997 for an AUC); the interval is Wilson's with the effective
    sample size ``m (1 - m) / variance`` and Student's quantile (Franco et al. 2019), so that it stays within [0, 1],
    and has the width of as many observations as clusters where no value differs.

    Raises:
        UserError: no values.
    """
    mean, variance, n, clusters = _clustered(values, groups)
    if variance > 0 and 0 < mean < 1:
        low, high = wilson(mean, mean * (1 - mean) / variance, student_quantile(0.975, max(1, clusters - 1)))
    else:
        mean = min(1.0, max(0.0, mean))
        low, high = wilson(mean, clusters, NormalDist().inv_cdf(0.975))
    return ClusteredMean(mean, low, high, n, clusters)


def clustered_mean(values: Sequence[float] | FloatArray, groups: Iterable[object]) -> ClusteredMean:
    """The mean of values of any sign, such as differences, with Student's 95 % interval and p.

    Where no cluster differs from another the interval has no width, and p is 0 or 1; one cluster alone says nothing.

    Raises:
        UserError: no values.
    """
    mean, variance, n, clusters = _clustered(values, groups)
    if clusters == 1:
        return ClusteredMean(mean, -math.inf, math.inf, n, clusters, 1.0)
    freedom = clusters - 1
    width = student_quantile(0.975, freedom) * math.sqrt(variance)
    p = 2 * (1 - student_cdf(abs(mean) / math.sqrt(variance), freedom)) if variance else float(mean == 0)
    return ClusteredMean(mean, mean - width, mean + width, n, clusters, min(1.0, p))


def wilson(rate: float, n: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval (1927)."""
    square = quantile**2
    centre = (rate + square / (2 * n)) / (1 + square / n)
    width = quantile * math.sqrt(rate * (1 - rate) / n + square / (4 * n**2)) / (1 + square / n)
    return (0.0 if rate == 0 else max(0.0, centre - width)), (1.0 if rate == 1 else min(1.0, centre + width))


def student_cdf(t: float, freedom: float) -> float:
    """Student's distribution function: with t = sqrt(freedom) tan(u) its density is cos(u)^(freedom - 1)."""
    end = math.atan(t / math.sqrt(freedom))
    integral = end / 2 * float(_WEIGHTS @ np.cos(end / 2 * (_NODES + 1)) ** (freedom - 1))
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + scale * integral


def student_quantile(probability: float, freedom: float) -> float:
    """The inverse of :func:`student_cdf`, for probabilities of at least one half."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return high


def p_words(p: float) -> str:
    """A p-value as a text says it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _clustered(values: Sequence[float] | FloatArray, groups: Iterable[object]) -> tuple[float, float, int, int]:
    """Mean, its cluster-robust variance, how many values and how many clusters."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise UserError("no values to take a mean of; give one at least")
    number: dict[object, int] = {}
    places = [number.setdefault(group, len(number)) for group in groups]
    mean, clusters = float(array.mean()), len(number)
    totals = np.bincount(places, weights=array - mean)
    # Rounding leaves a trace where no value differs.
    squares = float((totals**2).sum()) if np.ptp(array) else 0.0
    return mean, squares / array.size**2 * clusters / max(1, clusters - 1), array.size, clusters
