"""How far a confidence can be believed: its likelihood, its calibration error, and the alpha that suits it."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

_EDGE = 0.01
_BINS = 10  # of [.5, 1]
_DRAWS = 200


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """Pairs whose more likely side has a confidence in ``(low, high]``: the first bin takes .5 as well."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How gamma = sigma(alpha * gap) does on pairs whose first response is the preferred one.

    ``nll`` is the mean of -log gamma; ``ece`` the expected calibration error of max(gamma, 1 - gamma) as a
    forecast of the ranking being right, over ten bins of [.5, 1] (Guo et al. 2017); ``saturated`` the share of gamma
    outside (.01, .99).
    """

    alpha: float
    nll: float
    ece: float
    saturated: float
    bins: list[ReliabilityBin]


def confidence_gap(chosen_reward: Tensor, rejected_reward: Tensor, *, squash: bool = False) -> Tensor:
    """What alpha multiplies in Eq. 8: the gap of the rewards, or of their sigmoids."""
    if squash:
        return torch.sigmoid(chosen_reward) - torch.sigmoid(rejected_reward)
    return chosen_reward - rejected_reward


def calibrated_alpha(gap: Tensor) -> float:
    """The alpha that minimises the mean of -log sigma(alpha * gap) over held-out gaps [P].

    No typical gap is given more confidence than (P + 1) / (P + 2), what the rule of succession allows after P right
    rankings, so that separable pairs keep a finite alpha; nor is alpha ever negative: gaps that rank no better than
    chance end at the lower bound, where gamma is about one half.
    """
    gap = gap.double()
    typical = gap.abs().mean().item()
    if typical == 0:
        return 1.0
    low, high = 0.01 / typical, math.log(len(gap) + 1) / typical
    for _ in range(60):
        middle = (low + high) / 2
        slope = -(gap * torch.sigmoid(-middle * gap)).mean().item()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return (low + high) / 2


def calibration(gap: Tensor, alpha: float) -> Calibration:
    """Calibration of sigma(alpha * gap) over gaps [P] of pairs, chosen minus rejected."""
    gap = gap.double()
    gamma = torch.sigmoid(alpha * gap)
    forecast, right = torch.maximum(gamma, 1 - gamma), right_rankings(gap)
    place = _bin(forecast)
    table, error = [], 0.0
    for i in range(_BINS):
        inside = place == i
        count = int(inside.sum())
        confidence = forecast[inside].mean().item() if count else None
        accuracy = right[inside].mean().item() if count else None
        if confidence is not None and accuracy is not None:
            error += count / len(gap) * abs(confidence - accuracy)
        table.append(ReliabilityBin(0.5 + 0.5 * i / _BINS, 0.5 + 0.5 * (i + 1) / _BINS, count, confidence, accuracy))
    return Calibration(
        alpha=alpha,
        nll=F.softplus(-alpha * gap).mean().item(),
        ece=error,
        saturated=((gamma < _EDGE) | (gamma > 1 - _EDGE)).double().mean().item(),
        bins=table,
    )


def ece_noise(gap: Tensor, alpha: float) -> float:
    """The calibration error that ``sigma(alpha * gap)`` [P] would show by chance alone, were it perfectly calibrated.

    The mean over rankings drawn from the forecasts themselves: bins of few pairs err, so that the error of a small set
    is never 0.
    """
    gamma = torch.sigmoid(alpha * gap.double().abs())
    drawn = torch.rand(_DRAWS, len(gamma), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    excess = gamma.cpu() - (drawn < gamma.cpu()).double()
    inside = F.one_hot(_bin(gamma.cpu()), _BINS).double()
    return ((excess @ inside).abs().sum(1) / len(gamma)).mean().item()


def pair_accuracy(gap: Tensor) -> Tensor:
    """Share of positive gaps along the first dimension, [P, ...] -> [...] float64; a tie counts one half."""
    return right_rankings(gap).mean(0)


def right_rankings(gap: Tensor) -> Tensor:
    """1 where a gap is positive, one half where it is 0, else 0, float64."""
    return (gap > 0).double() + 0.5 * (gap == 0).double()


def _bin(forecast: Tensor) -> Tensor:
    """The bin of [.5, 1] each forecast lies in."""
    return ((forecast - 0.5) * 2 * _BINS).ceil().long().clamp(1, _BINS) - 1
